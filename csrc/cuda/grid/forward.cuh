// The forward pass over the grid: one cooperative launch runs all steps of a layer that no cluster
// holds.
//
// What it computes: h_t and c_t of every step, from the input part and W_hh.
//
// Who owns what: a team of CTAs has a group of sequences and one direction; teams exchange nothing.
// A CTA owns some units: their weights for the whole sequence (forward_product.cuh), and their
// cells, one or more to a thread. The owners of cells also store gates, c and y.
//
// What moves per step: every CTA sends the h of its units to a place in the L2 cache, and every CTA
// first_packet all of h, each element once, straight into the registers that are the product's
// operand. There are no flags and no fences: a word carries the phase of its step (phase.cuh). The
// input part comes by asynchronous copies, two or three steps ahead.
//
// Why two places for h, in turn, are enough. h of step s goes to place s % 2, with another phase
// than h of step s - 2 had there. The memory begins as zeros, the phase of neither first exchange.
//  * A reader infers nothing from one word about another: it checks each by itself.
//  * It cannot take h of step s - 2 for that of step s: their phases differ. It cannot see that of
//    s - 4 or older: the same thread has read s - 2 at the same address, and loads of one location
//    by one thread never go back in time.
//  * h of step s + 2 overwrites that of step s only after all have read it. Its writer has
//  multiplied
//    all of h of step s + 1. Each CTA computed its part of that from partial sums, behind a barrier
//    at which all its warps arrived after their loads of step s had returned and been checked. So a
//    chain of data dependencies and CTA barriers leads from every read of step s to each write of
//    step s + 2.
//  * A wait ends for any value. h of a half type beyond 1 is never sent: it can only stem from h0,
//    which is read from the caller's memory; zoneout, which would keep it, is refused together with
//    h0. A NaN is sent as a number that h never is, and read as a NaN.
// The input part: a stage is read before the barrier of its step, and refilled after it.
// Partial sums: forward_product.cuh. Floor: docs/kernels.md.
#pragma once

#include "forward_product.cuh"
#include "rules.h"
#include "walk.cuh"

namespace fastlstm {
namespace cuda {

template <class S>
struct GridForwardDirection {  // one direction of a layer
  typedef Acc<S> T;
  const uint4* fragments;           // of all CTAs (GridPackArgs)
  const unsigned char* h0_packets;  // h0 as packets, group after group; or null
  const T* start;                   // the input part by slots, one slot for each CTA
  const int* index;                 // or null
  const T* bias;                    // (4H) or null
  const S *h0, *c0;                 // (B, H) or null
  S *y, *gates, *h_n, *c_n;         // gates: (rows, 4H) or null
  T* cell_states;
  DrawnRules<T> rules;
};

template <class S>
struct GridForwardArgs {
  GridForwardDirection<S> direction[2];
  unsigned char* exchange;  // (teams of the launch, 2, slot_bytes), zeroed
  // Team number: direction * groups + group. This launch has those from first_team on.
  int groups, first_team;
  GridTeam team;
  StepRows steps;
  int units;  // H
  int64_t y_stride;
  uint64_t limit;  // of a wait, in nanoseconds; 0: none
};

template <class S, int kShape>
__device__ __forceinline__ void grid_forward(const GridForwardArgs<S>& args) {
  typedef Acc<S> T;
  typedef GridForwardProduct<S, kShape> Product;
  typedef PartialSums<Product> Partial;
  constexpr GridShape kGrid = Product::kGrid;
  constexpr ForwardLayout kLayout = Product::kLayout;
  constexpr int kCells = Partial::kCells, kSequences = Product::kSequences, kUnits = kGrid.units;
  FASTLSTM_SHARED_BUFFER(shared);
  const int slot = blockIdx.x % args.team.ctas, local_team = blockIdx.x / args.team.ctas;
  const int team = args.first_team + local_team;
  const int group = team % args.groups, direction = team / args.groups;
  // The direction's arguments are loaded where they are used: in registers from step to step, they
  // would leave too few for weights.
  auto layer = [&]() -> const GridForwardDirection<S>& {
    uint32_t d = direction;
    pin(d);
    return args.direction[d];
  };
  const int units = args.units;
  const GroupWalk walk(args.steps, group * kSequences, kSequences, direction);

  unsigned char* const partial_at =
      shared + blocks_shared(kGrid, args.team.slabs) * kGridWarps * kGridBlockBytes;
  unsigned char* const stages = partial_at + kLayout.buffers * kLayout.partial_bytes;
  const Product product(
      layer().fragments + int64_t(slot) * args.team.slabs * Product::kBlocks * kGridBlockFragments,
      shared, args.team.slabs);
  const Partial partial(partial_at);

  T* const bias = reinterpret_cast<T*>(stages + kGrid.stages * kLayout.stage_bytes);
  T* const h = bias + 4 * kUnits + threadIdx.x;  // h of cell r is at r * kGridThreads
  const GroupSteps steps(
      reinterpret_cast<unsigned char*>(bias + 4 * kUnits + kCells * kGridThreads));
  const bool looks_ahead = threadIdx.x == kGridThreads - 1;
  if (looks_ahead) steps.begin(walk);

  // ---- the input part: copies of 16 bytes, kUnits of them to a sequence ----
  constexpr int kJobs = (kSequences * kUnits + kGridThreads - 1) / kGridThreads;
  const int start_stride = args.team.ctas * 4 * kUnits;
  int source[kJobs];  // the row of `start` of the next copies, or -1
  auto look_up_sources = [&](int s) {
    const int me = recomputed_thread();
    const int row = int(steps.row(s)), count = steps.active(s);
#pragma unroll
    for (int j = 0; j < kJobs; ++j) {
      const int n = (me + j * kGridThreads) / kUnits;
      source[j] = n >= count ? -1 : layer().index ? layer().index[row + n] : row + n;
    }
  };
  auto copy = [&](int s) {
    const int me = recomputed_thread();
    unsigned char* stage = stages + s % kGrid.stages * kLayout.stage_bytes;
#pragma unroll
    for (int j = 0; j < kJobs; ++j) {
      const int x = me + j * kGridThreads, n = x / kUnits, chunk = x % kUnits;
      if (n >= kSequences) continue;
      const T* from = layer().start;
      if (source[j] >= 0) from += int64_t(source[j]) * start_stride + slot * 4 * kUnits + chunk * 4;
      copy_async(stage + (n * kLayout.row_floats + chunk * 4) * 4, from, source[j] >= 0 ? 16 : 0);
    }
    commit_async();
  };
  __syncthreads();
  for (int s = 0; s < kGrid.stages; ++s) {
    look_up_sources(s);
    copy(s);
  }
  look_up_sources(kGrid.stages);

  // ---- this thread's cells ----
  auto unit_of_thread = [&] { return slot * kUnits + partial.unit(); };
  const int first_unit = unit_of_thread();
  const bool inside = partial.owns() && first_unit < units;
  for (int j = threadIdx.x; j < 4 * kUnits; j += kGridThreads) {
    const int u = slot * kUnits + j % kUnits;
    bias[j] = u < units ? value_or_zero(layer().bias, j / kUnits * units + u) : T(0);
  }
  T c[kCells];
#pragma unroll
  for (int r = 0; r < kCells; ++r) {
    const int b = walk.first + partial.sequence(r);
    const bool exists = inside && b < args.steps.batch;
    c[r] = exists ? value_or_zero(layer().c0, int64_t(b) * units + first_unit) : T(0);
    h[r * kGridThreads] =
        exists ? value_or_zero(layer().h0, int64_t(b) * units + first_unit) : T(0);
  }

  // The place of h of step s in the exchange.
  auto place = [&](int s) {
    uint32_t j = local_team * 2;
    pin(j);
    return (j + s % 2) * uint32_t(args.team.slot_bytes);
  };
  const int first_packet = product.offset();
  auto h0_packets = [&] {
    uint32_t j = group;
    pin(j);
    return layer().h0_packets + j * args.team.slot_bytes + first_packet;
  };
  constexpr int kPacket = 16 / int(sizeof(S));
  bool late = false;  // whether sequences enter in this step
  const bool plain = layer().rules.plain;
  wait_async<0>();
  __syncthreads();

  for (int s = 0; s < walk.length; ++s) {
    typename Product::Sums sums = {};
    if (s > 0 || layer().h0_packets) {
      product.multiply(
          sums, s > 0 ? args.exchange + place(s - 1) + first_packet : h0_packets(),
          s > 0 ? phase_of(s - 1, PhaseCode<S>::kPhase) : 0, s > 0 ? PhaseCode<S>::kPhase : 0,
          args.limit, [&](uint4& packet, int tile, int offset) {
            if (!late) return;
            const int n = tile * 8 + lane_of_thread() / 4;
            if (n < steps.active(s - 1)) return;
            packet = layer().h0_packets ? *reinterpret_cast<const uint4*>(h0_packets() + offset)
                                        : make_uint4(0, 0, 0, 0);
          });
    }
    // What does not depend on other CTAs is read before the barrier.
    T gates[kCells][4] = {}, pre[kCells][4];
    int active = 0;
    uint32_t to = 0;
    partial.add_up(sums, s, gates, [&] {
      if (partial.owns()) {
        const int local = partial.unit(), unit = slot * kUnits + local;
        const float* stage =
            reinterpret_cast<const float*>(stages + s % kGrid.stages * kLayout.stage_bytes) + local;
#pragma unroll
        for (int r = 0; r < kCells; ++r)
#pragma unroll
          for (int q = 0; q < 4; ++q)
            pre[r][q] = stage[partial.sequence(r) * kLayout.row_floats + q * kUnits] +
                        bias[q * kUnits + local];
        active = steps.active(s);
        to = place(s) + unit / kPacket * kSequences * 16 + unit % kPacket * int(sizeof(S));
      }
      wait_async<kGrid.stages - 2>();
    });

    CellForward<T> out[kCells];
    S stored[kCells] = {};
    if (partial.owns()) {
      const uint32_t phase = phase_of(s, PhaseCode<S>::kPhase);
#pragma unroll
      for (int r = 0; r < kCells; ++r) {
        const int n = partial.sequence(r);
#pragma unroll
        for (int q = 0; q < 4; ++q) gates[r][q] += pre[r][q];
        if (plain)
          out[r] = cell_forward<FastMath>(gates[r][0], gates[r][1], gates[r][2], gates[r][3], c[r]);
        else
          out[r] = cell_forward<FastMath>(
              gates[r][0], gates[r][1], gates[r][2], gates[r][3], c[r], h[r * kGridThreads],
              layer().rules.at(layer().rules.row(walk.time(s), walk.first + n), unit_of_thread()));
        // A sequence that is not in this step keeps its states; zeros are sent for it.
        if (n < active) {
          c[r] = out[r].c;
          from_acc(out[r].h, stored[r]);
          if (!plain) h[r * kGridThreads] = to_acc(stored[r]);
        } else {
          from_acc(T(0), stored[r]);
        }
        if (s + 1 < walk.length) send_element(args.exchange + to + n * 16, stored[r], phase);
      }
    }

    // ---- no other CTA waits for what follows ----
    if (inside) {
      const int unit = unit_of_thread();
#pragma unroll
      for (int r = 0; r < kCells; ++r) {
        const int n = partial.sequence(r);
        if (n >= steps.active(s)) continue;
        const int64_t at = steps.row(s) + n;
        layer().y[at * args.y_stride + unit] = stored[r];
        if (layer().gates) {
          S* to = layer().gates + at * 4 * units + unit;
          store_gates(out[r], to, units);
          layer().cell_states[at * units + unit] = out[r].c;
        }
        if (n >= steps.active(s + 1)) {
          const int64_t last = int64_t(walk.first + n) * units + unit;
          layer().h_n[last] = stored[r];
          from_acc(out[r].c, layer().c_n[last]);
        }
      }
    }
    copy(s + kGrid.stages);
    look_up_sources(s + kGrid.stages + 1);
    if (looks_ahead) steps.look_up(walk, s + GroupSteps::kAhead);
    late = steps.active(s) < steps.active(s + 1);
  }
  wait_async<0>();
}

template <class S, int kShape>
__global__ void __launch_bounds__(kGridThreads, 1)
    grid_forward_kernel(const __grid_constant__ GridForwardArgs<S> args) {
  if constexpr (FASTLSTM_SM80) grid_forward<S, kShape>(args);
}

}  // namespace cuda
}  // namespace fastlstm

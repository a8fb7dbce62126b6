// Forward over the grid: one cooperative launch for all steps of a layer that no cluster holds.
//
// What it computes: h_t and c_t of every step, from the input's part and W_hh.
// Who owns what: a team of CTAs has a group of sequences and one direction; teams never meet. A CTA
// owns some units: their weights for the whole sequence (forward_product.cuh), their cells, a
// thread one or two of them. Saved gates, cells and y are written by their cells' owners. What
// moves a step: every CTA sends its units' h to a place in the L2 cache, and every CTA reads all of
// it, each element once, straight into the registers that its product takes. There are no flags and
// no fences: a word says itself to which step it belongs (carrier.cuh). The input's part comes by
// asynchronous copies, two or three steps ahead.
//
// Why two places for h, in turn, are enough. h of step s goes to place s % 2, with another phase
// than that of s - 2; the memory begins as zeros, which is the phase of no first exchange.
//  * A reader infers nothing from a word about others: each is checked for itself.
//  * It cannot take s - 2 for s: the phases differ. It cannot see s - 4 or older: this very thread
//    has read s - 2 at this very address, and a thread's loads of one location never go back.
//  * s + 2 overwrites s only when all have read s. Its writer has multiplied all of s + 1; each CTA
//    made its part of s + 1 from partial sums, behind a barrier at which all its warps arrived
//    after their loads of s had returned and been checked. So a chain of data dependencies and of
//    CTA barriers leads from every read of s to each write of s + 2.
//  * A wait ends for any value: h of a half type beyond 1 is not sent. Such a value can only stem
//    from h0, which is read where the caller left it; zoneout, which would keep it, is refused
//    together with h0. A NaN is sent as what h never is, and read as NaN.
// The input's part: a stage is read before the barrier of its step, and filled again behind it.
// Partial sums: forward_product.cuh. Floor: docs/kernels.md.
#pragma once

#include "forward_product.cuh"
#include "rules.h"
#include "walk.cuh"

namespace fastlstm {
namespace cuda {

template <class S>
struct GridForwardCell {  // one direction of a layer
  typedef Acc<S> T;
  const uint4* fragments;      // of all CTAs (GridPackArgs)
  const unsigned char* first;  // h0 as packets, group after group; or null
  const T* start;              // the input's part by slots, one for each CTA
  const int* index;            // or null
  const T* bias;               // (4H) or null
  const S *h0, *c0;            // (B, H) or null
  S *y, *gates, *h_n, *c_n;    // gates: (rows, 4H) or null
  T* cells;
  DrawnRules<T> rules;
};

template <class S>
struct GridForwardArgs {
  GridForwardCell<S> cell[2];
  unsigned char* exchange;  // (teams of the launch, 2, slot_bytes), zeroed
  // Teams: direction * groups + group. The launch has those from first_team on.
  int groups, first_team;
  GridTeam team;
  int steps, batch, units;
  const int* starts;  // first rows of packed steps (steps + 1), or null
  int64_t y_wide;
  uint64_t limit;  // nanoseconds that a wait may take; 0: any
};

template <class S, int kShape>
__device__ __forceinline__ void grid_forward(const GridForwardArgs<S>& args) {
  typedef Acc<S> T;
  typedef GridProduct<S, kShape> Product;
  typedef PartialSums<Product> Partial;
  constexpr GridShape kGrid = Product::kGrid;
  constexpr ForwardLayout kLayout = Product::kLayout;
  constexpr int kCells = Partial::kCells, kSequences = Product::kSequences, kUnits = kGrid.units;
  FASTLSTM_SHARED_BUFFER(shared);
  const int slot = blockIdx.x % args.team.ctas, local_team = blockIdx.x / args.team.ctas;
  const int team = args.first_team + local_team;
  const int group = team % args.groups, direction = team / args.groups;
  // Read where they are used: kept in registers, they would leave too few for weights.
  auto cell = [&]() -> const GridForwardCell<S>& {
    uint32_t d = direction;
    pin(d);
    return args.cell[d];
  };
  const int units = args.units;
  const GroupWalk walk(args.starts, args.steps, args.batch, group * kSequences, kSequences,
                       direction);

  unsigned char* const partial_at =
      shared + blocks_shared(kGrid, args.team.slabs) * kGridWarps * 2048;
  unsigned char* const stages = partial_at + kLayout.buffers * kLayout.partial_bytes;
  const Product product(cell().fragments + int64_t(slot) * args.team.slabs * Product::kBlocks * 128,
                        shared, args.team.slabs);
  const Partial partial(partial_at);

  T* const bias = reinterpret_cast<T*>(stages + kGrid.stages * kLayout.stage_bytes);
  T* const h = bias + 4 * kUnits + threadIdx.x;  // of cell r at r * kGridThreads
  const GroupSteps steps(
      reinterpret_cast<unsigned char*>(bias + 4 * kUnits + kCells * kGridThreads));
  const bool finder = threadIdx.x == kGridThreads - 1;
  if (finder) steps.begin(walk);

  // ---- the input's part: 16 bytes a copy, `kUnits` of them to a sequence ----
  constexpr int kJobs = (kSequences * kUnits + kGridThreads - 1) / kGridThreads;
  const int wide = args.team.ctas * 4 * kUnits;
  int source[kJobs];  // the row of `start` of the next copies, or -1
  auto find = [&](int s) {
    const int me = thread_again();
    const int row = int(steps.row(s)), count = steps.active(s);
#pragma unroll
    for (int j = 0; j < kJobs; ++j) {
      const int n = (me + j * kGridThreads) / kUnits;
      source[j] = n >= count ? -1 : cell().index ? cell().index[row + n] : row + n;
    }
  };
  auto copy = [&](int s) {
    const int me = thread_again();
    unsigned char* stage = stages + s % kGrid.stages * kLayout.stage_bytes;
#pragma unroll
    for (int j = 0; j < kJobs; ++j) {
      const int x = me + j * kGridThreads, n = x / kUnits, chunk = x % kUnits;
      if (n >= kSequences) continue;
      const T* from = cell().start;
      if (source[j] >= 0) from += int64_t(source[j]) * wide + slot * 4 * kUnits + chunk * 4;
      copy_async(stage + (n * kLayout.row_floats + chunk * 4) * 4, from, source[j] >= 0 ? 16 : 0);
    }
    commit_async();
  };
  __syncthreads();
  for (int s = 0; s < kGrid.stages; ++s) {
    find(s);
    copy(s);
  }
  find(kGrid.stages);

  // ---- this thread's cells ----
  auto unit_of_thread = [&] { return slot * kUnits + partial.unit(); };
  const int first_unit = unit_of_thread();
  const bool inside = partial.owns() && first_unit < units;
  for (int j = threadIdx.x; j < 4 * kUnits; j += kGridThreads) {
    const int u = slot * kUnits + j % kUnits;
    bias[j] = u < units ? value_or_zero(cell().bias, j / kUnits * units + u) : T(0);
  }
  T c[kCells];
#pragma unroll
  for (int r = 0; r < kCells; ++r) {
    const int b = walk.first + partial.sequence(r);
    const bool exists = inside && b < args.batch;
    c[r] = exists ? value_or_zero(cell().c0, int64_t(b) * units + first_unit) : T(0);
    h[r * kGridThreads] = exists ? value_or_zero(cell().h0, int64_t(b) * units + first_unit) : T(0);
  }

  // Where h of step s is, in the exchange.
  auto place = [&](int s) {
    uint32_t j = local_team * 2;
    pin(j);
    return (j + s % 2) * uint32_t(args.team.slot_bytes);
  };
  const int reads = product.offset();
  auto first = [&] {
    uint32_t j = group;
    pin(j);
    return cell().first + j * args.team.slot_bytes + reads;
  };
  constexpr int kPacket = 16 / int(sizeof(S));
  bool late = false;  // whether sequences enter that were not in the step before
  const bool plain = cell().rules.plain;
  wait_async<0>();
  __syncthreads();

  for (int s = 0; s < walk.length; ++s) {
    typename Product::Sums sums = {};
    if (s > 0 || cell().first) {
      product.multiply(sums, s > 0 ? args.exchange + place(s - 1) + reads : first(),
                       s > 0 ? phase_of(s - 1, Carrier<S>::kPhase) : 0,
                       s > 0 ? Carrier<S>::kPhase : 0, args.limit,
                       [&](uint4& packet, int tile, int offset) {
                         if (!late) return;
                         const int n = tile * 8 + lane_of_thread() / 4;
                         if (n < steps.active(s - 1)) return;
                         packet = cell().first ? *reinterpret_cast<const uint4*>(first() + offset)
                                               : make_uint4(0, 0, 0, 0);
                       });
    }
    // What does not depend on other CTAs is read before the CTA meets.
    T gates[kCells][4] = {}, pre[kCells][4];
    int active = 0;
    uint32_t to = 0;
    partial.add_up(sums, s, gates, [&] {
      if (partial.owns()) {
        const int own = partial.unit(), unit = slot * kUnits + own;
        const float* stage =
            reinterpret_cast<const float*>(stages + s % kGrid.stages * kLayout.stage_bytes) + own;
#pragma unroll
        for (int r = 0; r < kCells; ++r)
#pragma unroll
          for (int q = 0; q < 4; ++q)
            pre[r][q] = stage[partial.sequence(r) * kLayout.row_floats + q * kUnits] +
                        bias[q * kUnits + own];
        active = steps.active(s);
        to = place(s) + unit / kPacket * kSequences * 16 + unit % kPacket * int(sizeof(S));
      }
      wait_async<kGrid.stages - 2>();
    });

    CellForward<T> out[kCells];
    S stored[kCells] = {};
    if (partial.owns()) {
      const uint32_t phase = phase_of(s, Carrier<S>::kPhase);
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
              cell().rules.at(cell().rules.row(walk.at(s), walk.first + n), unit_of_thread()));
        // A sequence that is not in this step keeps its states and is multiplied by nothing.
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

    // ---- nothing below is waited for by others ----
    if (inside) {
      const int unit = unit_of_thread();
#pragma unroll
      for (int r = 0; r < kCells; ++r) {
        const int n = partial.sequence(r);
        if (n >= steps.active(s)) continue;
        const int64_t at = steps.row(s) + n;
        cell().y[at * args.y_wide + unit] = stored[r];
        if (cell().gates) {
          S* to = cell().gates + at * 4 * units + unit;
          from_acc(out[r].i, to[0]);
          from_acc(out[r].f, to[units]);
          from_acc(out[r].g, to[2 * units]);
          from_acc(out[r].o, to[3 * units]);
          cell().cells[at * units + unit] = out[r].c;
        }
        if (n >= steps.active(s + 1)) {
          const int64_t last = int64_t(walk.first + n) * units + unit;
          cell().h_n[last] = stored[r];
          from_acc(out[r].c, cell().c_n[last]);
        }
      }
    }
    copy(s + kGrid.stages);
    find(s + kGrid.stages + 1);
    if (finder) steps.find(walk, s + GroupSteps::kAhead);
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

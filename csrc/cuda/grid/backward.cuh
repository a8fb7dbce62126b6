// The backward pass over the grid: one cooperative launch runs all steps of a layer that no cluster
// holds.
//
// What it computes: what CellBackwardStep computes (stepwise/backward_steps.cuh), for every step.
//
// Who owns what: a team of CTAs has a group of sequences and one direction, as forward. A CTA owns
// some units: their cells, and their rows of W_hh. A warp has whole sequences; a thread has one
// unit of each of them (with 16 units in a CTA, two threads the same one), whose dc stays in
// registers.
//
// What moves per step: a CTA's dgates stay in the CTA. It multiplies its rows of W_hh, transposed,
// by them (backward_product.cuh) and sends the partial sums of every unit to the unit's owner,
// through the L2 cache; the owner adds those of all CTAs in a fixed order. There are no flags and
// no fences: the last bit of a word is the phase of its step (phase.cuh). Gates, cell states and
// incoming gradients come by asynchronous copies, three steps ahead (backward_copies.cuh). All that
// a cell needs besides the sums is computed before they arrive; dgates are stored behind the send.
//
// The kernel is compiled for a shape and for the blocks that a warp computes: what the step waits
// for has no address to compute. What is rare looks its arguments up.
//
// Why two places for the sums, in turn, are enough. Exchange s is sent in step s and read in step
// s + 1, at place s % 2, with another phase than exchange s - 2. The memory begins as zeros.
//  * A reader infers nothing from one word about another: it checks each by itself.
//  * It cannot take exchange s - 2 for s: their phases differ. It cannot see s - 4 or older: the
//    same thread has read s - 2 at the same address, and loads of one location by one thread never
//    go back in time.
//  * What producer P sends to reader R in exchange s + 2 overwrites what it sent in exchange s only
//    after R has read that. P sends it behind the barrier of its step s + 2, at which its warps
//    arrived after their loads of exchange s + 1, R's part among them, had returned and been
//    checked. R sent that part behind the barrier of its step s + 1, at which all its warps arrived
//    after their loads of exchange s had returned and been checked. The chain consists of data
//    dependencies and CTA barriers. It holds for every pair, since each CTA sends to each, itself
//    included.
//  * A wait ends for any value. The phase bit leaves a NaN a NaN, and may make one of an infinity.
//  * Where a row of sums is longer than the layer, nobody sends: it stays zero, and is not checked.
// dgates, two buffers: those of step s are written before its barrier, and were last read in step
// s - 2, before the barrier of step s - 1. Stages: that of step s is read before the barrier of
// step s, and refilled after it. Floor: docs/kernels.md.
#pragma once

#include "backward_copies.cuh"
#include "backward_fp32.cuh"

namespace fastlstm {
namespace cuda {

// The cells of a thread, one for each tile of sequences. Where two threads have the same cell, each
// has two of its gates.
template <class S, class Operand, class Received>
struct GridBackwardCell {
  static constexpr int kGates = Received::kCopies == 2 ? 2 : 4;
  static constexpr int kWords = kGates * int(sizeof(S)) / 4;

  // From step to step. c, dc: of the step to come. steps: those of the sequence; 0 where there is
  // no such cell.
  float c = 0, dc = 0, dh_zoneout = 0;
  int steps = 0;
  // Of a step.
  CellFactors<float> factors;
  float dh, dc_state, dc_kept;
  float d[kGates];

  __device__ __forceinline__ void prepare(const CellFactors<float>& x) {
    factors = x;
    if (kGates == 2 && Received::copy() == 1) factors.a_i = x.a_g, factors.a_f = x.a_o;
    dc_state = dc * x.state_c;
    dc_kept = dc * x.c_kept;
    pin(factors.state_h), pin(factors.a_i), pin(factors.a_f), pin(factors.c_prev);
    if (kGates == 4) pin(factors.a_g), pin(factors.a_o);
    pin(factors.h_prev), pin(dh), pin(dc_state), pin(dc_kept);
  }
  __device__ __forceinline__ void compute() {
    const float d_state = dh * factors.state_h + dc_state;
    d[0] = d_state * factors.a_i;
    d[1] = (kGates == 2 && Received::copy() == 1 ? dh : d_state) * factors.a_f;
    if constexpr (kGates == 4) {
      d[2] = d_state * factors.a_g;
      d[3] = dh * factors.a_o;
    }
    dc = d_state * factors.c_prev + dc_kept;
    dh_zoneout = dh * factors.h_prev;
  }
  // As operands of the product.
  __device__ __forceinline__ void store_operands(unsigned char* to) const {
    uint32_t words[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (std::is_same_v<Operand, float>) {
        words[w] = bits_of(d[w]);
      } else if constexpr (std::is_same_v<Operand, RoundedFloat>) {
        words[w] = round_tf32(bits_of(d[w]));
      } else {
        S low, high;
        from_acc(d[2 * w], low);
        from_acc(d[2 * w + 1], high);
        words[w] = bits_of(low) | bits_of(high) << 16;
      }
    }
    if constexpr (kWords == 1)
      *reinterpret_cast<uint32_t*>(to) = words[0];
    else if constexpr (kWords == 2)
      *reinterpret_cast<uint64_t*>(to) = words[0] | uint64_t(words[1]) << 32;
    else
      *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  }
  // This thread's gates, `stride` elements apart. Those of a half type come back from the operands
  // and so take no registers during the product; tf32's are rounded there.
  __device__ __forceinline__ void store_gates(const unsigned char* operands, S* to,
                                              int stride) const {
#pragma unroll
    for (int q = 0; q < kGates; ++q) {
      if constexpr (sizeof(S) == 4)
        to[q * stride] = d[q];
      else
        to[q * stride] = reinterpret_cast<const S*>(operands)[q];
    }
  }
};

template <class Product>
__device__ __forceinline__ void grid_backward(
    const GridBackwardArgs<typename Product::Storage>& args) {
  typedef typename Product::Storage S;
  typedef typename Product::Math Math;
  typedef ReceivedSums<Product> Received;
  typedef GridBackwardCell<S, typename Product::Operand, Received> Cell;
  constexpr GridBackwardShape kGrid = Product::kGrid;
  constexpr BackwardLayout kLayout = Product::kLayout;
  constexpr int kTiles = kGrid.tiles, kUnits = kGrid.units, kStages = kGrid.stages;
  FASTLSTM_SHARED_BUFFER(shared);
  const int slot = blockIdx.x % args.team.ctas, local_team = blockIdx.x / args.team.ctas;
  const int team = args.first_team + local_team;
  const int direction = team / args.groups;
  const GroupWalk walk(args.steps, team % args.groups * kGrid.sequences(), kGrid.sequences(),
                       1 - direction);
  // Arguments of rare cases are looked up where they are used: the compiler would otherwise keep
  // them, or what it computes from them, in registers that weights need.
  auto rarely = [](int x) {
    uint32_t result = x;
    pin(result);
    return int(result);
  };
  auto layer = [&]() -> const GridBackwardDirection<S>& {
    return args.direction[rarely(direction)];
  };

  unsigned char* const dgates = shared + Product::kShared * kGridWarps * kGridBlockBytes;
  unsigned char* const stages = dgates + 2 * kLayout.dgates_bytes;
  constexpr int kStagesBytes = kStages * kLayout.stage_bytes;
  const GroupSteps steps(stages + kStagesBytes + kLayout.piece_bytes);
  const bool looks_ahead = threadIdx.x == kGridThreads - 1;
  if (looks_ahead) steps.begin(walk);
  // Pieces that are never copied stay zero.
  for (int j = threadIdx.x; j < kStagesBytes / 16; j += kGridThreads)
    reinterpret_cast<uint4*>(stages)[j] = make_uint4(0, 0, 0, 0);

  const GridSums places{
      args.exchange + int64_t(local_team) * args.team.ctas * (2 * Product::kPlaceBytes),
      args.team.blocks, slot};
  const Product product(
      layer().fragments + int64_t(slot) * args.team.blocks * Product::kSlabs * kGridBlockFragments,
      shared, places);
  const Received received(places);
  const GridBackwardCopies<Product> copies(args, direction, slot, stages, stages + kStagesBytes);

  const int units = args.units, warp = warp_of_thread();
  const int local = Received::unit(), unit = slot * kUnits + local;
  Cell cells[kTiles];
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
    if (unit < units) cells[j].steps = args.steps.length_of(walk.first + warp + 8 * j);
  // Backwards in time, sequences enter late; forwards, they leave early.
  auto step_of = [&](const Cell& cell, int s) {  // counted from the sequence's first
    return direction == 0 ? s - (walk.length - cell.steps) : s;
  };
  auto state_of = [&](int j) {
    return int64_t(walk.first + rarely(warp) + 8 * j) * units + rarely(unit);
  };
  // Where this thread's first cell has its values: in a stage, among the operands, and in dgates.
  constexpr int kRow = kLayout.row_bytes, kSlabUnits = kUnits / Product::kSlabs;
  const unsigned char* const gates_at = stages + warp * kRow + local * int(sizeof(S));
  const unsigned char* const states_at = stages + warp * kRow + kLayout.gate_bytes + local * 4;
  unsigned char* const operands_at = dgates + local / kSlabUnits * kLayout.tile_bytes +
                                     (warp * 4 + local % 4) * 16 + local % kSlabUnits / 4 * 8 +
                                     Received::copy() * (Cell::kGates * int(sizeof(S)));
  auto place = [](int s) { return s % 2; };  // of exchange s
  const bool plain = layer().rules.plain, upper = layer().upper_input != nullptr;

  __syncthreads();
  auto copy = [&](int s, unsigned stage) {
    copies.load(stage, {steps.row(s), steps.active(s)}, {steps.row(s + 1), steps.active(s + 1)});
  };
  for (int s = 0; s < kStages; ++s) copy(s, s * kLayout.stage_bytes);
  wait_async<0>();
  __syncthreads();

  unsigned stage = 0;  // where that of the step begins
  for (int s = 0; s < walk.length; ++s) {
    // ---- what does not depend on other CTAs ----
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      Cell& cell = cells[j];
      const unsigned char* const gates = gates_at + stage + j * 8 * kRow;
      const unsigned char* const states = states_at + stage + j * 8 * kRow;
      float act[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) act[q] = to_acc(reinterpret_cast<const S*>(gates)[q * kUnits]);
      float c_prev = *reinterpret_cast<const float*>(states);
      const float dc_above = reinterpret_cast<const float*>(states)[2 * kUnits];
      cell.dh =
          cell.dh_zoneout +
          (upper ? reinterpret_cast<const float*>(states)[kUnits]
                 : to_acc(*reinterpret_cast<const S*>(gates + kLayout.gate_bytes + 4 * kUnits)));
      const int step = step_of(cell, s);
      if (step == 0 && cell.steps > 0) {  // enters
        cell.c = layer().cell_states[(steps.row(s) + rarely(warp) + 8 * j) * units + rarely(unit)];
        cell.dc = value_or_zero(layer().grad_c_n, state_of(j));
        cell.dh += value_or_zero(layer().grad_h_n, state_of(j));
      }
      if (step >= 0 && step == cell.steps - 1) c_prev = value_or_zero(layer().c0, state_of(j));
      cell.dc += dc_above;
      if (plain)
        cell.prepare(cell_factors<Math>(act[0], act[1], act[2], act[3], c_prev, cell.c));
      else
        cell.prepare(cell_factors<Math>(
            act[0], act[1], act[2], act[3], c_prev, cell.c,
            layer().rules.at(layer().rules.row(walk.time(s), walk.first + rarely(warp) + 8 * j),
                             rarely(unit))));
      cell.c = c_prev;
    }

    // ---- the sums ----
    // A sequence that enters, or is not in this step, adds none: they would hand it a NaN of the
    // weights.
    if (s > 0)
      received.wait_and_add(place(s - 1), phase_of(s - 1, kSumPhase), args.limit,
                            [&](int j, float sum) {
                              const int step = step_of(cells[j], s);
                              if (step > 0 && step < cells[j].steps) cells[j].dh += sum;
                            });
    const int half = s % 2 * kLayout.dgates_bytes;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      cells[j].compute();
      cells[j].store_operands(operands_at + half + j * Product::kSlabs * kLayout.tile_bytes);
    }
    wait_async<kStages - 2>();
    __syncthreads();
    if (s + 1 < walk.length)
      product.send(dgates + half + Product::operands_at(), place(s), phase_of(s, kSumPhase));

    // ---- no other CTA waits for what follows ----
    S* const to = layer().dgates +
                  uint64_t(uint32_t(steps.row(s)) + rarely(warp)) * uint32_t(args.dgates_stride) +
                  (Received::copy() * 2 * units + rarely(unit));
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const Cell& cell = cells[j];
      const int step = step_of(cell, s);
      if (step < 0 || step >= cell.steps) continue;
      cell.store_gates(operands_at + half + j * Product::kSlabs * kLayout.tile_bytes,
                       to + j * 8 * uint32_t(args.dgates_stride), units);
      if (step < cell.steps - 1 || Received::copy() != 0) continue;
      if (layer().grad_c0) from_acc(cell.dc, layer().grad_c0[state_of(j)]);
      if (layer().dh_zoneout) layer().dh_zoneout[state_of(j)] = cell.dh_zoneout;
    }
    copy(s + kStages, stage);
    stage = stage + kLayout.stage_bytes == kStagesBytes ? 0 : stage + kLayout.stage_bytes;
    if (looks_ahead) steps.look_up(walk, s + GroupSteps::kAhead);
  }
  wait_async<0>();
}

template <class Product>
__global__ void __launch_bounds__(kGridThreads, 1)
    grid_backward_kernel(const __grid_constant__ GridBackwardArgs<typename Product::Storage> args) {
  if constexpr (FASTLSTM_SM80) grid_backward<Product>(args);
}

}  // namespace cuda
}  // namespace fastlstm

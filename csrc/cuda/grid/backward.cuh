// Backward over the grid: one cooperative launch for all steps of a layer that no cluster holds.
//
// What it computes: what the step kernel's CellStep computes (stepwise.cuh), for every step.
// Who owns what: a team of CTAs has a group of sequences and one direction, as forward. A CTA owns
// some units: their cells, and their rows of W_hh. A warp has whole sequences; a thread a unit of
// each, or with 16 units two threads the same, whose dc stays in registers.
// What moves a step: a CTA's dgates stay with it. It multiplies them by its rows of W_hh
// (backward_product.cuh) and sends the partial sums of every unit to the unit's owner, through the
// L2 cache; the owner adds those of all CTAs in a fixed order. There are no flags and no fences:
// the last bit of a word says to which step it belongs (carrier.cuh). Gates, cell states and the
// gradients from above come by asynchronous copies, three steps ahead (element by element where H
// leaves rows unaligned). What a cell needs besides the sums is computed before they arrive.
//
// Why two places for the sums, in turn, are enough. Exchange s is sent in step s and read in step
// s + 1, at place s % 2, with another phase than exchange s - 2; the memory begins as zeros.
//  * A reader infers nothing from a word about others: each is checked for itself.
//  * It cannot take s - 2 for s: the phases differ. It cannot see s - 4 or older: this very thread
//    has read s - 2 at this very address, and a thread's loads of one location never go back.
//  * (P to R, s + 2) overwrites (P to R, s) only after R has read it. P sends it behind the barrier
//    of its step s + 2, at which its warps arrived after their loads of exchange s + 1 had returned
//    and been checked, R's among them. R sent those behind the barrier of its step s + 1, at which
//    all its warps arrived after their loads of exchange s had returned and been checked. The chain
//    is made of data dependencies and CTA barriers; it holds for every pair, since each CTA sends
//    to each, itself included.
//  * A wait ends for any value. The bit leaves a NaN a NaN, and may make one of an infinity.
// dgates, two places: those of step s are written before its barrier, and were last read in step
// s - 2, before that of s - 1. What is copied: stage s is read before the barrier of step s, and
// filled again behind it.
// Floor: docs/kernels.md.
#pragma once

#include "backward_product.cuh"
#include "rules.h"
#include "walk.cuh"

namespace fastlstm {
namespace cuda {

template <class S>
struct GridGradient {  // one direction of a layer
  typedef Acc<S> T;
  const uint4* fragments;     // of all CTAs (GridTransposeArgs)
  const S* output;            // gradient of the output, this direction's columns; or null
  const T* upper_input;       // gradient of the upper layer's input, likewise
  const S *h_n, *c_n, *c0;    // (B, H) or null
  const S* gates;             // (rows, 4H)
  const T *cells, *of_cells;  // (rows, H); the gradients of all cells may be null
  S *dgates, *grad_c0;
  T* dh_stays;  // (B, H), what zoneout hands to the h before the first step; or null
  DrawnRules<T> rules;
};

template <class S>
struct GridGradientArgs {
  GridGradient<S> cell[2];
  unsigned char* exchange;  // (teams of the launch, CTAs, 2, received_bytes), zeroed
  int groups, first_team;   // as GridForwardArgs
  GridBackwardTeam team;
  int steps, batch, units;
  const int* starts;
  int64_t output_wide, dgates_wide;
  bool aligned;  // rows of H elements, to 16 bytes
  uint64_t limit;
};

// The cell's backward pass is linear: its results for dh = 1 and for dc = 1.
struct CellSlopes {
  CellBackward<float> of_h, of_c;
};
template <class Rules>
__device__ __forceinline__ CellSlopes cell_slopes(const float (&gates)[4], float c_prev, float c,
                                                  const Rules& rules) {
  return {
      cell_backward<FastMath>(gates[0], gates[1], gates[2], gates[3], c_prev, c, 1.0f, 0.0f, rules),
      cell_backward<FastMath>(gates[0], gates[1], gates[2], gates[3], c_prev, c, 0.0f, 1.0f,
                              rules)};
}

// One of a unit's dgates, as the product takes it.
template <class S>
__device__ __forceinline__ void put_gate(unsigned char* unit, int gate, float value) {
  if constexpr (sizeof(S) == 4)
    reinterpret_cast<uint32_t*>(unit)[gate] = round_tf32(bits_of(value));
  else
    from_acc(value, reinterpret_cast<S*>(unit)[gate]);
}

template <class S, int kShape>
__device__ __forceinline__ void grid_backward(const GridGradientArgs<S>& args) {
  typedef Acc<S> T;
  typedef GridBackwardProduct<S, kShape> Product;
  typedef ReceivedSums<Product> Received;
  constexpr GridBackwardShape kGrid = Product::kGrid;
  constexpr BackwardLayout kLayout = Product::kLayout;
  constexpr int kTiles = kGrid.tiles, kUnits = kGrid.units, kStages = kGrid.stages;
  FASTLSTM_SHARED_BUFFER(shared);
  const int slot = blockIdx.x % args.team.ctas, local_team = blockIdx.x / args.team.ctas;
  const int team = args.first_team + local_team;
  const int direction = team / args.groups;
  const GroupWalk walk(args.starts, args.steps, args.batch, team % args.groups * kGrid.sequences(),
                       kGrid.sequences(), 1 - direction);
  // Read where they are used: kept in registers, they would leave too few for weights.
  auto cell = [&]() -> const GridGradient<S>& {
    uint32_t d = direction;
    pin(d);
    return args.cell[d];
  };

  unsigned char* const dgates =
      shared + backward_shared_blocks(kGrid, args.team.blocks, sizeof(S)) * kGridWarps * 2048;
  unsigned char* const stages = dgates + 2 * kLayout.dgates_bytes;
  const GroupSteps steps(stages + kStages * kLayout.stage_bytes);
  const bool finder = threadIdx.x == kGridThreads - 1;
  if (finder) steps.begin(walk);
  const Product product(cell().fragments + int64_t(slot) * args.team.blocks * Product::kSlabs * 128,
                        shared, args.team.blocks, slot);
  const Received received(args.team.blocks);
  const int warp = warp_of_thread();
  auto unit_of_thread = [&] { return slot * kUnits + Received::unit(); };
  const int units = args.units;
  __syncthreads();

  // ---- what comes from global memory: 16 bytes a copy ----
  constexpr int kState = kUnits * 4;  // bytes of a sequence's states
  auto copy = [&](int s) {
    constexpr int kPieces = kLayout.row_bytes / 16, kGatePieces = kUnits * int(sizeof(S)) / 16;
    constexpr int kStatePieces = kState / 16;
    const int me = thread_again();
    for (int x = me; x < kPieces * kGrid.sequences(); x += kGridThreads) {
      const int n = x / kPieces, piece = x % kPieces;
      const void* from = cell().gates;
      bool there = n < steps.active(s);
      int unit = 0;
      if (piece < 4 * kGatePieces) {
        unit = slot * kUnits + piece % kGatePieces * (16 / int(sizeof(S)));
        from = cell().gates + ((steps.row(s) + n) * 4 + piece / kGatePieces) * units + unit;
      } else {
        const int what = (piece - 4 * kGatePieces) / kStatePieces;
        const int at = (piece - 4 * kGatePieces) % kStatePieces;
        unit = slot * kUnits + at * 4;
        if (what == 0) {
          there = n < steps.active(s + 1);
          from = cell().cells + (steps.row(s + 1) + n) * units + unit;
        } else if (what == 2) {
          there = there && cell().of_cells;
          from = cell().of_cells + (steps.row(s) + n) * units + unit;
        } else if (cell().upper_input) {
          from = cell().upper_input + (steps.row(s) + n) * args.output_wide + unit;
        } else {
          constexpr int kElements = 16 / int(sizeof(S));
          there = there && cell().output && at * kElements < kUnits;
          unit = slot * kUnits + at * kElements;
          from = cell().output + (steps.row(s) + n) * args.output_wide + unit;
        }
      }
      there = there && unit < units;
      copy_async(stages + s % kStages * kLayout.stage_bytes + n * kLayout.row_bytes + piece * 16,
                 there ? from : cell().gates, there ? 16 : 0);
    }
  };
  auto copy_if_aligned = [&](int s) {
    if (args.aligned) copy(s);
    commit_async();
  };
  for (int s = 0; s < kStages; ++s) copy_if_aligned(s);

  T c[kTiles] = {}, dc[kTiles] = {}, stays[kTiles] = {};
  // What this CTA receives, and where what it sends goes, of exchange s.
  auto place = [&](int s) {
    uint32_t j = local_team;
    pin(j);
    return args.exchange + (int64_t(j) * args.team.ctas * 2 + s % 2) * args.team.received_bytes;
  };
  wait_async<0>();
  __syncthreads();

  for (int s = 0; s < walk.length; ++s) {
    // ---- what does not depend on other CTAs ----
    float dh[kTiles];
    CellSlopes slopes[kTiles];
    const bool plain = cell().rules.plain;
    const int active = steps.active(s);
    // A sequence that enters, or is not in this step, takes nothing: not even a NaN of weights.
    const int taking = s == 0 ? 0 : least_of(steps.active(s - 1), active);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int n = warp + 8 * j, local = Received::unit(), unit = slot * kUnits + local;
      const bool inside = n < active && unit < units;
      const int64_t own = int64_t(walk.first + n) * units + unit, row = steps.row(s) + n;
      const bool goes_on = n < steps.active(s + 1);
      float gates[4] = {0, 0, 0, 0}, c_prev = 0, of_cells = 0;
      dh[j] = 0;
      if (inside && args.aligned) {
        const unsigned char* from =
            stages + s % kStages * kLayout.stage_bytes + n * kLayout.row_bytes;
#pragma unroll
        for (int q = 0; q < 4; ++q)
          gates[q] = to_acc(reinterpret_cast<const S*>(from)[q * kUnits + local]);
        const float* states = reinterpret_cast<const float*>(from + kLayout.gate_bytes) + local;
        c_prev = states[0];
        of_cells = states[2 * kUnits];
        if (cell().upper_input)
          dh[j] = states[kUnits];
        else
          dh[j] = to_acc(reinterpret_cast<const S*>(from + kLayout.gate_bytes + kState)[local]);
      } else if (inside) {
#pragma unroll
        for (int q = 0; q < 4; ++q) gates[q] = to_acc(cell().gates[(row * 4 + q) * units + unit]);
        if (goes_on) c_prev = cell().cells[(steps.row(s + 1) + n) * units + unit];
        of_cells = value_or_zero(cell().of_cells, row * units + unit);
        dh[j] = cell().upper_input ? cell().upper_input[row * args.output_wide + unit]
                                   : value_or_zero(cell().output, row * args.output_wide + unit);
      }
      if (inside && !goes_on) c_prev = value_or_zero(cell().c0, own);
      if (inside && (s == 0 || n >= steps.active(s - 1))) {  // enters
        c[j] = cell().cells[row * units + unit];
        dc[j] = value_or_zero(cell().c_n, own);
        dh[j] += value_or_zero(cell().h_n, own);
      }
      dc[j] += of_cells;
      dh[j] += stays[j];
      if (plain)
        slopes[j] = cell_slopes(gates, c_prev, c[j], PlainCell());
      else
        slopes[j] =
            cell_slopes(gates, c_prev, c[j],
                        cell().rules.at(cell().rules.row(walk.at(s), walk.first + n), unit));
      c[j] = c_prev;
      CellBackward<float>&of_h = slopes[j].of_h, &of_c = slopes[j].of_c;
      pin(of_h.a_i), pin(of_h.a_f), pin(of_h.a_g), pin(of_h.a_o), pin(of_h.c_prev);
      pin(of_c.a_i), pin(of_c.a_f), pin(of_c.a_g), pin(of_c.c_prev), pin(dh[j]);
    }

    // ---- the sums ----
    float sums[kTiles] = {};
    if (s > 0)
      received.add_to(
          sums,
          place(s - 1) + slot * 2 * args.team.received_bytes + warp * (args.team.blocks * 32 * 4),
          phase_of(s - 1, kSumPhase), args.limit);

    float d[kTiles][4];
    unsigned char* const operands = dgates + s % 2 * kLayout.dgates_bytes;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int n = warp + 8 * j, local = Received::unit();
      const CellBackward<float>&of_h = slopes[j].of_h, &of_c = slopes[j].of_c;
      if (n < taking) dh[j] += sums[j];
      d[j][0] = dh[j] * of_h.a_i + dc[j] * of_c.a_i;
      d[j][1] = dh[j] * of_h.a_f + dc[j] * of_c.a_f;
      d[j][2] = dh[j] * of_h.a_g + dc[j] * of_c.a_g;
      d[j][3] = dh[j] * of_h.a_o;
      dc[j] = dh[j] * of_h.c_prev + dc[j] * of_c.c_prev;
      stays[j] = plain ? 0.0f : dh[j] * of_h.h_prev;
      if (n >= active || slot * kUnits + local >= units)
        d[j][0] = d[j][1] = d[j][2] = d[j][3] = dc[j] = stays[j] = 0;
      // Where the unit's operands are: 16 bytes of a lane are those of one float unit or of two.
      constexpr int kSlabUnits = kUnits / Product::kSlabs;
      unsigned char* to = operands +
                          (j * Product::kSlabs + local / kSlabUnits) * kLayout.tile_bytes +
                          (warp * 4 + local % 4) * 16 + local % kSlabUnits / 4 * 8;
#pragma unroll
      for (int q = 0; q < 4; ++q)
        if (Received::kCopies == 1 || q / 2 == Received::copy()) put_gate<S>(to, q, d[j][q]);
    }
    wait_async<kStages - 2>();
    __syncthreads();
    if (s + 1 < walk.length)
      product.send(operands, place(s) + slot * kUnits * 4, 2 * args.team.received_bytes,
                   phase_of(s, kSumPhase));

    // ---- nothing below is waited for by others ----
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int n = warp + 8 * j, unit = unit_of_thread();
      if (n >= steps.active(s) || unit >= units) continue;
      S* to = cell().dgates + (steps.row(s) + n) * args.dgates_wide + unit;
#pragma unroll
      for (int q = 0; q < 4; ++q)
        if (Received::kCopies == 1 || q / 2 == Received::copy()) from_acc(d[j][q], to[q * units]);
      if (n < steps.active(s + 1) || Received::copy() != 0) continue;
      const int64_t own = int64_t(walk.first + n) * units + unit;
      if (cell().grad_c0) from_acc(dc[j], cell().grad_c0[own]);
      if (cell().dh_stays) cell().dh_stays[own] = stays[j];
    }
    copy_if_aligned(s + kStages);
    if (finder) steps.find(walk, s + GroupSteps::kAhead);
  }
  wait_async<0>();
}

template <class S, int kShape>
__global__ void __launch_bounds__(kGridThreads, 1)
    grid_backward_kernel(const __grid_constant__ GridGradientArgs<S> args) {
  if constexpr (FASTLSTM_SM80) grid_backward<S, kShape>(args);
}

}  // namespace cuda
}  // namespace fastlstm

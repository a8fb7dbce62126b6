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
// incoming gradients come by asynchronous copies, three steps ahead (element by element where rows
// of H elements are not aligned). What a cell needs besides the sums is computed before they
// arrive.
//
// Why two places for the sums, in turn, are enough. Exchange s is sent in step s and read in step
// s + 1, at place s % 2, with another phase than exchange s - 2. The memory begins as zeros.
//  * A reader infers nothing from one word about another: it checks each by itself.
//  * It cannot take exchange s - 2 for s: their phases differ. It cannot see s - 4 or older: the
//  same
//    thread has read s - 2 at the same address, and loads of one location by one thread never go
//    back in time.
//  * What producer P sends to reader R in exchange s + 2 overwrites what it sent in exchange s only
//    after R has read that. P sends it behind the barrier of its step s + 2, at which its warps
//    arrived after their loads of exchange s + 1, R's part among them, had returned and been
//    checked. R sent that part behind the barrier of its step s + 1, at which all its warps arrived
//    after their loads of exchange s had returned and been checked. The chain consists of data
//    dependencies and CTA barriers. It holds for every pair, since each CTA sends to each, itself
//    included.
//  * A wait ends for any value. The phase bit leaves a NaN a NaN, and may make one of an infinity.
// dgates, two buffers: those of step s are written before its barrier, and were last read in step
// s - 2, before the barrier of step s - 1. Stages: that of step s is read before the barrier of
// step s, and refilled after it. Floor: docs/kernels.md.
#pragma once

#include "backward_product.cuh"
#include "rules.h"
#include "walk.cuh"

namespace fastlstm {
namespace cuda {

template <class S>
struct GridBackwardDirection {  // one direction of a layer
  typedef Acc<S> T;
  const uint4* fragments;             // of all CTAs (GridTransposeArgs)
  const S* grad_output;               // gradient of the output, this direction's columns; or null
  const T* upper_input;               // gradient of the upper layer's input, likewise
  const S *grad_h_n, *grad_c_n, *c0;  // (B, H) or null
  const S* gates;                     // (rows, 4H)
  const T *cell_states, *grad_cell_states;  // (rows, H); the gradients of all cells may be null
  S *dgates, *grad_c0;
  T* dh_zoneout;  // (B, H), the share of dh that zoneout passes to h0; or null
  DrawnRules<T> rules;
};

template <class S>
struct GridBackwardArgs {
  GridBackwardDirection<S> direction[2];
  unsigned char* exchange;  // (teams of the launch, CTAs, 2, received_bytes), zeroed
  int groups, first_team;   // as GridForwardArgs
  GridBackwardTeam team;
  StepRows steps;
  int units;  // H
  int64_t output_stride, dgates_stride;
  bool aligned;  // rows of H elements, to 16 bytes
  uint64_t limit;
};

// cell_backward is linear in dh and dc: its results for dh = 1 and for dc = 1.
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

// Stores one of a unit's dgates as the product reads it: for tf32 rounded.
template <class S>
__device__ __forceinline__ void put_gate(unsigned char* unit, int gate, float value) {
  if constexpr (sizeof(S) == 4)
    reinterpret_cast<uint32_t*>(unit)[gate] = round_tf32(bits_of(value));
  else
    from_acc(value, reinterpret_cast<S*>(unit)[gate]);
}

template <class S, int kShape>
__device__ __forceinline__ void grid_backward(const GridBackwardArgs<S>& args) {
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
  const GroupWalk walk(args.steps, team % args.groups * kGrid.sequences(), kGrid.sequences(),
                       1 - direction);
  // The direction's arguments are loaded where they are used: in registers from step to step, they
  // would leave too few for weights.
  auto layer = [&]() -> const GridBackwardDirection<S>& {
    uint32_t d = direction;
    pin(d);
    return args.direction[d];
  };

  unsigned char* const dgates =
      shared +
      backward_shared_blocks(kGrid, args.team.blocks, sizeof(S)) * kGridWarps * kGridBlockBytes;
  unsigned char* const stages = dgates + 2 * kLayout.dgates_bytes;
  const GroupSteps steps(stages + kStages * kLayout.stage_bytes);
  const bool looks_ahead = threadIdx.x == kGridThreads - 1;
  if (looks_ahead) steps.begin(walk);
  const Product product(
      layer().fragments + int64_t(slot) * args.team.blocks * Product::kSlabs * kGridBlockFragments,
      shared, args.team.blocks, slot);
  const Received received(args.team.blocks);
  const int warp = warp_of_thread();
  auto unit_of_thread = [&] { return slot * kUnits + Received::unit(); };
  const int units = args.units;
  __syncthreads();

  // ---- what comes from global memory: copies of 16 bytes ----
  constexpr int kState = kUnits * 4;  // bytes of a sequence's states
  auto copy = [&](int s) {
    constexpr int kPieces = kLayout.row_bytes / 16, kGatePieces = kUnits * int(sizeof(S)) / 16;
    constexpr int kStatePieces = kState / 16;
    const int me = recomputed_thread();
    for (int x = me; x < kPieces * kGrid.sequences(); x += kGridThreads) {
      const int n = x / kPieces, piece = x % kPieces;
      const void* from = layer().gates;
      bool exists = n < steps.active(s);
      int unit = 0;
      if (piece < 4 * kGatePieces) {
        unit = slot * kUnits + piece % kGatePieces * (16 / int(sizeof(S)));
        from = layer().gates + ((steps.row(s) + n) * 4 + piece / kGatePieces) * units + unit;
      } else {
        // In the order of BackwardLayout: the second is the gradient of the output.
        constexpr int kPreviousCellState = 0, kGradCellState = 2;
        const int kind = (piece - 4 * kGatePieces) / kStatePieces;
        const int at = (piece - 4 * kGatePieces) % kStatePieces;
        unit = slot * kUnits + at * 4;
        if (kind == kPreviousCellState) {
          exists = n < steps.active(s + 1);
          from = layer().cell_states + (steps.row(s + 1) + n) * units + unit;
        } else if (kind == kGradCellState) {
          exists = exists && layer().grad_cell_states;
          from = layer().grad_cell_states + (steps.row(s) + n) * units + unit;
        } else if (layer().upper_input) {
          from = layer().upper_input + (steps.row(s) + n) * args.output_stride + unit;
        } else {
          constexpr int kElements = 16 / int(sizeof(S));
          exists = exists && layer().grad_output && at * kElements < kUnits;
          unit = slot * kUnits + at * kElements;
          from = layer().grad_output + (steps.row(s) + n) * args.output_stride + unit;
        }
      }
      exists = exists && unit < units;
      copy_async(stages + s % kStages * kLayout.stage_bytes + n * kLayout.row_bytes + piece * 16,
                 exists ? from : layer().gates, exists ? 16 : 0);
    }
  };
  auto copy_if_aligned = [&](int s) {
    if (args.aligned) copy(s);
    commit_async();
  };
  for (int s = 0; s < kStages; ++s) copy_if_aligned(s);

  T c[kTiles] = {}, dc[kTiles] = {}, dh_zoneout[kTiles] = {};
  // The place of exchange s.
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
    const bool plain = layer().rules.plain;
    const int active = steps.active(s);
    // A sequence that enters, or is not in this step, adds no sums: they would hand it a NaN of the
    // weights.
    const int receiving = s == 0 ? 0 : least_of(steps.active(s - 1), active);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int n = warp + 8 * j, local = Received::unit(), unit = slot * kUnits + local;
      const bool inside = n < active && unit < units;
      const int64_t state = int64_t(walk.first + n) * units + unit, row = steps.row(s) + n;
      const bool continues = n < steps.active(s + 1);
      float gates[4] = {0, 0, 0, 0}, c_prev = 0, grad_cell_states = 0;
      dh[j] = 0;
      if (inside && args.aligned) {
        const unsigned char* from =
            stages + s % kStages * kLayout.stage_bytes + n * kLayout.row_bytes;
#pragma unroll
        for (int q = 0; q < 4; ++q)
          gates[q] = to_acc(reinterpret_cast<const S*>(from)[q * kUnits + local]);
        const float* floats = reinterpret_cast<const float*>(from + kLayout.gate_bytes) + local;
        c_prev = floats[0];
        grad_cell_states = floats[2 * kUnits];
        if (layer().upper_input)
          dh[j] = floats[kUnits];
        else
          dh[j] = to_acc(reinterpret_cast<const S*>(from + kLayout.gate_bytes + kState)[local]);
      } else if (inside) {
#pragma unroll
        for (int q = 0; q < 4; ++q) gates[q] = to_acc(layer().gates[(row * 4 + q) * units + unit]);
        if (continues) c_prev = layer().cell_states[(steps.row(s + 1) + n) * units + unit];
        grad_cell_states = value_or_zero(layer().grad_cell_states, row * units + unit);
        dh[j] = layer().upper_input
                    ? layer().upper_input[row * args.output_stride + unit]
                    : value_or_zero(layer().grad_output, row * args.output_stride + unit);
      }
      if (inside && !continues) c_prev = value_or_zero(layer().c0, state);
      if (inside && (s == 0 || n >= steps.active(s - 1))) {  // enters
        c[j] = layer().cell_states[row * units + unit];
        dc[j] = value_or_zero(layer().grad_c_n, state);
        dh[j] += value_or_zero(layer().grad_h_n, state);
      }
      dc[j] += grad_cell_states;
      dh[j] += dh_zoneout[j];
      if (plain)
        slopes[j] = cell_slopes(gates, c_prev, c[j], PlainCell());
      else
        slopes[j] =
            cell_slopes(gates, c_prev, c[j],
                        layer().rules.at(layer().rules.row(walk.time(s), walk.first + n), unit));
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
      if (n < receiving) dh[j] += sums[j];
      d[j][0] = dh[j] * of_h.a_i + dc[j] * of_c.a_i;
      d[j][1] = dh[j] * of_h.a_f + dc[j] * of_c.a_f;
      d[j][2] = dh[j] * of_h.a_g + dc[j] * of_c.a_g;
      d[j][3] = dh[j] * of_h.a_o;
      dc[j] = dh[j] * of_h.c_prev + dc[j] * of_c.c_prev;
      dh_zoneout[j] = plain ? 0.0f : dh[j] * of_h.h_prev;
      if (n >= active || slot * kUnits + local >= units)
        d[j][0] = d[j][1] = d[j][2] = d[j][3] = dc[j] = dh_zoneout[j] = 0;
      // The place of the unit's dgates among the operands: a lane's 16 bytes are those of one unit
      // of a float type, or of two units of a half type.
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

    // ---- no other CTA waits for what follows ----
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int n = warp + 8 * j, unit = unit_of_thread();
      if (n >= steps.active(s) || unit >= units) continue;
      S* to = layer().dgates + (steps.row(s) + n) * args.dgates_stride + unit;
#pragma unroll
      for (int q = 0; q < 4; ++q)
        if (Received::kCopies == 1 || q / 2 == Received::copy()) from_acc(d[j][q], to[q * units]);
      if (n < steps.active(s + 1) || Received::copy() != 0) continue;
      const int64_t state = int64_t(walk.first + n) * units + unit;
      if (layer().grad_c0) from_acc(dc[j], layer().grad_c0[state]);
      if (layer().dh_zoneout) layer().dh_zoneout[state] = dh_zoneout[j];
    }
    copy_if_aligned(s + kStages);
    if (looks_ahead) steps.look_up(walk, s + GroupSteps::kAhead);
  }
  wait_async<0>();
}

template <class S, int kShape>
__global__ void __launch_bounds__(kGridThreads, 1)
    grid_backward_kernel(const __grid_constant__ GridBackwardArgs<S> args) {
  if constexpr (FASTLSTM_SM80) grid_backward<S, kShape>(args);
}

}  // namespace cuda
}  // namespace fastlstm

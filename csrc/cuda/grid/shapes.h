// The shapes of the grid kernels, by which the planner counts what fits a GPU.
//
// A team of CTAs runs one direction of a layer for a group of sequences. Each CTA owns some units:
// their cells, and the rows of W_hh of their gates, in registers and shared memory for the whole
// sequence.
#pragma once

#include <cstdint>

#include "cell.h"

namespace fastlstm {
namespace cuda {

constexpr int kGridWarps = 8, kGridThreads = 32 * kGridWarps;
// K goes to the tensor cores in slabs of 64 bytes: two k-steps of an mma.
constexpr int kGridSlabBytes = 64;

// `units` of a CTA for 8 * `tiles` sequences; most `slabs` of a warp, which takes every eighth of
// K's; `held` blocks of weights (8 units with their gates x a slab) stay in a warp's registers, the
// others in shared memory; the input's part is there in `stages`: one is read, others are filled.
struct GridShape {
  int units, tiles, slabs, held, stages;

  FASTLSTM_INLINE constexpr int blocks() const { return units / 8; }
  FASTLSTM_INLINE constexpr int sequences() const { return 8 * tiles; }
};

constexpr int kGridForwardCount = 4;
constexpr GridShape kGridForward[kGridForwardCount] = {
    {16, 1, 8, 8, 3}, {16, 2, 8, 8, 3}, {32, 2, 4, 5, 2}, {16, 4, 8, 5, 2}};

FASTLSTM_INLINE constexpr int least_of(int a, int b) { return a < b ? a : b; }
FASTLSTM_INLINE constexpr int most_of(int a, int b) { return a > b ? a : b; }
FASTLSTM_INLINE constexpr int parts_of(int64_t n, int64_t size) {
  return int((n + size - 1) / size);
}

// What a forward team is made of. A slab whose units belong to several CTAs has all of them.
struct GridTeam {
  int ctas, slabs;     // slabs of all warps
  int64_t slot_bytes;  // h of one step
};
FASTLSTM_INLINE constexpr GridTeam forward_team(GridShape s, int64_t hidden_size, int64_t bytes) {
  const int slab_units = int(kGridSlabBytes / bytes);
  const int together = most_of(1, slab_units / s.units);
  const int ctas = parts_of(hidden_size, s.units * together) * together;
  const int64_t row = ctas * s.units * bytes;
  return {ctas, int(row / kGridSlabBytes), row * s.sequences()};
}

// Shared memory of a forward CTA, in this order: weights, partial sums, the input's part, biases,
// h, steps.
struct ForwardLayout {
  // A thread owns `cells` cells of neighbouring sequences; `owners` warps do.
  int cells, owners;
  // The partial sums of one cell of each owner at a time go through one of so many buffers.
  int buffers;
  int row_floats;  // of the input's part; a row is padded so that reads meet no conflict
  int partial_bytes, stage_bytes;
};
FASTLSTM_INLINE constexpr ForwardLayout forward_layout(GridShape s) {
  const int columns = s.blocks() * s.tiles * 2;
  const int cells = most_of(1, columns / kGridWarps), owners = columns / cells;
  const int row = 4 * s.units + 4;
  return {cells,
          owners,
          s.slabs * s.blocks() - s.held > 9 ? 1 : 2,
          row,
          owners * (kGridWarps - 1) * 512,
          s.sequences() * row * 4};
}
FASTLSTM_INLINE constexpr int blocks_shared(GridShape s, int slabs) {
  return most_of(0, parts_of(slabs, kGridWarps) * s.blocks() - s.held);
}
FASTLSTM_INLINE constexpr int64_t forward_shared(GridShape s, int slabs) {
  const ForwardLayout x = forward_layout(s);
  return int64_t(blocks_shared(s, slabs)) * kGridWarps * 2048 + x.buffers * x.partial_bytes +
         s.stages * x.stage_bytes + 16 * s.units + x.cells * kGridThreads * 4 + 128;
}

// ---- backward ----

// A CTA multiplies its 4 * `units` rows of W_hh, transposed, by their dgates: `blocks` of 32 units
// of the result to a warp at most (for a half type; half as many for floats).
struct GridBackwardShape {
  int units, tiles, blocks, held, stages;

  FASTLSTM_INLINE constexpr int sequences() const { return 8 * tiles; }
  FASTLSTM_INLINE constexpr int slabs(int bytes) const {
    return units * 4 * bytes / kGridSlabBytes;
  }
  FASTLSTM_INLINE constexpr int most_blocks(int bytes) const { return blocks * 2 / bytes; }
};

constexpr int kGridBackwardCount = 3;
constexpr GridBackwardShape kGridBackward[kGridBackwardCount] = {
    {16, 1, 8, 8, 3}, {16, 2, 8, 7, 3}, {32, 2, 4, 8, 3}};

// CTAs of a team: whole blocks of 32 units. What one receives in a step: sums of its units for each
// sequence from every CTA.
struct GridBackwardTeam {
  int ctas, blocks;  // blocks of all warps
  int64_t received_bytes;
};
FASTLSTM_INLINE constexpr GridBackwardTeam backward_team(GridBackwardShape s, int64_t hidden_size) {
  const int blocks = parts_of(hidden_size, 32);
  return {blocks * 32 / s.units, blocks, int64_t(blocks) * 32 * s.sequences() * 4};
}

// Shared memory of a backward CTA, in this order: weights, two places of dgates, what comes from
// global memory, steps.
struct BackwardLayout {
  int tile_bytes;  // dgates of 8 sequences in a slab, padded so that stores meet fewer conflicts
  int dgates_bytes;
  // Of a sequence: gates, then c before the step, the gradient from above and that of c.
  int gate_bytes, row_bytes, stage_bytes;
};
FASTLSTM_INLINE constexpr BackwardLayout backward_layout(GridBackwardShape s, int bytes) {
  const int tile = 512 + 64, gates = 4 * s.units * bytes, row = gates + 3 * s.units * 4;
  return {tile, s.tiles * s.slabs(bytes) * tile, gates, row, row * s.sequences()};
}
FASTLSTM_INLINE constexpr int backward_shared_blocks(GridBackwardShape s, int blocks, int bytes) {
  return most_of(0, parts_of(blocks, kGridWarps) * s.slabs(bytes) - s.held);
}
FASTLSTM_INLINE constexpr int64_t backward_shared(GridBackwardShape s, int blocks, int bytes) {
  const BackwardLayout x = backward_layout(s, bytes);
  return int64_t(backward_shared_blocks(s, blocks, bytes)) * kGridWarps * 2048 +
         2 * x.dgates_bytes + s.stages * x.stage_bytes + 128;
}

}  // namespace cuda
}  // namespace fastlstm

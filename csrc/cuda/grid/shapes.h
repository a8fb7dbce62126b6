// The shapes of the grid kernels. The planner reads here what fits a GPU.
//
// A team of CTAs runs one direction of a layer for a group of sequences. Each CTA owns some units:
// their cells, and the rows of W_hh of their gates, which stay in its registers and shared memory
// for the whole sequence.
#pragma once

#include <cstdint>

#include "cell.h"

namespace fastlstm {
namespace cuda {

constexpr int kGridWarps = 8, kGridThreads = 32 * kGridWarps;
// K goes to the tensor cores in slabs of 64 bytes: two k-steps of an mma.
constexpr int kGridSlabBytes = 64;
// A block of weights: 32 rows of a slab, as fragments of 16 bytes.
constexpr int kGridBlockBytes = 32 * kGridSlabBytes, kGridBlockFragments = kGridBlockBytes / 16;
// The rows of the steps around the one that runs (walk.cuh).
constexpr int kGridStepsBytes = 128;

// Forward: `units` of a CTA and 8 * `tiles` sequences of a group. A warp has every eighth slab of
// K, at most `slabs` of them. Of its blocks of weights (the gates of 8 units), `register_blocks`
// stay in registers and the others in shared memory. The input part is loaded `stages` steps ahead,
// into as many buffers. Multiply-adds read h from shared memory, where a warp has `staged_slabs`
// slabs of it.
struct GridShape {
  int units, tiles, slabs, register_blocks, stages, staged_slabs;

  FASTLSTM_INLINE constexpr int blocks() const { return units / 8; }
  FASTLSTM_INLINE constexpr int sequences() const { return 8 * tiles; }
};

constexpr int kGridForwardCount = 4;
constexpr GridShape kGridForward[kGridForwardCount] = {
    {16, 1, 8, 8, 2, 0}, {16, 2, 8, 8, 2, 0}, {32, 2, 4, 6, 1, 0}, {16, 4, 8, 6, 1, 0}};
// fp32 without tf32: beside the sums of multiply-adds registers hold fewer weights.
constexpr int kGridFp32Count = 2;
constexpr GridShape kGridForwardFp32[kGridFp32Count] = {{16, 1, 8, 6, 2, 2}, {16, 2, 8, 5, 2, 2}};

// The shapes of a type: fp32 is by multiply-adds, all others by tensor cores.
constexpr int forward_shape_count(bool fp32) { return fp32 ? kGridFp32Count : kGridForwardCount; }
constexpr GridShape forward_shape(int index, bool fp32) {
  return fp32 ? kGridForwardFp32[index] : kGridForward[index];
}

FASTLSTM_INLINE constexpr int least_of(int a, int b) { return a < b ? a : b; }
FASTLSTM_INLINE constexpr int most_of(int a, int b) { return a > b ? a : b; }
FASTLSTM_INLINE constexpr int parts_of(int64_t n, int64_t size) {
  return int((n + size - 1) / size);
}

// A forward team for a layer. Where a slab has the units of several CTAs, the team has all of
// those.
struct GridTeam {
  int ctas, slabs;     // slabs of K, over all warps of a CTA
  int64_t slot_bytes;  // h of one step
};
FASTLSTM_INLINE constexpr GridTeam forward_team(GridShape s, int64_t hidden_size, int64_t bytes) {
  const int slab_units = int(kGridSlabBytes / bytes);
  const int together = most_of(1, slab_units / s.units);
  const int ctas = parts_of(hidden_size, s.units * together) * together;
  const int64_t row = ctas * s.units * bytes;
  return {ctas, int(row / kGridSlabBytes), row * s.sequences()};
}

// The shared memory of a forward CTA has, in this order: weights, staged slabs of h, partial sums,
// the input part, biases, states of cells, steps.
struct ForwardLayout {
  // A thread owns `cells` cells of neighbouring sequences; `owners` warps do.
  int cells, owners;
  int parts;  // of a cell's sums in shared memory: of all warps or, to save memory, all but its
              // owner
  int row_floats;  // of the input part; rows are padded against bank conflicts
  int partial_bytes, stage_bytes;
};
FASTLSTM_INLINE constexpr ForwardLayout forward_layout(GridShape s) {
  const int columns = s.blocks() * s.tiles * 2;
  const int cells = most_of(1, columns / kGridWarps), owners = columns / cells;
  const int row = 4 * s.units + 4, parts = columns <= 8 ? kGridWarps : kGridWarps - 1;
  return {cells, owners, parts, row, columns * parts * 512, s.sequences() * row * 4};
}
FASTLSTM_INLINE constexpr int blocks_shared(GridShape s, int slabs) {
  return most_of(0, parts_of(slabs, kGridWarps) * s.blocks() - s.register_blocks);
}
FASTLSTM_INLINE constexpr int weights_shared(GridShape s, int slabs) {
  return blocks_shared(s, slabs) * kGridWarps * kGridBlockBytes;
}
FASTLSTM_INLINE constexpr int staged_shared(GridShape s) {
  return s.staged_slabs * kGridWarps * 8 * kGridSlabBytes;
}
FASTLSTM_INLINE constexpr int64_t forward_shared(GridShape s, int slabs) {
  const ForwardLayout x = forward_layout(s);
  return int64_t(weights_shared(s, slabs)) + staged_shared(s) + x.partial_bytes +
         s.stages * x.stage_bytes + 16 * s.units + x.cells * kGridThreads * 4 + kGridStepsBytes;
}

// ---- backward ----

// A CTA multiplies its 4 * `units` rows of W_hh, transposed, by their dgates. A warp computes at
// most `blocks` blocks of 32 units of the result (for a half type; half as many for floats).
struct GridBackwardShape {
  int units, tiles, blocks, register_blocks, stages;

  FASTLSTM_INLINE constexpr int sequences() const { return 8 * tiles; }
  FASTLSTM_INLINE constexpr int slabs(int bytes) const {
    return units * 4 * bytes / kGridSlabBytes;
  }
  FASTLSTM_INLINE constexpr int most_blocks(int bytes) const { return blocks * 2 / bytes; }
  // Of a warp's parts of weights, how many stay in registers. With 12 parts the compiler needs the
  // registers of one for itself.
  FASTLSTM_INLINE constexpr int held(int warp_blocks, int bytes) const {
    const int parts = warp_blocks * slabs(bytes);
    return least_of(parts, parts == 12 ? register_blocks - 1 : register_blocks);
  }
};

constexpr int kGridBackwardCount = 3;
constexpr GridBackwardShape kGridBackward[kGridBackwardCount] = {
    {16, 1, 8, 8, 3}, {16, 2, 8, 7, 3}, {32, 2, 4, 8, 3}};
constexpr GridBackwardShape kGridBackwardFp32[kGridFp32Count] = {{16, 1, 8, 5, 3},
                                                                 {16, 2, 8, 5, 3}};
constexpr int backward_shape_count(bool fp32) { return fp32 ? kGridFp32Count : kGridBackwardCount; }
constexpr GridBackwardShape backward_shape(int index, bool fp32) {
  return fp32 ? kGridBackwardFp32[index] : kGridBackward[index];
}

// A kernel is compiled for the number of blocks that a warp computes, which makes every address of
// a step a register and a constant. The least of these that holds the layer runs it; blocks beyond
// the layer are computed from zeros and not sent.
constexpr int kGridBlockCounts = 6;
constexpr int kGridBlocks[kGridBlockCounts] = {1, 2, 3, 4, 6, 8};
// Its number among these.
constexpr int block_choice(int blocks) {
  int j = 0;
  while (j < kGridBlockCounts && kGridBlocks[j] < parts_of(blocks, kGridWarps)) ++j;
  return j;
}

// What a CTA receives in a step: for each sequence a row of sums, by their sources and then by
// units, as long as the kernel's blocks.
FASTLSTM_INLINE constexpr int sums_row_bytes(int warp_blocks) {
  return warp_blocks * kGridWarps * 32 * 4;
}

// A backward team for a layer: its CTAs have whole blocks of 32 units.
struct GridBackwardTeam {
  int ctas, blocks, warp_blocks;  // blocks of the layer; those for which the kernel is compiled
  int64_t received_bytes;
};
constexpr GridBackwardTeam backward_team(GridBackwardShape s, int64_t hidden_size) {
  const int blocks = parts_of(hidden_size, 32), choice = block_choice(blocks);
  const int each = choice < kGridBlockCounts ? kGridBlocks[choice] : parts_of(blocks, kGridWarps);
  return {blocks * 32 / s.units, blocks, each, int64_t(s.sequences()) * sums_row_bytes(each)};
}

// The shared memory of a backward CTA has, in this order: weights, two buffers of dgates, stages of
// what comes from global memory, where each thread copies it from, steps.
struct BackwardLayout {
  int tile_bytes;  // dgates of 8 sequences in a slab, padded against bank conflicts of stores
  int dgates_bytes;
  // A sequence in a stage: its gates, then the previous c, and the gradients of the output and of
  // c.
  int gate_bytes, row_bytes, stage_bytes;
  // Pieces of 16 bytes that a thread copies in a step, and 16 bytes that say from where, each.
  int pieces, piece_bytes;
};
FASTLSTM_INLINE constexpr BackwardLayout backward_layout(GridBackwardShape s, int bytes) {
  const int tile = 512 + 64, gates = 4 * s.units * bytes, row = gates + 3 * s.units * 4;
  const int pieces = parts_of(row / 16, 32 / s.tiles);
  return {tile,   s.tiles * s.slabs(bytes) * tile, gates, row, row * s.sequences(),
          pieces, pieces * kGridThreads * 16};
}
FASTLSTM_INLINE constexpr int backward_shared_blocks(GridBackwardShape s, int warp_blocks,
                                                     int bytes) {
  return warp_blocks * s.slabs(bytes) - s.held(warp_blocks, bytes);
}
FASTLSTM_INLINE constexpr int64_t backward_shared(GridBackwardShape s, int warp_blocks, int bytes) {
  const BackwardLayout x = backward_layout(s, bytes);
  return int64_t(backward_shared_blocks(s, warp_blocks, bytes)) * kGridWarps * kGridBlockBytes +
         2 * x.dgates_bytes + s.stages * x.stage_bytes + x.piece_bytes + kGridStepsBytes;
}

}  // namespace cuda
}  // namespace fastlstm

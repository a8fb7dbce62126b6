// The shapes of the persistent kernels, by which the planner counts what fits.
#pragma once

#include <cstdint>

#include "cell.h"

namespace fastlstm {
namespace cuda {

constexpr int kPersistentWarps = 8, kPersistentThreads = 32 * kPersistentWarps;
// Each warp takes an equal slice of K, in slabs of 64 bytes.
constexpr int kSliceBytes = 64 * kPersistentWarps;
// Sources of a product, and cells (layers or directions) of a launch.
constexpr int kMaxSources = 2, kMaxCells = 8;

// A CTA's part of a layer: 4 * units rows of weights times 8 * tiles sequences. The product of the
// two bounds a warp's accumulators (16 a thread for every unit-block and tile).
struct PersistentShape {
  int units, tiles;
};
constexpr PersistentShape kPersistentShapes[] = {{8, 2},  {8, 4},  {8, 8}, {16, 2},
                                                 {16, 4}, {16, 5}, {32, 2}};
constexpr int kPersistentShapeCount = 7;

FASTLSTM_INLINE constexpr int cell_blocks(PersistentShape s) { return s.units / 8 * s.tiles; }
// Backward has more to hold than forward: beyond this, registers spill.
FASTLSTM_INLINE constexpr bool runs_backward(PersistentShape s) { return cell_blocks(s) <= 8; }
// Partial sums of up to eight blocks of cells: a block's 1 KiB from each warp.
FASTLSTM_INLINE constexpr int partial_bytes(PersistentShape s) {
  const int blocks = cell_blocks(s) < kPersistentWarps ? cell_blocks(s) : kPersistentWarps;
  return blocks * kPersistentWarps * 1024;
}
FASTLSTM_INLINE constexpr int64_t weight_bytes(PersistentShape s, int64_t depth_bytes) {
  return 4 * s.units * depth_bytes;
}

// What a CTA multiplies by: `slots` CTAs of a group, K's elements with their padding, bytes.
struct PersistentSizes {
  int slots;
  int64_t depth, weights;
  int64_t quarter;  // backward: units of a quarter
};
constexpr PersistentSizes persistent_sizes(int64_t hidden_size, int64_t bytes,
                                           PersistentShape shape, bool forward) {
  const int64_t slice = kSliceBytes / bytes, u = shape.units;
  const int64_t quarter = ((hidden_size + 3) / 4 + u - 1) / u * u;
  const int64_t depth = ((forward ? hidden_size : 4 * quarter) + slice - 1) / slice * slice;
  const int64_t slots = forward ? (hidden_size + u - 1) / u : 4 * (quarter / u);
  return {int(slots), depth, weight_bytes(shape, depth * bytes), quarter};
}

}  // namespace cuda
}  // namespace fastlstm

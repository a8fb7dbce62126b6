// The tile shapes of the step kernel (tile.cuh), as the planner numbers them.
#pragma once

namespace fastlstm {
namespace cuda {

// The most sequences of a call that single_step.cuh runs.
constexpr int kSingleStepRows = 8;

struct TileShape {
  const char* name;
  // Fragments of 16 rows in a warp; warps along rows and columns; warps that split K; slabs of 64
  // bytes in a stage; stages.
  int row_frags, row_warps, column_warps, split, slabs, stages;

  constexpr int rows() const { return 16 * row_frags * row_warps; }
  constexpr int columns() const { return 32 * column_warps; }
  constexpr long long stages_of(long long depth_bytes) const {
    return (depth_bytes + 64 * slabs - 1) / (64 * slabs);
  }
  constexpr int shared() const { return stages * slabs * 64 * (rows() + columns()); }
};

constexpr int kTileCount = 3;
// In place of a tile: cuBLAS multiplies, and finish_kernel does what the step kernel fuses behind
// its product.
constexpr int kLibraryTile = kTileCount;

// The third tile reads the fewest bytes from L2. With tensor cores it takes 96 KiB of shared
// memory, which no GPU before sm_80 has. Without them, 64x128 would not fit the registers.
constexpr TileShape tile_shape(int index, bool tensor_cores) {
  return index == 0     ? TileShape{"16x32", 1, 1, 1, 4, 4, 4}  // small batches, and backward
         : index == 1   ? TileShape{"32x64", 1, 2, 2, 1, 2, 4}
         : tensor_cores ? TileShape{"64x128", 2, 2, 4, 1, 2, 4}
                        : TileShape{"64x64", 1, 4, 2, 1, 2, 4};
}

// Shared memory of a block on GPUs before sm_80.
constexpr int kOldSharedBytes = 64 << 10;

}  // namespace cuda
}  // namespace fastlstm

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

// Behind that: forward, the tiles of wide_step.cuh, which take clusters and half types.
constexpr int kWideTile = kLibraryTile + 1, kWideCount = 3;

// A CTA has the gates of 16 units, that is 64 rows, for so many sequences; a warp all rows of so
// many sequences. A stage is some blocks of 16 of K; so many CTAs run on an SM.
constexpr int kWideUnits = 16, kMostWideCtas = 4;  // of a cluster
struct WideTile {
  const char* name;
  int sequences, warp_sequences, stage_blocks, stages, ctas;

  constexpr int stage_bytes() const { return stage_blocks * 32 * (4 * kWideUnits + sequences); }
  constexpr int shared() const { return stages * (stage_bytes() + 16); }  // and two mbarriers each
  constexpr long long blocks_of(long long depth) const {
    return (depth + 16 * stage_blocks - 1) / (16 * stage_blocks) * stage_blocks;
  }
};

constexpr WideTile wide_tile(int index) {
  return index == 0   ? WideTile{"64x32 in clusters", 32, 32, 8, 4, 2}
         : index == 1 ? WideTile{"64x64 in clusters", 64, 64, 8, 6, 1}
                      : WideTile{"64x128 in clusters", 128, 64, 4, 8, 1};
}

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

// Arguments of the backward pass in clusters, and what a CTA holds where.
#pragma once

#include "../exchange.cuh"
#include "../numeric.cuh"
#include "group.cuh"
#include "rules.h"

namespace fastlstm {
namespace cuda {

// One direction of a layer.
template <class S>
struct ClusterGradient {
  typedef Acc<S> T;
  const S* w_hh;         // (4H, H)
  const S* grad_output;  // this direction's columns, or null
  const T* upper_input;  // likewise
  const S *grad_h_n, *grad_c_n, *c0;
  const S* gates;
  const T *cells, *grad_cells;  // grad_cells may be null
  S *dgates, *grad_c0;
  T* dh_stays;  // (B, H), what zoneout hands to the h before the first step; or null
  DrawnRules<T> rules;
  int direction;
};

template <class S>
struct ClusterGradientArgs {
  ClusterGradient<S> cell[2];
  int clusters;  // of a direction
  int units;     // H
  RowMap map;
  int64_t output_wide, dgates_wide;
  bool bulk;   // rows of H elements are aligned to 16 bytes
  bool pairs;  // those of W_hh to two elements
  uint64_t limit;
};

constexpr int kBackwardWarps = 8;  // that compute
constexpr int kBackwardMovers = 128, kBackwardThreads = 32 * kBackwardWarps + kBackwardMovers;

template <class S_, int kUnits_, int kCtas_, int kGroups_>
struct BackwardShape {
  typedef S_ S;
  static constexpr int kUnits = kUnits_, kCtas = kCtas_, kGroups = kGroups_;
  static constexpr int kCells = kUnits / 32;  // of a thread
  static constexpr int kStages = kGroups == 1 ? 8 : 4;

  // The product: tiles of 16 units, K in chunks of one gate's units.
  static constexpr int kChunk = 16 / int(sizeof(S));
  static constexpr int kChunks = kUnits / kChunk;
  static constexpr int kTiles = kCtas * kUnits / 16;
  static constexpr int kSlices = kTiles < kBackwardWarps ? kBackwardWarps / kTiles : 1;
  static constexpr int kWarpTiles = kTiles * kSlices / kBackwardWarps;
  static constexpr int kWarpChunks = kChunks / kSlices;
  static constexpr int kBlockTiles = kWarpTiles > 1 ? 2 : 1;
  static constexpr int kBlocks = kWarpTiles / kBlockTiles;
  static constexpr int kChains = 4 / kBlockTiles;  // sums of a tile that do not wait for each other
  static constexpr int kSources = kCtas * kSlices;

  // Where the weights fill registers, movers hand some of theirs to the warps that compute.
  static constexpr bool kMovesRegisters = kWarpTiles * 2 * kWarpChunks * 4 >= 128;
  static constexpr int kComputingRegisters = 216, kMoverRegisters = 72;
  // A CTA has the registers with which its threads begin: who asks for more waits for ever.
  static_assert(32 * kBackwardWarps * kComputingRegisters + kBackwardMovers * kMoverRegisters <=
                    kBackwardThreads * registers_at_entry(kBackwardThreads),
                "registers");

  // Shared memory, in bytes. Rows of two neighbouring sequences begin 16 banks apart, chunks of
  // neighbouring units 8.
  static constexpr int row_pitch(int bytes) { return bytes % 128 == 64 ? bytes : bytes + 64; }
  static constexpr int kGateRow = row_pitch(kUnits * int(sizeof(S)));
  static constexpr int kStateRow = row_pitch(kUnits * 4);
  // A stage: the gates, by gate and sequence; c, gradients from above and those of c by sequence.
  static constexpr int kCellsAt = 4 * 8 * kGateRow, kAboveAt = kCellsAt + 8 * kStateRow,
                       kGradCellsAt = kAboveAt + 8 * kStateRow,
                       kStage = kGradCellsAt + 8 * kStateRow;
  static constexpr int kChunkPitch = 512 + 32;
  static constexpr int kTile = kChunks * kChunkPitch;
  // A product takes rounded floats; what leaves is not rounded, and stands behind them.
  static constexpr int kStoredAt = sizeof(S) == 4 ? kTile : 0, kDgates = kStoredAt + kTile;
  static constexpr int kSource = 32 * kUnits;
  static constexpr int kSums = kSources * kSource;
  static constexpr int kBarrierBytes = 128;
  static constexpr int kSumsAt = kBarrierBytes, kDgatesAt = kSumsAt + 2 * kGroups * kSums,
                       kStagesAt = kDgatesAt + 2 * kGroups * kDgates,
                       kSharedBytes = kStagesAt + kGroups * kStages * kStage;
  static_assert(2 * kGroups * 8 <= kBarrierBytes, "barriers");
  static_assert(kWarpTiles % kBlockTiles == 0 && kChunks % kSlices == 0, "product");
  static_assert(kSharedBytes <= 227 * 1024, "shared memory");
};

}  // namespace cuda
}  // namespace fastlstm

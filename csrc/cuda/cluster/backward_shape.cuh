// The backward kernel's arguments in clusters, its sizes, and the layout of a CTA's shared memory.
#pragma once

#include "../shared/exchange.cuh"
#include "../shared/numeric.cuh"
#include "../shared/step_rows.cuh"
#include "rules.h"

namespace fastlstm {
namespace cuda {

// One direction of a layer.
template <class S>
struct ClusterBackwardDirection {
  typedef Acc<S> T;
  const S* w_hh;         // (4H, H)
  const S* grad_output;  // this direction's columns, or null
  const T* upper_input;  // likewise
  const S *grad_h_n, *grad_c_n, *c0;
  const S* gates;
  const T *cell_states, *grad_cell_states;  // grad_cell_states may be null
  S *dgates, *grad_c0;
  T* dh_zoneout;  // (B, H), the share of dh that zoneout passes to h0; or null
  DrawnRules<T> rules;
  int direction;
};

template <class S>
struct ClusterBackwardArgs {
  ClusterBackwardDirection<S> direction[2];
  int clusters;  // of a direction
  int units;     // H
  StepRows steps;
  int64_t output_stride, dgates_stride;
  bool bulk;   // rows of H elements are aligned to 16 bytes
  bool pairs;  // those of W_hh to two elements
  uint64_t limit;
};

constexpr int kBackwardWarps = 8;  // those that compute
constexpr int kBackwardMovers = 128, kBackwardThreads = 32 * kBackwardWarps + kBackwardMovers;

template <class S_, int kUnits_, int kCtas_, int kGroups_>
struct ClusterBackwardShape {
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
  static constexpr int kChains = 4 / kBlockTiles;  // independent sums of a tile
  static constexpr int kSources = kCtas * kSlices;

  // Where the weights need more registers than a computing warp's share, movers give up some of
  // theirs.
  static constexpr bool kMovesRegisters = kWarpTiles * 2 * kWarpChunks * 4 >= 128;
  static constexpr int kComputingRegisters = 216, kMoverRegisters = 72;
  // A CTA has no more registers than its threads begin with: setmaxnreg would wait forever for
  // more.
  static_assert(32 * kBackwardWarps * kComputingRegisters + kBackwardMovers * kMoverRegisters <=
                    kBackwardThreads * registers_at_entry(kBackwardThreads),
                "registers");

  // Shared memory, in bytes. Rows of two neighbouring sequences begin 16 banks apart, chunks of
  // neighbouring units 8.
  static constexpr int row_pitch(int bytes) { return bytes % 128 == 64 ? bytes : bytes + 64; }
  static constexpr int kGateStride = row_pitch(kUnits * int(sizeof(S)));
  static constexpr int kStateStride = row_pitch(kUnits * 4);
  // A stage: the gates, by gate and sequence; then, by sequence, c, the gradients of the output and
  // those of c.
  static constexpr int kStatesAt = 4 * 8 * kGateStride,
                       kGradOutputAt = kStatesAt + 8 * kStateStride,
                       kGradStatesAt = kGradOutputAt + 8 * kStateStride,
                       kStageBytes = kGradStatesAt + 8 * kStateStride;
  static constexpr int kChunkPitch = 512 + 32;
  static constexpr int kTileBytes = kChunks * kChunkPitch;
  // The product reads floats rounded to tf32; those that go to global memory, not rounded, follow.
  static constexpr int kStoredAt = sizeof(S) == 4 ? kTileBytes : 0,
                       kDgatesBytes = kStoredAt + kTileBytes;
  static constexpr int kSourceBytes = 32 * kUnits;
  static constexpr int kSumsBytes = kSources * kSourceBytes;
  static constexpr int kBarrierBytes = 128;
  static constexpr int kSumsAt = kBarrierBytes, kDgatesAt = kSumsAt + 2 * kGroups * kSumsBytes,
                       kStagesAt = kDgatesAt + 2 * kGroups * kDgatesBytes,
                       kSharedBytes = kStagesAt + kGroups * kStages * kStageBytes;
  static_assert(2 * kGroups * 8 <= kBarrierBytes, "barriers");
  static_assert(kWarpTiles % kBlockTiles == 0 && kChunks % kSlices == 0, "product");
  static_assert(kSharedBytes <= 227 * 1024, "shared memory");
};

}  // namespace cuda
}  // namespace fastlstm

// The backward kernel's arguments in clusters, its sizes, and the layout of a CTA's shared memory.
#pragma once

#include "../shared/exchange.cuh"
#include "../shared/numeric.cuh"
#include "../shared/step_rows.cuh"
#include "rules.h"
#include "shapes.h"

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
  // Between ranges of steps, (B, H): the sums that a step's dgates send to h of the step before it,
  // and the gradient of c before it. c_before: c of the step before these, or null: c0.
  T *sums, *dc;
  const T* c_before;
  DrawnRules<T> rules;
  int direction;
};

template <class S>
struct ClusterBackwardArgs {
  ClusterBackwardDirection<S> direction[2];
  int clusters;  // of a direction
  int units;     // H
  StepRows steps;
  int going_on;   // sequences that have steps behind these; their gradients are handed on
  bool hands_on;  // whether steps before these follow
  int64_t output_stride, dgates_stride;
  bool bulk;   // rows of H elements are aligned to 16 bytes
  bool pairs;  // those of W_hh to two elements
  uint64_t limit;
};

constexpr int kBackwardMovers = 128;  // threads

// kSequences: of a group, eight or four. An mma has eight columns: of four each is there twice.
template <class S_, int kUnits_, int kCtas_, int kGroups_, int kSequences_ = 8>
struct ClusterBackwardShape {
  typedef S_ S;
  typedef MmaElement<S> Operand;
  static constexpr int kUnits = kUnits_, kCtas = kCtas_, kGroups = kGroups_;
  static constexpr int kSequences = kSequences_;
  // Whether a part of the weights is in shared memory because registers hold no more.
  static constexpr bool kStreams = streams_weights(kCtas, kUnits, int(sizeof(S)));
  static_assert(!kStreams || kGroups == 1, "one group");

  // Computing warps; the units of a warp's cells are 16 neighbours, of two sequences.
  static constexpr int kWarps = kUnits == 48 ? 12 : 8, kThreads = 32 * kWarps + kBackwardMovers;
  static constexpr int kSpread = 2 * kWarps / kSequences;  // warps that share two sequences
  static constexpr int kCellStride = 16 * kSpread;         // from a thread's cell to its next
  static constexpr int kCells = kUnits / kCellStride;      // of a thread
  static_assert(kCells * kCellStride == kUnits, "whole cells");

  static constexpr int kStages = kGroups == 1 && !kStreams ? 8 : 4;

  // The product: tiles of 16 units, K in chunks of one gate's units.
  static constexpr int kChunk = 16 / int(sizeof(S));
  static constexpr int kChunks = kUnits / kChunk;
  static constexpr int kTiles = kCtas * kUnits / 16;
  static constexpr int kSlices = kTiles < kWarps ? kWarps / kTiles : 1;
  static constexpr int kWarpTiles = kTiles * kSlices / kWarps;
  static constexpr int kWarpChunks = kChunks / kSlices;
  static constexpr int kBlockTiles = kWarpTiles > 1 ? 2 : 1;
  static constexpr int kBlocks = kWarpTiles / kBlockTiles;
  static constexpr int kChains = kStreams ? 1 : 4 / kBlockTiles;  // independent sums of a tile
  static constexpr int kSources = kCtas * kSlices;
  // From a warp's tile to its next. Where weights are streamed, a warp's tiles have the same place
  // in CTAs that are kTileStride / (kUnits / 16) ranks apart: one address serves all.
  static constexpr int kTileStride = kStreams ? kWarps : 1;
  static_assert(!kStreams || kWarps % (kUnits / 16) == 0, "whole ranks");

  // Fragments of a warp's weights, 512 bytes each, and how many of them are streamed: the first of
  // those for the second of a chunk's two mma.
  static constexpr int kFragments = 2 * kWarpChunks * kWarpTiles;
  static constexpr int kSharedFragments = kStreams ? kFragments - register_fragments(kUnits) : 0;
  static constexpr int kWeightsBytes = kSharedFragments * 512 * kWarps;
  static_assert(kSharedFragments <= kFragments / 2, "second fragments");

  // Where the weights need more registers than a computing warp's share, movers give up some of
  // theirs.
  static constexpr bool kMovesRegisters = kWarpTiles * 2 * kWarpChunks * 4 >= 128;
  static constexpr int kComputingRegisters = kWarps == 12 ? 152 : 216,
                       kMoverRegisters = kWarps == 12 ? 56 : 72;
  // A CTA has no more registers than its threads begin with: setmaxnreg would wait forever for
  // more.
  static_assert(32 * kWarps * kComputingRegisters + kBackwardMovers * kMoverRegisters <=
                    kThreads * registers_at_entry(kThreads),
                "registers");

  // Shared memory, in bytes. Rows of two neighbouring sequences begin in banks so far apart that a
  // warp's reads of both have no conflict (16, or 24 for 48 units of a half type), chunks of
  // neighbouring units 8.
  static constexpr int row_pitch(int bytes) { return bytes % 128 == 0 ? bytes + 64 : bytes; }
  static constexpr int kGateStride = row_pitch(kUnits * int(sizeof(S)));
  static constexpr int kStateStride = row_pitch(kUnits * 4);
  // A stage: the gates, by gate and sequence; then, by sequence, c, the gradients of the output and
  // those of c.
  static constexpr int kStatesAt = 4 * 8 * kGateStride,
                       kGradOutputAt = kStatesAt + 8 * kStateStride,
                       kGradStatesAt = kGradOutputAt + 8 * kStateStride,
                       kStageBytes = kGradStatesAt + 8 * kStateStride;
  // The four dgates of a cell are neighbours: one store. Chunks are so far apart that a mover's
  // reads of several chunks have no conflict.
  static constexpr int kChunkPitch = 512 + 16, kCellBytes = 4 * int(sizeof(S));
  static constexpr int kOperandGate = int(sizeof(S)),
                       kOperandNext = kCellStride / kChunk * kChunkPitch;  // to the next cell
  __device__ __forceinline__ static constexpr unsigned operand_at(int unit, int sequence) {
    return unit / kChunk * kChunkPitch + sequence * 64 + unit % 4 * 16 +
           unit % kChunk / 4 * kCellBytes;
  }
  // Stores a cell's dgates.
  __device__ __forceinline__ static void store_cell(const float (&d)[4], unsigned char* to) {
    if constexpr (sizeof(S) == 4) {
      *reinterpret_cast<uint4*>(to) =
          make_uint4(round_tf32(bits_of(d[0])), round_tf32(bits_of(d[1])),
                     round_tf32(bits_of(d[2])), round_tf32(bits_of(d[3])));
      *reinterpret_cast<uint4*>(to + kStoredAt) =
          make_uint4(bits_of(d[0]), bits_of(d[1]), bits_of(d[2]), bits_of(d[3]));
    } else {
      *reinterpret_cast<uint64_t*>(to) =
          pair_of(d[0], d[1], S()) | uint64_t(pair_of(d[2], d[3], S())) << 32;
    }
  }
  // Of a sequence, the dgates of a chunk of units, by gate.
  __device__ __forceinline__ static void load_chunk(const unsigned char* from, uint4 (&gates)[4]) {
    uint32_t words[4][4];  // of unit j; of a half type also of unit j + 4
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint4 v = reinterpret_cast<const uint4*>(from)[j];
      words[j][0] = v.x, words[j][1] = v.y, words[j][2] = v.z, words[j][3] = v.w;
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      uint32_t gate[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (sizeof(S) == 4) {
          gate[j] = words[j][q];
        } else {
          const int at = j / 2 * 2 + q / 2;  // two gates of a unit, and of the next
          const uint32_t a = words[j % 2 * 2][at], b = words[j % 2 * 2 + 1][at];
          gate[j] = q % 2 ? upper_halves(a, b) : lower_halves(a, b);
        }
      }
      gates[q] = make_uint4(gate[0], gate[1], gate[2], gate[3]);
    }
  }
  static constexpr int kTileBytes = kChunks * kChunkPitch;
  // The product reads floats rounded to tf32; those that go to global memory, not rounded, follow.
  static constexpr int kStoredAt = sizeof(S) == 4 ? kTileBytes : 0,
                       kDgatesBytes = kStoredAt + kTileBytes;
  static constexpr int kSourceBytes = 32 * kUnits;
  static constexpr int kSumsBytes = kSources * kSourceBytes;
  static constexpr int kBarrierBytes = 128;
  static constexpr int kSumsAt = kBarrierBytes, kDgatesAt = kSumsAt + 2 * kGroups * kSumsBytes,
                       kWeightsAt = kDgatesAt + 2 * kGroups * kDgatesBytes,
                       kStagesAt = kWeightsAt + kWeightsBytes,
                       kSharedBytes = kStagesAt + kGroups * kStages * kStageBytes;
  static_assert(2 * kGroups * 8 <= kBarrierBytes, "barriers");
  static_assert(kWarpTiles % kBlockTiles == 0 && kChunks % kSlices == 0, "product");
  static_assert(kSharedBytes <= 227 * 1024, "shared memory");
};

}  // namespace cuda
}  // namespace fastlstm

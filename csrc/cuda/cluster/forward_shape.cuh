// The forward cluster kernel's sizes, its division of work among warps, and the layout of a CTA's
// shared memory.
#pragma once

#include "../shared/exchange.cuh"
#include "../shared/numeric.cuh"
#include "shapes.h"

namespace fastlstm {
namespace cuda {

// The mbarriers that computing warps and movers share: for two steps' outputs, each for the buffer
// being filled and being free.
constexpr int kOutputBarriers = 4;

// A cluster of kCtas CTAs, each with kUnits hidden units, for kGroups groups that take turns, each
// of kSequences.
template <class S_, int kCtas_, int kUnits_, int kSequences_, int kGroups_ = 1>
struct ClusterForwardShape {
  typedef S_ S;
  typedef MmaElement<S> Operand;
  static constexpr int kCtas = kCtas_, kUnits = kUnits_, kGroups = kGroups_;
  static constexpr int kSequences = kSequences_, kElementBytes = int(sizeof(S));
  // An mma has eight columns. Of four sequences each has two, so that every lane has one.
  static constexpr int kColumns = kSequences < 8 ? 8 / kSequences : 1;  // of a sequence
  static constexpr int kTiles = kSequences * kColumns / 8;

  // Whether a part of the weights is in shared memory because registers hold no more.
  static constexpr bool kStreams = streams_weights(kCtas, kUnits, kElementBytes);

  // A warp multiplies the gate rows of a block of units, in tiles of 16 rows: two gates of eight
  // units. Where there are fewer blocks than warps, several warps split the K of a block. Larger
  // blocks and a finer split of K read less of h from shared memory, which streaming fills.
  static constexpr int kWarps = kUnits == 48 ? 12 : 8, kBlockUnits = kStreams ? 16 : 8;
  static constexpr int kBlocks = kUnits / kBlockUnits, kSplit = kWarps / kBlocks;
  static constexpr int kWarpTiles = kBlockUnits / 4;
  static constexpr int kCells = kUnits * kSequences / (32 * kWarps);  // of a thread
  static_assert(kWarps % kBlocks == 0 && kWarpTiles * kTiles == kCells * kSplit * kColumns,
                "whole cells");
  static_assert(kColumns == 1 || (kColumns == 2 && kSplit == 1), "a column of each lane");
  static_assert(kBlockUnits == 8 || (kTiles == 1 && kCells == 1), "one unit a thread");

  // K in slabs of 64 bytes: four pieces of 16 bytes, each a lane's share of two mma.
  static constexpr int kSlab = 64 / kElementBytes, kPiece = 16 / kElementBytes;
  static constexpr int kDepth = kCtas * kUnits, kWarpSlabs = kDepth / kSlab / kSplit;

  // Where the weights need more registers than a computing warp's share, movers give up some of
  // theirs. Without setmaxnreg some fragments of a warp's weights are in shared memory instead, as
  // those that are streamed: the first kSharedFragments of the second halves of slabs.
  static constexpr bool kFillsRegisters = kWarpSlabs * kWarpTiles > 8;
  static constexpr int kFragments = 2 * kWarpSlabs * kWarpTiles;  // 512 bytes, of a warp's weights
  static constexpr int kRoomForFragments = kStreams ? kFragments - register_fragments(kUnits)
                                           : kFillsRegisters ? 2 * kTiles * kWarpTiles
                                                             : 0;
  static constexpr int kSharedFragments =
      kStreams || !FASTLSTM_MOVES_REGISTERS ? kRoomForFragments : 0;
  static_assert(kRoomForFragments <= kFragments / 2, "second halves");
  static constexpr int kComputeRegisters = kWarps == 12 ? 152 : 200,
                       kMoveRegisters = kWarps == 12 ? 56 : 104;

  // Movers. Registers are allotted to groups of four warps: eight warps and one would get no more
  // each than twelve.
  static constexpr int kMovers = 4;
  static constexpr int kThreads = 32 * (kWarps + kMovers);
  // A CTA has no more registers than its threads begin with: setmaxnreg would wait forever for
  // more.
  static_assert(32 * (kWarps * kComputeRegisters + kMovers * kMoveRegisters) <=
                    kThreads * registers_at_entry(kThreads),
                "registers");

  // Steps by which the input part is loaded ahead.
  static constexpr int kRing = kStreams ? 4 : 8;

  // ---- bytes of shared memory ----
  // Two buffers of h for each group: slab after slab, in each 64 bytes a sequence.
  static constexpr int kSlabBytes = 64 * kSequences,
                       kHiddenBytes = kDepth * kSequences * kElementBytes;
  // What a CTA sends to each of the cluster.
  static constexpr int kSentBytes = kUnits * kSequences * kElementBytes;
  // In a cluster that sends h in several rounds, warps wait for the part that they multiply alone.
  static constexpr int kParts = kCtas == 16 ? kSplit : 1;
  static_assert(kCtas % kParts == 0, "a CTA's units are of one part");
  // Partial sums that warps pass to those with other parts of K, and from how many parts.
  static constexpr int kSumsFrom = kSplit <= 2 ? kSplit - 1 : kSplit;
  static constexpr int kSumsBytes = kWarps * kCells * kSumsFrom * 512;
  // A sequence's input part, and its outputs: h and the four gates (S), c (fp32). Both are a
  // multiple of 64 bytes and 16 more, so that a warp's accesses have no bank conflicts.
  static constexpr int kInputBytes = 16 * kUnits + 16;
  static constexpr int kResultBytes = 5 * kUnits * kElementBytes + 4 * kUnits;
  static constexpr int kOutputBytes = (kResultBytes + 63) / 64 * 64 + 16;
  static_assert(kInputBytes % 64 == 16 && kOutputBytes % 64 == 16, "banks");

  static constexpr int kTileAt = 2 * kGroups * kHiddenBytes;
  static constexpr int kTileBytes = (kUnits + kSlab - 1) / kSlab * kSlabBytes;
  static constexpr int kSumsAt = kTileAt + (kCtas > 1 ? 2 * kTileBytes : 0);
  static constexpr int kInputAt = kSumsAt + kSumsBytes;
  static constexpr int kOutputAt = kInputAt + kRing * kSequences * kInputBytes;
  static constexpr int kBiasAt = kOutputAt + 2 * kSequences * kOutputBytes;
  static constexpr int kRulesAt = kBiasAt + 16 * kUnits;
  static constexpr int kSpansAt = kRulesAt + 12 * kCells * 32 * kWarps;
  static constexpr int kWeightsAt = kSpansAt + 8 * kGroups * kSequences;
  static constexpr int kBarriersAt = kWeightsAt + kRoomForFragments * 512 * kWarps;
  // For each part of h those of its buffers, then those of the input ring, then of the outputs.
  static constexpr int kSharedBytes =
      kBarriersAt + (2 * kGroups * kParts + kRing + kOutputBarriers) * int(sizeof(Mbarrier));
  static_assert(kBarriersAt % 8 == 0 && kSharedBytes <= 227 * 1024, "fits an SM");

  // The place of a unit of a sequence, in bytes from the beginning of a buffer of h (or from that
  // of a CTA's part, with the unit counted from its first).
  __device__ __forceinline__ static constexpr int hidden_at(int unit, int sequence) {
    const int piece = unit % kSlab / kPiece ^ sequence / 2 % 4;
    return unit / kSlab * kSlabBytes + sequence * 64 + piece * 16 + unit % kPiece * kElementBytes;
  }

#if FASTLSTM_SM90
  // h as an operand of the product.
  __device__ __forceinline__ static S operand(S h) {
    if constexpr (std::is_same_v<S, float>)
      return float_of(round_tf32(bits_of(h)));
    else
      return h;
  }
#endif
};

}  // namespace cuda
}  // namespace fastlstm

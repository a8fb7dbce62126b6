// The forward cluster kernel's sizes, its division of work among warps, and the layout of a CTA's
// shared memory.
#pragma once

#include <type_traits>

#include "../shared/exchange.cuh"
#include "../shared/numeric.cuh"

namespace fastlstm {
namespace cuda {

// A cluster of kCtas CTAs, each with kUnits hidden units, for kTiles times eight sequences.
template <class S_, int kCtas_, int kUnits_, int kTiles_>
struct ClusterForwardShape {
  typedef S_ S;
  static constexpr int kCtas = kCtas_, kUnits = kUnits_, kTiles = kTiles_;
  static constexpr int kSequences = 8 * kTiles, kElementBytes = int(sizeof(S));

  // A warp multiplies the 32 gate rows of a block of eight units. Where there are fewer blocks than
  // warps, two warps split the K of a block.
  static constexpr int kWarps = 8, kBlocks = kUnits / 8, kSplit = kWarps / kBlocks;
  static constexpr int kCells = kSequences / 4 / kSplit;  // of a thread
  static_assert(kSplit == 1 || kSplit == 2, "a warp has a block, or half of one");

  // K in slabs of 64 bytes: four pieces of 16 bytes, each a lane's share of two mma.
  static constexpr int kSlab = 64 / kElementBytes, kPiece = 16 / kElementBytes;
  static constexpr int kDepth = kCtas * kUnits, kWarpSlabs = kDepth / kSlab / kSplit;

  // Slabs whose weights stay in registers. Many slabs need more registers than a computing warp's
  // share: then movers give up some of theirs or, without setmaxnreg, some slabs are in shared
  // memory.
  static constexpr bool kFillsRegisters = kWarpSlabs > 4;
  static constexpr int kSharedSlabs = kFillsRegisters ? kTiles : 0;
  static constexpr int kRegisterSlabs = kWarpSlabs - (FASTLSTM_MOVES_REGISTERS ? 0 : kSharedSlabs);
  static constexpr int kSharedSlabsBytes = kSharedSlabs * 64 * 32 * kWarps;
  static constexpr int kComputeRegisters = 200, kMoveRegisters = 104;

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
  static constexpr int kRing = 8;

  // ---- bytes of shared memory ----
  // Two buffers of h: slab after slab, in each 64 bytes a sequence.
  static constexpr int kSlabBytes = 64 * kSequences,
                       kHiddenBytes = kDepth * kSequences * kElementBytes;
  // What a CTA sends to each of the cluster.
  static constexpr int kSentBytes = kUnits * kSequences * kElementBytes;
  // Partial sums that a warp passes to the one with the other half of K.
  static constexpr int kSumsBytes = kSplit == 2 ? kWarps * kCells * 512 : 0;
  // A sequence's input part, and its outputs: h and the four gates (S), c (fp32). Both are a
  // multiple of 64 bytes and 16 more, so that a warp's accesses have no bank conflicts.
  static constexpr int kInputBytes = 16 * kUnits + 16;
  static constexpr int kOutputBytes = 5 * kUnits * kElementBytes + 4 * kUnits + 16;
  static_assert(kInputBytes % 64 == 16 && kOutputBytes % 64 == 16, "banks");

  static constexpr int kTileAt = 2 * kHiddenBytes;
  static constexpr int kSumsAt = kTileAt + (kCtas > 1 ? 2 * kSentBytes : 0);
  static constexpr int kInputAt = kSumsAt + kSumsBytes;
  static constexpr int kOutputAt = kInputAt + kRing * kSequences * kInputBytes;
  static constexpr int kBiasAt = kOutputAt + 2 * kSequences * kOutputBytes;
  static constexpr int kRulesAt = kBiasAt + 16 * kUnits;
  static constexpr int kSpansAt = kRulesAt + 12 * kCells * 32 * kWarps;
  static constexpr int kSharedSlabsAt = kSpansAt + 8 * kSequences;
  static constexpr int kBarriersAt = kSharedSlabsAt + kSharedSlabsBytes;
  static constexpr int kSharedBytes = kBarriersAt + (2 + kRing) * int(sizeof(Mbarrier));
  static_assert(kBarriersAt % 8 == 0 && kSharedBytes <= 227 * 1024, "fits an SM");
};

// The place of a unit of a sequence, in bytes from the beginning of a buffer of h (or from that of
// a CTA's part, with the unit counted from its first).
template <class Shape>
__device__ __forceinline__ constexpr int hidden_at(int unit, int sequence) {
  const int piece = unit % Shape::kSlab / Shape::kPiece ^ sequence / 2 % 4;
  return unit / Shape::kSlab * Shape::kSlabBytes + sequence * 64 + piece * 16 +
         unit % Shape::kPiece * Shape::kElementBytes;
}

// The type of h as an operand.
template <class S>
using MmaElement = std::conditional_t<std::is_same_v<S, float>, RoundedFloat, S>;

#if FASTLSTM_SM90

__device__ __forceinline__ Bf16 rounded(Bf16 x) { return x; }
__device__ __forceinline__ F16 rounded(F16 x) { return x; }
__device__ __forceinline__ float rounded(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits = round_tf32(bits);
  memcpy(&x, &bits, 4);
  return x;
}

#endif

}  // namespace cuda
}  // namespace fastlstm

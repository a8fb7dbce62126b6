// The forward cluster kernel's sizes, who does what in a CTA, and where its shared memory's parts
// are.
#pragma once

#include <type_traits>

#include "../exchange.cuh"
#include "../numeric.cuh"

namespace fastlstm {
namespace cuda {

// A cluster of kCtas CTAs, each with kUnits hidden units, for kTiles times eight sequences.
template <class S_, int kCtas_, int kUnits_, int kTiles_>
struct ForwardShape {
  typedef S_ S;
  static constexpr int kCtas = kCtas_, kUnits = kUnits_, kTiles = kTiles_;
  static constexpr int kSequences = 8 * kTiles, kSize = int(sizeof(S));

  // A warp multiplies the 32 gate rows of a block of eight units. Where there are fewer blocks than
  // warps, two warps share a block, each with half of K.
  static constexpr int kWarps = 8, kBlocks = kUnits / 8, kSplit = kWarps / kBlocks;
  static constexpr int kCells = kSequences / 4 / kSplit;  // of a thread
  static_assert(kSplit == 1 || kSplit == 2, "a warp has a block, or half of one");

  // K in slabs of 64 bytes, in each four pieces of 16: a lane's share of two mma.
  static constexpr int kSlab = 64 / kSize, kPiece = 16 / kSize;
  static constexpr int kDepth = kCtas * kUnits, kWarpSlabs = kDepth / kSlab / kSplit;

  // Slabs whose weights stay in registers. Many take more than a warp's share: the moving warps
  // give up theirs, or, where registers do not move, some slabs stand in shared memory.
  static constexpr bool kCrowded = kWarpSlabs > 4;
  static constexpr int kSpareSlabs = kCrowded ? kTiles : 0;
  static constexpr int kKeptSlabs = kWarpSlabs - (FASTLSTM_MOVES_REGISTERS ? 0 : kSpareSlabs);
  static constexpr int kSpare = kSpareSlabs * 64 * 32 * kWarps;
  static constexpr int kComputeRegisters = 200, kMoveRegisters = 104;

  // Warps that move what comes and goes. Registers are dealt to warps by fours: to eight and one as
  // few as to twelve.
  static constexpr int kMovers = 4;
  static constexpr int kThreads = 32 * (kWarps + kMovers);
  // A CTA has the registers with which its threads begin: who asks for more waits for ever.
  static_assert(32 * (kWarps * kComputeRegisters + kMovers * kMoveRegisters) <=
                    kThreads * registers_at_entry(kThreads),
                "registers");

  // Steps by which the input's part is loaded ahead.
  static constexpr int kRing = 8;

  // ---- bytes of shared memory ----
  // Two buffers of h: slab after slab, in each 64 bytes a sequence.
  static constexpr int kSlabBytes = 64 * kSequences, kHidden = kDepth * kSequences * kSize;
  // What a CTA sends to each of the cluster.
  static constexpr int kSent = kUnits * kSequences * kSize;
  // Partial sums that a warp hands to the one with the other half of K.
  static constexpr int kSums = kSplit == 2 ? kWarps * kCells * 512 : 0;
  // A sequence's input part, and what leaves of it: h, the four gates (S), the cell state (fp32).
  // 16 bytes apart from a multiple of 64, so that a warp's accesses meet no bank twice.
  static constexpr int kInput = 16 * kUnits + 16;
  static constexpr int kOutput = 5 * kUnits * kSize + 4 * kUnits + 16;
  static_assert(kInput % 64 == 16 && kOutput % 64 == 16, "banks");

  static constexpr int kTileAt = 2 * kHidden;
  static constexpr int kSumsAt = kTileAt + (kCtas > 1 ? 2 * kSent : 0);
  static constexpr int kInputAt = kSumsAt + kSums;
  static constexpr int kOutputAt = kInputAt + kRing * kSequences * kInput;
  static constexpr int kBiasAt = kOutputAt + 2 * kSequences * kOutput;
  static constexpr int kRulesAt = kBiasAt + 16 * kUnits;
  static constexpr int kSpansAt = kRulesAt + 12 * kCells * 32 * kWarps;
  static constexpr int kSpareAt = kSpansAt + 8 * kSequences;
  static constexpr int kBarriersAt = kSpareAt + kSpare;
  static constexpr int kShared = kBarriersAt + (2 + kRing) * int(sizeof(Mbarrier));
  static_assert(kBarriersAt % 8 == 0 && kShared <= 227 * 1024, "fits an SM");
};

// Bytes from the beginning of a buffer of h, or of the CTA's own part of one: a unit of a sequence.
template <class F>
__device__ __forceinline__ constexpr int hidden_at(int unit, int sequence) {
  const int piece = unit % F::kSlab / F::kPiece ^ sequence / 2 % 4;
  return unit / F::kSlab * F::kSlabBytes + sequence * 64 + piece * 16 + unit % F::kPiece * F::kSize;
}

// What h is as an operand: itself, or rounded to tf32.
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

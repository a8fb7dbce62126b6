// A backward CTA's product with its dgates, whose partial sums go to the owners of their units.
//
// The left operand is the CTA's rows of W_hh, transposed: its rows are units of the whole layer, in
// blocks of 32. A warp has kBlocks neighbouring ones. A lane's sums of a block are four
// neighbouring units of two sequences. K is the CTA's (unit, gate) pairs, in slabs of 64 bytes: a
// lane's 16 bytes are two gates of each of two units or, for floats, all gates of one unit.
#pragma once

#include "phase.cuh"
#include "shapes.h"
#include "threads.cuh"

namespace fastlstm {
namespace cuda {

// Where a team's exchange has what its CTAs receive: (CTA, place, sequence, source, unit).
struct GridSums {
  unsigned char* exchange;  // of the team
  int blocks, slot;         // of the layer; this CTA
};

// A kernel's shape as a type.
template <class S_, int kShape>
struct TensorBackwardGrid {
  typedef S_ S;
  static constexpr GridBackwardShape kGrid = kGridBackward[kShape];
};
template <int kShape>
struct Fp32BackwardGrid {
  typedef float S;
  static constexpr GridBackwardShape kGrid = kGridBackwardFp32[kShape];
};

// What the products by tensor cores and by multiply-adds (backward_fp32.cuh) have in common: the
// weights on chip, and where the sums go.
template <class Grid, int kWarpBlocks>
class GridBackwardWeights {
  typedef typename Grid::S S;

 public:
  static constexpr GridBackwardShape kGrid = Grid::kGrid;
  static constexpr BackwardLayout kLayout = backward_layout(kGrid, sizeof(S));
  static constexpr int kTiles = kGrid.tiles, kSlabs = kGrid.slabs(sizeof(S));
  static constexpr int kBlocks = kWarpBlocks, kUnits = kGrid.units;
  static constexpr int kParts = kBlocks * kSlabs;
  static constexpr int kHeld = kGrid.held(kBlocks, sizeof(S)), kShared = kParts - kHeld;
  // Of a sequence's sums, and of those of all sequences.
  static constexpr int kRowBytes = sums_row_bytes(kBlocks);
  static constexpr int kPlaceBytes = kGrid.sequences() * kRowBytes;

  // Fragments of this CTA: [block][slab][part][lane], 16 bytes each. The warps of the CTAs
  // have their blocks in different orders: otherwise all would send to one CTA at a time.
  __device__ __forceinline__ GridBackwardWeights(const uint4* fragments, unsigned char* shared,
                                                 const GridSums& sums) {
    const int warp = warp_of_thread(), lane = lane_of_thread();
    const int first = (warp + sums.slot) % kGridWarps * kBlocks;
    count_ = sums.blocks - first;
    const int unit = first * 32 + lane / 4 * 4;
    to_ = sums.exchange + int64_t(unit / kUnits) * (2 * kPlaceBytes) + lane % 4 * 2 * kRowBytes +
          (sums.slot * kUnits + unit % kUnits) * 4;
    auto exists = [&](int part) { return part / kSlabs < count_; };
    auto from = [&](int part) {
      return fragments + (exists(part) ? first * kSlabs + part : 0) * kGridBlockFragments + lane;
    };
#pragma unroll
    for (int part = 0; part < kHeld; ++part) {
      const uint4* source = from(part);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        held_[part][j] = exists(part) ? source[j * 32] : make_uint4(0, 0, 0, 0);
    }
    uint4* to = reinterpret_cast<uint4*>(shared) + warp * kShared * kGridBlockFragments + lane;
    shared_ = to;
    for (int part = 0; part < kShared; ++part) {
      const uint4* source = from(kHeld + part);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        copy_async(to + part * kGridBlockFragments + j * 32, source + j * 32,
                   exists(kHeld + part) ? 16 : 0);
    }
    commit_async();
  }

 protected:
  // Part j of a slab of one of the warp's blocks.
  __device__ __forceinline__ uint4 fragment(int part, int j) const {
    return part < kHeld ? held_[part < kHeld ? part : 0][j]
                        : shared_[(part - kHeld) * kGridBlockFragments + j * 32];
  }
  // Where the sums of a block of 32 units go: its first four units of this lane's first sequence.
  __device__ __forceinline__ unsigned char* block_at(int block, int place) const {
    return to_ + place * kPlaceBytes + block * (32 / kUnits * 2 * kPlaceBytes);
  }

  uint4 held_[kHeld][4];
  const uint4* shared_;
  unsigned char* to_;
  int count_;  // this warp's blocks that the layer has, if fewer than kBlocks
};

template <class S, int kShape, int kWarpBlocks>
class GridBackwardProduct : GridBackwardWeights<TensorBackwardGrid<S, kShape>, kWarpBlocks> {
  typedef GridBackwardWeights<TensorBackwardGrid<S, kShape>, kWarpBlocks> Weights;
  using Weights::count_, Weights::kHeld;

 public:
  typedef S Storage;
  typedef MmaElement<S> Operand;
  typedef FastMath Math;
  using Weights::kGrid, Weights::kLayout, Weights::kTiles, Weights::kSlabs, Weights::kBlocks,
      Weights::kUnits, Weights::kShared, Weights::kRowBytes, Weights::kPlaceBytes;
  static constexpr bool kStreams = kShared > 0 && kShared >= kHeld / 2;
  static constexpr int kChains = kTiles == 1 ? 2 : 1;

  using Weights::Weights;

  // Where a lane's dgates begin among those of its first slab.
  __device__ __forceinline__ static int operands_at() { return lane_of_thread() * 16; }

  // Multiplies the dgates in shared memory, where those of this lane begin at `dgates`, and sends
  // the sums to that place of their owners. The sums of a block are sent while the next block is
  // multiplied.
  __device__ __forceinline__ void send(const unsigned char* dgates, int place,
                                       uint32_t phase) const {
    uint4 b[kTiles][kSlabs];
#pragma unroll
    for (int k = 0; k < kSlabs; ++k)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
        b[n][k] = *reinterpret_cast<const uint4*>(dgates + (n * kSlabs + k) * kLayout.tile_bytes);
    Sums sums[2];
#pragma unroll
    for (int j = 0; j <= kBlocks; ++j) {
      if (j < kBlocks) multiply(sums[j % 2], j, b);
      if (j > 0)
        send_block(sums[(j - 1) % 2], this->block_at(j - 1, place), uint32_t(j - 1 < count_),
                   phase);
    }
  }

 private:
  typedef float Sums[kChains][kTiles][2][4];

  __device__ __forceinline__ void multiply(Sums& sums, int j,
                                           const uint4 (&b)[kTiles][kSlabs]) const {
#pragma unroll
    for (int i = 0; i < kChains * kTiles * 8; ++i) (&sums[0][0][0][0])[i] = 0;
#pragma unroll
    for (int k = 0; k < kSlabs; ++k)
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const uint4 w = this->fragment(j * kSlabs + k, step * 2 + tile);
          const uint32_t a[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            const uint32_t x[2] = {step ? b[n][k].z : b[n][k].x, step ? b[n][k].w : b[n][k].y};
            mma(sums[step * (kChains - 1)][n][tile], a, x, Operand());
          }
        }
    if (kChains == 2) {
#pragma unroll
      for (int i = 0; i < kTiles * 8; ++i)
        (&sums[0][0][0][0])[i] += (&sums[kChains - 1][0][0][0])[i];
    }
  }

  __device__ __forceinline__ static void send_block(const Sums& sums, unsigned char* to,
                                                    uint32_t exists, uint32_t phase) {
    // Where many weights come from shared memory, a branch keeps the compiler from loading those of
    // later blocks earlier than there are registers for.
    if (kStreams && !exists) return;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float (&low)[4] = sums[0][n][0], (&high)[4] = sums[0][n][1];
        const uint4 packet = make_uint4(tagged(low[e], phase), tagged(low[2 + e], phase),
                                        tagged(high[e], phase), tagged(high[2 + e], phase));
        if constexpr (kStreams)
          send_packet(to + (8 * n + e) * kRowBytes, packet);
        else
          send_packet(to + (8 * n + e) * kRowBytes, packet, exists);
      }
  }
};

// ---- what the owner of units receives ----
//
// A warp has whole sequences. A lane reads 16 bytes: the sums of some units from one CTA. It adds
// those of several CTAs, then the lanes add their results, all in a fixed order. In the end a lane
// has the sum of one unit; with 16 units in a CTA, two lanes have the same one.
template <class Product>
class ReceivedSums {
 public:
  static constexpr int kUnits = Product::kUnits, kTiles = Product::kTiles;
  static constexpr int kValues = 4;                                // of a packet
  static constexpr int kLanes = kUnits / kValues;                  // packets of a source
  static constexpr int kPackets = Product::kRowBytes / (32 * 16);  // of a lane and sequence
  static constexpr int kTogether = kPackets % 4 == 0 ? 4 : kPackets % 3 == 0 ? 3 : 2;
  static constexpr int kChunks = kTiles * kPackets / kTogether;
  // Layers that need fewer than these run with the kernel of fewer blocks: all lanes have them.
  static constexpr int kWhole = Product::kBlocks == 1
                                    ? 0
                                    : kGridBlocks[block_choice(Product::kBlocks * kGridWarps) - 1] *
                                          kPackets / Product::kBlocks;

  __device__ __forceinline__ explicit ReceivedSums(const GridSums& sums) {
    const int lane = lane_of_thread();
    from_ = sums.exchange + int64_t(sums.slot) * (2 * Product::kPlaceBytes) +
            warp_of_thread() * Product::kRowBytes + lane * 16;
    const int packets = sums.blocks * 32 / kValues;
    exists_ = 0;
#pragma unroll
    for (int i = 0; i < kPackets; ++i) exists_ |= uint32_t(i * 32 + lane < packets) << i;
  }

  // Adds the received sums to dh[j], for sequence warp + 8 j. What no CTA sends stays zero.
  template <class Add>
  __device__ __forceinline__ void wait_and_add(int place, uint32_t phase, uint64_t limit,
                                               Add&& add) const {
    const unsigned char* const from = from_ + place * Product::kPlaceBytes;
    auto at = [&](int f, int i) {
      const int x = f * kTogether + i;
      return from + x / kPackets * 8 * Product::kRowBytes + x % kPackets * 512;
    };
    auto off = [&](int f, int i, const uint4& v) {
      const uint4 one[1] = {v};
      const int packet = (f * kTogether + i) % kPackets;
      return off_phase(one, phase) & (packet < kWhole ? kSumPhase : exists_ >> packet & kSumPhase);
    };
    uint4 v[2][kTogether];
#pragma unroll
    for (int f = 0; f < least_of(2, kChunks); ++f)
#pragma unroll
      for (int i = 0; i < kTogether; ++i) v[f][i] = poll_packet(at(f, i));
    float sum[kValues];
#pragma unroll
    for (int f = 0; f < kChunks; ++f) {
      uint4(&packets)[kTogether] = v[f % 2];
      auto any_off = [&] {
        uint32_t result = 0;
#pragma unroll
        for (int i = 0; i < kTogether; ++i) result |= off(f, i, packets[i]);
        return __ballot_sync(~0u, result != 0) != 0;
      };
      if (any_off()) {
        PollingPatience patience(limit);
        do {
#pragma unroll
          for (int next = f; next < least_of(f + 2, kChunks); ++next)
#pragma unroll
            for (int i = 0; i < kTogether; ++i)
              poll_packet_if(off(next, i, v[next % 2][i]), at(next, i), v[next % 2][i]);
          patience.check();
        } while (any_off());
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const bool first = (f * kTogether + i) % kPackets == 0;
        const uint32_t words[4] = {packets[i].x, packets[i].y, packets[i].z, packets[i].w};
#pragma unroll
        for (int k = 0; k < kValues; ++k)
          sum[k] = first ? float_of(words[k]) : sum[k] + float_of(words[k]);
      }
      if (f + 2 < kChunks) {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) packets[i] = poll_packet(at(f + 2, i));
      }
      if ((f + 1) * kTogether % kPackets == 0)
        add((f + 1) * kTogether / kPackets - 1, over_lanes(sum));
    }
  }

  // This thread's unit in the CTA, and its number among the lanes that have that unit.
  __device__ __forceinline__ static int unit() {
    const int lane = lane_of_thread();
    int unit = lane % kLanes * kValues;
#pragma unroll
    for (int bit = 16, step = kValues / 2; step > 0; bit /= 2, step /= 2)
      if (lane & bit) unit += step;
    return unit;
  }
  static constexpr int kCopies = 32 / kUnits;
  __device__ __forceinline__ static int copy() {
    return kCopies == 1 ? 0 : lane_of_thread() / kLanes % kCopies;
  }

 private:
  __device__ __forceinline__ static float over_lanes(float (&sum)[kValues]) {
    const int lane = lane_of_thread();
    int left = kValues;
#pragma unroll
    for (int bit = 16; bit >= kLanes; bit /= 2) {
      left /= 2;
      if (left == 0) {
        sum[0] += __shfl_xor_sync(~0u, sum[0], bit);
        continue;
      }
      const bool high = lane & bit;
#pragma unroll
      for (int k = 0; k < left; ++k) {
        const float other = high ? sum[k] : sum[k + left];
        sum[k] = (high ? sum[k + left] : sum[k]) + __shfl_xor_sync(~0u, other, bit);
      }
    }
    return sum[0];
  }

  const unsigned char* from_;
  uint32_t exists_;  // a bit for each packet of this lane that a CTA sends
};

}  // namespace cuda
}  // namespace fastlstm

// A backward CTA's product with its dgates, whose partial sums go to the owners of their units.
//
// The left operand is the CTA's rows of W_hh, transposed: its rows are units of the whole layer, in
// blocks of 32. A lane's sums of a block are four neighbouring units of two sequences. K is the
// CTA's (unit, gate) pairs, in slabs of 64 bytes: a lane's 16 bytes are two gates of each of two
// units or, for floats, all gates of one unit.
#pragma once

#include "phase.cuh"
#include "shapes.h"
#include "threads.cuh"

namespace fastlstm {
namespace cuda {

template <class S, int kShape>
class GridBackwardProduct {
 public:
  static constexpr GridBackwardShape kGrid = kGridBackward[kShape];
  static constexpr BackwardLayout kLayout = backward_layout(kGrid, sizeof(S));
  static constexpr int kTiles = kGrid.tiles, kSlabs = kGrid.slabs(sizeof(S));
  static constexpr int kBlocks = kGrid.most_blocks(sizeof(S)), kUnits = kGrid.units;
  static constexpr int kChains = kTiles == 1 ? 2 : 1;

  // Fragments of this CTA: [block][slab][k-step, tile][lane], 16 bytes each. A warp has every
  // eighth block. It begins with those of the CTA's own units: otherwise all would send to one CTA
  // at a time.
  __device__ __forceinline__ GridBackwardProduct(const uint4* fragments, unsigned char* shared,
                                                 int blocks, int slot)
      : warp_(warp_of_thread()), blocks_(blocks), rotation_(slot * kUnits / 32) {
    const int lane = lane_of_thread();
    auto from = [&](int part) {
      const int block = block_of(part / kSlabs);
      return has_block(part / kSlabs)
                 ? fragments + (block * kSlabs + part % kSlabs) * kGridBlockFragments + lane
                 : nullptr;
    };
#pragma unroll
    for (int part = 0; part < kGrid.register_blocks; ++part) {
      const uint4* source = from(part);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        register_weights_[part][j] = source ? source[j * 32] : make_uint4(0, 0, 0, 0);
    }
    const int parts = backward_shared_blocks(kGrid, blocks, sizeof(S));
    uint4* to = reinterpret_cast<uint4*>(shared) + warp_ * parts * kGridBlockFragments + lane;
    shared_weights_ = to;
    for (int part = 0; part < parts; ++part) {
      const uint4* source = from(kGrid.register_blocks + part);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (source) copy_async(to + part * kGridBlockFragments + j * 32, source + j * 32, 16);
    }
    commit_async();
  }

  // Multiplies the dgates in shared memory and sends the sums. `to` is where the first CTA of the
  // team receives those of this CTA; each further CTA's place is `received` bytes behind.
  __device__ __forceinline__ void send(const unsigned char* dgates, unsigned char* to,
                                       int64_t received, uint32_t phase) const {
    const int lane = lane_of_thread();
    uint4 b[kTiles][kSlabs];
#pragma unroll
    for (int k = 0; k < kSlabs; ++k)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
        b[n][k] = *reinterpret_cast<const uint4*>(dgates + (n * kSlabs + k) * kLayout.tile_bytes +
                                                  lane * 16);
    // The order of sums in a place: sequence, then source, then unit.
    const int sequence_bytes = blocks_ * 32 * 4;
    const int unit = lane / 4 * 4;  // of a block
    to += unit / kUnits * received + lane % 4 * 2 * sequence_bytes + unit % kUnits * 4;
    // The sums of a block are sent while the next block is multiplied.
    Sums sums[2];
#pragma unroll
    for (int j = 0; j <= kBlocks; ++j) {
      if (j < kBlocks && has_block(j)) multiply(sums[j % 2], j, b);
      if (j > 0 && has_block(j - 1))
        send_block(sums[(j - 1) % 2], to + block_of(j - 1) * (32 / kUnits) * received,
                   sequence_bytes, phase);
    }
  }

 private:
  typedef float Sums[kChains][kTiles][2][4];

  __device__ __forceinline__ bool has_block(int j) const {
    return j * kGridWarps + warp_ < blocks_;
  }
  __device__ __forceinline__ int block_of(int j) const {
    const int block = j * kGridWarps + warp_ + rotation_;
    return block < blocks_ ? block : block - blocks_;
  }

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
          const int part = j * kSlabs + k, i = step * 2 + tile;
          const uint4 w =
              part < kGrid.register_blocks
                  ? register_weights_[part < kGrid.register_blocks ? part : 0][i]
                  : shared_weights_[(part - kGrid.register_blocks) * kGridBlockFragments + i * 32];
          const uint32_t a[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            const uint32_t x[2] = {step ? b[n][k].z : b[n][k].x, step ? b[n][k].w : b[n][k].y};
            mma(sums[step * (kChains - 1)][n][tile], a, x, typename PhaseCode<S>::Element());
          }
        }
    if (kChains == 2) {
#pragma unroll
      for (int i = 0; i < kTiles * 8; ++i)
        (&sums[0][0][0][0])[i] += (&sums[kChains - 1][0][0][0])[i];
    }
  }

  __device__ __forceinline__ static void send_block(const Sums& sums, unsigned char* to,
                                                    int sequence_bytes, uint32_t phase) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float (&low)[4] = sums[0][n][0], (&high)[4] = sums[0][n][1];
        send_packet(to + (8 * n + e) * sequence_bytes,
                    make_uint4(tagged(low[e], phase), tagged(low[2 + e], phase),
                               tagged(high[e], phase), tagged(high[2 + e], phase)));
      }
  }

  uint4 register_weights_[kGrid.register_blocks][4];
  const uint4* shared_weights_;
  const int warp_, blocks_, rotation_;
};

// ---- what the owner of units receives ----
//
// A warp has whole sequences. A lane reads 16 bytes: the sums of four units from one CTA. It adds
// those of several CTAs, then the lanes add their results, all in a fixed order. In the end a lane
// has the sum of one unit; with 16 units in a CTA, two lanes have the same one.
template <class Product>
class ReceivedSums {
 public:
  static constexpr int kUnits = Product::kUnits, kTiles = Product::kTiles;
  static constexpr int kTogether = 4;                              // packets checked at once
  static constexpr int kParts = Product::kBlocks * 2 / kTogether;  // of a sequence, at most

  __device__ __forceinline__ explicit ReceivedSums(int blocks) : packets_(blocks * 8) {}

  // Adds the received sums to dh. `from` is where those of this warp's first sequence begin.
  __device__ __forceinline__ void add_to(float (&dh)[kTiles], const unsigned char* from,
                                         uint32_t phase, uint64_t limit) const {
    const int lane = lane_of_thread(), sequence_bytes = packets_ * 16;
    from += lane * 16;
    auto has_packets = [&](int f) { return f % kParts * kTogether * 32 < packets_; };
    auto load = [&](int f, uint4(&v)[kTogether], bool all) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int packet = (f % kParts * kTogether + i) * 32;
        const uint4 one[1] = {v[i]};
        if (packet + lane < packets_ && (all || off_phase(one, phase) & kSumPhase))
          v[i] = poll_packet(from + f / kParts * 8 * sequence_bytes + packet * 16);
      }
    };
    auto zero = [&](uint4(&v)[kTogether]) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) v[i] = make_uint4(phase, phase, phase, phase);
    };
    uint4 v[2][kTogether];
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      zero(v[f]);
      if (f < kTiles * kParts && has_packets(f)) load(f, v[f], true);
    }
    float sum[4] = {};
#pragma unroll
    for (int f = 0; f < kTiles * kParts; ++f) {
      if (f % kParts == 0) sum[0] = sum[1] = sum[2] = sum[3] = 0;
      if (has_packets(f)) {
        uint4(&packets)[kTogether] = v[f % 2];
        if (__ballot_sync(~0u, (off_phase(packets, phase) & kSumPhase) != 0)) {
          PollingPatience patience(limit);
          do {
            load(f, packets, false);
            if (f + 1 < kTiles * kParts && has_packets(f + 1)) load(f + 1, v[(f + 1) % 2], false);
            patience.check();
          } while (__ballot_sync(~0u, (off_phase(packets, phase) & kSumPhase) != 0));
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          if ((f % kParts * kTogether + i) * 32 + lane >= packets_) continue;
          sum[0] += float_of(packets[i].x), sum[1] += float_of(packets[i].y);
          sum[2] += float_of(packets[i].z), sum[3] += float_of(packets[i].w);
        }
      }
      if (f + 2 < kTiles * kParts && has_packets(f + 2)) {
        zero(v[f % 2]);
        load(f + 2, v[f % 2], true);
      }
      if (f % kParts == kParts - 1) dh[f / kParts] += over_lanes(sum, lane);
    }
  }

  // This thread's unit in the CTA, and its number among the lanes that have that unit.
  __device__ __forceinline__ static int unit() {
    const int lane = recomputed_thread() % 32;
    return lane % (kUnits / 4) * 4 + lane / 16 * 2 + lane / 8 % 2;
  }
  static constexpr int kCopies = 32 / kUnits;
  __device__ __forceinline__ static int copy() {
    return kCopies == 1 ? 0 : recomputed_thread() % 8 / 4;
  }

 private:
  __device__ __forceinline__ static float over_lanes(const float (&sum)[4], int lane) {
    const bool high = lane & 16, odd = lane & 8;
    const float a = (high ? sum[2] : sum[0]) + __shfl_xor_sync(~0u, high ? sum[0] : sum[2], 16);
    const float b = (high ? sum[3] : sum[1]) + __shfl_xor_sync(~0u, high ? sum[1] : sum[3], 16);
    const float one = (odd ? b : a) + __shfl_xor_sync(~0u, odd ? a : b, 8);
    return kCopies == 1 ? one : one + __shfl_xor_sync(~0u, one, 4);
  }

  const int packets_;
};

}  // namespace cuda
}  // namespace fastlstm

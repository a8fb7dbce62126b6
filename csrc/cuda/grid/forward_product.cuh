// A forward CTA's product with h: its weights, the operands that it polls, and partial sums.
//
// K is split over the warps: slab k (64 bytes of every sequence's h) belongs to warp k % 8. So each
// element of h is read by one thread of a CTA. The 16 bytes that a thread polls are its B fragments
// of two mma: the order of K within a slab is the same in both operands, whatever it is. Weights
// are in blocks of 32 rows: the first mma multiplies the gates i and f of eight units, the second g
// and o, so that a thread's accumulators are all gates of its cells.
#pragma once

#include "phase.cuh"
#include "shapes.h"
#include "threads.cuh"

namespace fastlstm {
namespace cuda {

template <class S, int kShape>
class GridForwardProduct {
 public:
  static constexpr GridShape kGrid = kGridForward[kShape];
  static constexpr ForwardLayout kLayout = forward_layout(kGrid);
  static constexpr int kBlocks = kGrid.blocks(), kTiles = kGrid.tiles, kSlabs = kGrid.slabs;
  static constexpr int kSequences = kGrid.sequences();
  // Where there are few independent sums, each is split in two chains; where there are few tiles,
  // more loads are in flight.
  static constexpr int kChains = kBlocks * kTiles <= 2 ? 2 : 1;
  static constexpr int kAhead = kTiles == 1 ? 4 : kTiles == 2 ? 2 : 1;
  typedef float Sums[kChains][kBlocks][2][kTiles][4];

  // Fragments of this CTA: [slab][block][k-step, tile][lane], 16 bytes each.
  __device__ __forceinline__ GridForwardProduct(const uint4* fragments, unsigned char* shared,
                                                int slabs)
      : warp_(warp_of_thread()), slabs_(slabs) {
    const int warp = warp_, lane = lane_of_thread();
    auto from = [&](int block) {
      const int slab = block / kBlocks * kGridWarps + warp;
      return slab < slabs
                 ? fragments + (slab * kBlocks + block % kBlocks) * kGridBlockFragments + lane
                 : nullptr;
    };
#pragma unroll
    for (int block = 0; block < kGrid.register_blocks; ++block) {
      const uint4* source = from(block);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        register_weights_[block][j] = source ? source[j * 32] : make_uint4(0, 0, 0, 0);
    }
    const int shared_blocks = blocks_shared(kGrid, slabs);
    uint4* to =
        reinterpret_cast<uint4*>(shared) + warp * shared_blocks * kGridBlockFragments + lane;
    shared_weights_ = to;
    for (int block = 0; block < shared_blocks; ++block) {
      const uint4* source = from(kGrid.register_blocks + block);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (source) copy_async(to + block * kGridBlockFragments + j * 32, source + j * 32, 16);
    }
    commit_async();
  }

  // The offset of this thread's first packet in a place for h: [16 bytes of units][sequence].
  __device__ __forceinline__ int offset() const {
    const int lane = lane_of_thread();
    return ((warp_ * 4 + lane % 4) * kSequences + lane / 4) * 16;
  }

  // sums = weights times h. Waits until the bits `check` of all words equal those of `phase`.
  // operand(packet, tile, offset) may replace a packet before it is multiplied.
  template <class Operand>
  __device__ __forceinline__ void multiply(Sums& sums, const unsigned char* h, uint32_t phase,
                                           uint32_t check, uint64_t limit,
                                           Operand&& operand) const {
    const int warp = warp_;
    auto has_slab = [&](int k) { return k * kGridWarps + warp < slabs_; };
    auto place = [](int k, int j) { return (k * kGridWarps * 4 * kSequences + j * 8) * 16; };
    auto load = [&](int k, uint4(&v)[kTiles]) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) v[j] = poll_packet(h + place(k, j));
    };
    uint4 v[kAhead][kTiles];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (has_slab(k)) load(k, v[k]);
#pragma unroll
    for (int k = 0; k < kSlabs; ++k) {
      if (!has_slab(k)) continue;
      uint4(&packets)[kTiles] = v[k % kAhead];
      if (__ballot_sync(~0u, unsettled(packets, phase, check))) {
        PollingPatience patience(limit);
        while (__ballot_sync(~0u, (off_phase(packets, phase) & check) != 0)) {
#pragma unroll
          for (int d = 0; d < kAhead; ++d) {
            if (k + d >= kSlabs || !has_slab(k + d)) continue;
            uint4(&late)[kTiles] = v[(k + d) % kAhead];
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
              const uint4 one[1] = {late[j]};
              if (off_phase(one, phase) & check) late[j] = poll_packet(h + place(k + d, j));
            }
          }
          patience.check();
        }
        if (check) restore_nans(packets, phase);
      }
      uint4 b[kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        b[j] = make_uint4(packets[j].x ^ phase, packets[j].y ^ phase, packets[j].z ^ phase,
                          packets[j].w ^ phase);
        operand(b[j], j, place(k, j));
      }
      // The next load is issued before the products or, where registers are short, after them.
      const bool loads = k + kAhead < kSlabs && has_slab(k + kAhead);
      if (kTiles < 4 && loads) load(k + kAhead, packets);
      add(sums, k, b);
      if (kTiles >= 4 && loads) load(k + kAhead, packets);
    }
    if (kChains == 2) {
#pragma unroll
      for (int j = 0; j < kBlocks * 2 * kTiles * 4; ++j)
        (&sums[0][0][0][0][0])[j] += (&sums[kChains - 1][0][0][0][0])[j];
    }
  }

 private:
  // Whether a word is of another step, or stands for a NaN.
  __device__ __forceinline__ static bool unsettled(const uint4 (&v)[kTiles], uint32_t phase,
                                                   uint32_t check) {
    uint32_t bits = 0;
    auto look = [&](uint32_t word) {
      word ^= phase;
      bits |= word | (word + PhaseCode<S>::kAboveOne);
    };
#pragma unroll
    for (int j = 0; j < kTiles; ++j) look(v[j].x), look(v[j].y), look(v[j].z), look(v[j].w);
    return (bits & check) != 0;
  }
  // Restores NaNs; words keep their phase, which multiply() takes off.
  __device__ __forceinline__ static void restore_nans(uint4 (&v)[kTiles], uint32_t phase) {
    auto one = [&](uint32_t& word) { word = PhaseCode<S>::restore_nans(word ^ phase) ^ phase; };
#pragma unroll
    for (int j = 0; j < kTiles; ++j) one(v[j].x), one(v[j].y), one(v[j].z), one(v[j].w);
  }

  __device__ __forceinline__ void add(Sums& sums, int k, const uint4 (&b)[kTiles]) const {
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int m = 0; m < kBlocks; ++m)
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const int block = k * kBlocks + m, j = step * 2 + tile;
          const uint4 w =
              block < kGrid.register_blocks
                  ? register_weights_[block < kGrid.register_blocks ? block : 0][j]
                  : shared_weights_[(block - kGrid.register_blocks) * kGridBlockFragments + j * 32];
          const uint32_t a[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            const uint32_t x[2] = {step ? b[n].z : b[n].x, step ? b[n].w : b[n].y};
            mma(sums[step * (kChains - 1)][m][tile][n], a, x, typename PhaseCode<S>::Element());
          }
        }
  }

  uint4 register_weights_[kGrid.register_blocks][4];
  const uint4* shared_weights_;
  const int warp_, slabs_;
};

// ---- partial sums ----
//
// All eight warps have partial sums of every cell; one of them, the cell's owner, adds them. A
// warp's cells are numbered by (block, tile of sequences, one of two sequences), and an owner has
// `cells` successive ones.
template <class Product>
class PartialSums {
 public:
  static constexpr ForwardLayout kLayout = Product::kLayout;
  static constexpr int kCells = kLayout.cells, kOwners = kLayout.owners;

  __device__ __forceinline__ explicit PartialSums(unsigned char* shared)
      : warp_(warp_of_thread()), partial_(reinterpret_cast<float4*>(shared)) {}

  // Adds the partial sums of all warps: gates[cell] = i, f, g, o of this thread's cells. There is
  // at least one barrier of the CTA in it, before the first of which it calls before_barrier().
  template <class Before>
  __device__ __forceinline__ void add_up(typename Product::Sums& sums, int step,
                                         float (&gates)[kCells][4], Before&& before_barrier) const {
    const int warp = warp_, lane = lane_of_thread();
#pragma unroll
    for (int r = 0; r < kCells; ++r) {
      // A barrier separates the reads of a buffer from its next writes: with one buffer this
      // barrier, with two the barrier of the round between.
      if (kLayout.buffers == 1) __syncthreads();
      const int buffer = (step * kCells + r) % kLayout.buffers;
      float4* to = partial_ + buffer * (kLayout.partial_bytes / 16) + lane;
#pragma unroll
      for (int owner = 0; owner < kOwners; ++owner) {
        const int x = owner * kCells + r, m = x / (2 * Product::kTiles), e = x % 2;
        const int j = x / 2 % Product::kTiles;
        const float i = sums[0][m][0][j][e], f = sums[0][m][0][j][2 + e], g = sums[0][m][1][j][e],
                    o = sums[0][m][1][j][2 + e];
        if (owner == warp)
          gates[r][0] = i, gates[r][1] = f, gates[r][2] = g, gates[r][3] = o;
        else
          to[(owner * (kGridWarps - 1) + (warp < owner ? warp : warp - 1)) * 32] =
              make_float4(i, f, g, o);
      }
      if (r == 0) before_barrier();
      __syncthreads();
      if (warp >= kOwners) continue;
#pragma unroll
      for (int k = 0; k < kGridWarps - 1; ++k) {
        const float4 sum = to[(warp * (kGridWarps - 1) + k) * 32];
        gates[r][0] += sum.x, gates[r][1] += sum.y, gates[r][2] += sum.z, gates[r][3] += sum.w;
      }
    }
  }

  // Whether this thread owns cells; their unit in the CTA, and the sequence of each in the group.
  __device__ __forceinline__ bool owns() const { return warp_ < kOwners; }
  __device__ __forceinline__ int unit() const {
    return warp_ * kCells / (2 * Product::kTiles) * 8 + recomputed_thread() % 32 / 4;
  }
  __device__ __forceinline__ int sequence(int cell) const {
    const int x = warp_ * kCells + cell;
    return x / 2 % Product::kTiles * 8 + recomputed_thread() % 4 * 2 + x % 2;
  }

 private:
  const int warp_;
  float4* partial_;
};

}  // namespace cuda
}  // namespace fastlstm

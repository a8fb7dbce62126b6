// A forward CTA's product with h in full fp32, by multiply-adds.
//
// Lanes 4 g to 4 g + 3 have the gates of units g and g + 8, and split K: each has every fourth
// piece of four columns. A warp polls h as for the tensor cores, 16 bytes of a sequence a lane, and
// puts a slab of it in shared memory, where each lane reads its piece of all eight sequences: four
// floats feed 32 multiply-adds, while an SM makes 16 in the time of one such read. In the end the
// four lanes add up their sums, and each has those of two sequences, in the order of mma's
// accumulators: partial sums, cells and outputs are those of the tensor cores' kernels.
//
// Floor: 128 multiply-adds a cycle and SM: 1.55 us a step at H768 for 8 sequences of a CTA of 16
// units (1.98 GHz), besides the exchange.
#pragma once

#include "../shared/lane_sums.cuh"
#include "../shared/numeric.cuh"
#include "forward_weights.cuh"

namespace fastlstm {
namespace cuda {

template <int kShape>
class GridForwardFp32Product : GridForwardWeights<Fp32Grid<kShape>> {
  typedef GridForwardWeights<Fp32Grid<kShape>> Weights;
  using Weights::place, Weights::slabs_, Weights::warp_;

 public:
  typedef float Storage;
  typedef PhaseCode<float> Code;
  typedef FullMath Math;
  using Weights::kBlocks, Weights::kGrid, Weights::kSequences, Weights::offset;
  static constexpr ForwardLayout kLayout = forward_layout(kGrid);
  static constexpr int kTiles = kGrid.tiles, kSlabs = kGrid.slabs;
  static constexpr int kAhead = 2;
  static constexpr bool kHandsOver = true;
  static_assert(kLayout.parts == kGridWarps, "a place for the sums of all warps");
  typedef float Sums[kLayout.cells][4];  // what is added to the gates of the thread's own cells

  __device__ __forceinline__ GridForwardFp32Product(const uint4* fragments, unsigned char* shared,
                                                    int slabs)
      : Weights(fragments, shared, slabs), staged_(shared + weights_shared(kGrid, slabs)) {}

  // As GridForwardProduct's, a tile of eight sequences after the other. The sums of a tile go to
  // the owners of its cells at once: registers hold no more.
  template <class Meanwhile, class FirstHidden>
  __device__ __forceinline__ void multiply(Sums&, HiddenOperand h, uint64_t limit,
                                           Meanwhile&& meanwhile, FirstHidden&& h0) const {
    SequenceRange late{0, 0};
#pragma unroll 1
    for (int tile = 0; tile < kTiles; ++tile) {
      float products[8][kBlocks][4] = {};  // by sequence, block and gate
      HiddenOperand operand = h;
      uint32_t kept = ~h.check;
      // A second time for sequences that enter late.
#pragma unroll 1
      for (bool first = true;; first = false) {
        const int slabs = operand.packets ? slabs_ : 0;
        if (slabs > 0) operand.packets += place(0, tile);
        uint4 v[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
          if (k < slabs) v[k] = poll_packet(operand.packets + place(k, 0));
        if (first && tile == 0) late = meanwhile();
        multiply_slabs(products, operand, slabs, kept, v, limit);
        __syncwarp();  // all have read the last slab
        if (!first || late.begin >= late.end) break;
        operand = {h0(), 0, 0};
        const int n = tile * 8 + lane_of_thread() / 4;
        kept = late.begin <= n && n < late.end ? ~0u : 0u;
      }
      hand_over(tile, &products[0][0][0]);
    }
  }

 private:
  static constexpr int kStagedBytes = 8 * kGridSlabBytes;  // a slab of eight sequences

  __device__ __forceinline__ void multiply_slabs(float (&products)[8][kBlocks][4],
                                                 const HiddenOperand& h, int slabs, uint32_t kept,
                                                 uint4 (&v)[kAhead], uint64_t limit) const {
#pragma unroll
    for (int k = 0; k < kSlabs; ++k) {
      if (k >= slabs) break;
      uint4& packet = v[k % kAhead];
      auto waits = [&](const uint4& x) { return off_phase(x, h.phase) & h.check; };
      if (__any_sync(~0u, waits(packet) != 0)) {
        PollingPatience patience(limit);
        do {
#pragma unroll
          for (int d = 0; d < kAhead; ++d)
            if (k + d < kSlabs) {
              uint4& next = v[(k + d) % kAhead];
              poll_packet_if(k + d < slabs ? waits(next) : 0, h.packets + place(k + d, 0), next);
            }
          patience.check();
        } while (__any_sync(~0u, waits(packet) != 0));
      }
      // All lanes have read the slab before the last one when they meet for the last one.
      unsigned char* const staged =
          staged_ + (warp_ * kGrid.staged_slabs + k % kGrid.staged_slabs) * kStagedBytes;
      reinterpret_cast<uint4*>(staged)[lane_of_thread()] =
          make_uint4(packet.x & kept, packet.y & kept, packet.z & kept, packet.w & kept);
      if (k + kAhead < kSlabs && k + kAhead < slabs)
        packet = poll_packet(h.packets + place(k + kAhead, 0));
      __syncwarp();
      multiply_slab(products, k, staged + lane_of_thread() % 4 * 16);
    }
  }

  __device__ __forceinline__ void multiply_slab(float (&products)[8][kBlocks][4], int k,
                                                const unsigned char* piece) const {
    float h[8][4];  // by sequence and column
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float4 four = *reinterpret_cast<const float4*>(piece + n * kGridSlabBytes);
      h[n][0] = four.x, h[n][1] = four.y, h[n][2] = four.z, h[n][3] = four.w;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        const uint4 w = this->fragment(k * kBlocks + m, j);  // i, f, g, o
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          products[n][m][0] += float_of(w.x) * h[n][j];
          products[n][m][1] += float_of(w.y) * h[n][j];
          products[n][m][2] += float_of(w.z) * h[n][j];
          products[n][m][3] += float_of(w.w) * h[n][j];
        }
      }
  }

  // Of eight sequences a lane has two in the end: 2 * (lane % 4) and the next.
  __device__ __forceinline__ void hand_over(int tile, float* products) const {
    constexpr int kOfSequence = kBlocks * 4;
    order_halves<8 * kOfSequence>(products, 2);
    add_halves<8 * kOfSequence>(products, 2);
    order_halves<4 * kOfSequence>(products, 1);
    add_halves<4 * kOfSequence>(products, 1);
    float4* const partial =
        reinterpret_cast<float4*>(staged_ + staged_shared(kGrid)) + warp_ * 32 + lane_of_thread();
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float* sum = products + (e * kBlocks + m) * 4;
        partial[((m * kTiles + tile) * 2 + e) * kLayout.parts * 32] =
            make_float4(sum[0], sum[1], sum[2], sum[3]);
      }
  }

  unsigned char* const staged_;  // the slabs of all warps; behind them partial sums
};

}  // namespace cuda
}  // namespace fastlstm

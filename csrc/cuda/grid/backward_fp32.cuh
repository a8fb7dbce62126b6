// A backward CTA's product with its dgates in full fp32, by multiply-adds.
//
// Lanes 4 g to 4 g + 3 have units 4 g to 4 g + 3 of a block of 32, and split K: each has the gates
// of every fourth unit of the CTA. A lane reads the four dgates of its unit for one sequence after
// the other and multiplies them by two blocks' weights: four floats feed 32 multiply-adds. In the
// end the four lanes add up their sums, and each has those of two sequences, as of mma's
// accumulators.
#pragma once

#include "../shared/lane_sums.cuh"
#include "../shared/numeric.cuh"
#include "backward_product.cuh"

namespace fastlstm {
namespace cuda {

template <int kShape, int kWarpBlocks>
class GridBackwardFp32Product : GridBackwardWeights<Fp32BackwardGrid<kShape>, kWarpBlocks> {
  typedef GridBackwardWeights<Fp32BackwardGrid<kShape>, kWarpBlocks> Weights;
  using Weights::count_;

 public:
  typedef float Storage;
  typedef float Operand;
  typedef FullMath Math;
  using Weights::kGrid, Weights::kLayout, Weights::kTiles, Weights::kSlabs, Weights::kBlocks,
      Weights::kUnits, Weights::kShared, Weights::kRowBytes, Weights::kPlaceBytes;

  using Weights::Weights;

  __device__ __forceinline__ static int operands_at() { return lane_of_thread() % 4 * 16; }

  // As GridBackwardProduct's.
  __device__ __forceinline__ void send(const unsigned char* dgates, int place,
                                       uint32_t phase) const {
#pragma unroll
    for (int j = 0; j < kBlocks; j += 2) {
      if (j + 1 < kBlocks)
        send_blocks<2>(j, dgates, place, phase);
      else
        send_blocks<1>(j, dgates, place, phase);
    }
  }

 private:
  // kCount neighbouring blocks from block `first` on.
  template <int kCount>
  __device__ __forceinline__ void send_blocks(int first, const unsigned char* dgates, int place,
                                              uint32_t phase) const {
    if (first >= count_) return;
#pragma unroll 1
    for (int tile = 0; tile < kTiles; ++tile) {
      const unsigned char* const operands = dgates + tile * (kSlabs * kLayout.tile_bytes);
      float products[8][kCount][4] = {};  // by sequence, block and unit
#pragma unroll
      for (int k = 0; k < kSlabs; ++k)
        multiply_slab(products, first, k, operands + k * kLayout.tile_bytes);
      float* const sums = &products[0][0][0];
      order_halves<8 * kCount * 4>(sums, 2);
      add_halves<8 * kCount * 4>(sums, 2);
      order_halves<4 * kCount * 4>(sums, 1);
      add_halves<4 * kCount * 4>(sums, 1);
#pragma unroll
      for (int m = 0; m < kCount; ++m)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float (&x)[4] = products[e][m];
          send_packet(this->block_at(first + m, place) + (8 * tile + e) * kRowBytes,
                      make_uint4(tagged(x[0], phase), tagged(x[1], phase), tagged(x[2], phase),
                                 tagged(x[3], phase)),
                      uint32_t(first + m < count_));
        }
    }
  }

  template <int kCount>
  __device__ __forceinline__ void multiply_slab(float (&products)[8][kCount][4], int first, int k,
                                                const unsigned char* operands) const {
    uint4 weights[kCount][4];  // by block and gate: of four units
#pragma unroll
    for (int m = 0; m < kCount; ++m)
#pragma unroll
      for (int q = 0; q < 4; ++q) weights[m][q] = this->fragment((first + m) * kSlabs + k, q);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float4 four = *reinterpret_cast<const float4*>(operands + n * kGridSlabBytes);
      const float d[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int q = 0; q < 4; ++q)
#pragma unroll
        for (int m = 0; m < kCount; ++m) {
          const uint4& w = weights[m][q];
          products[n][m][0] += float_of(w.x) * d[q];
          products[n][m][1] += float_of(w.y) * d[q];
          products[n][m][2] += float_of(w.z) * d[q];
          products[n][m][3] += float_of(w.w) * d[q];
        }
    }
  }
};

}  // namespace cuda
}  // namespace fastlstm

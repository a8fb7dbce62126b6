// The products of the kernel that draws text: tiles of 16 rows of a weight matrix, in shared
// memory, times states in registers.
//
// Every warp computes all rows for its slice of the depth: slab p (64 bytes of a column) belongs to
// warp p % 8. A lane has 16 bytes of a slab, of column lane / 4. The words that it polled are its B
// fragments: the order of the depth is the same in A. Row r of a tile is gate r % 4 of unit r / 4.
// The warps' sums go to shared memory as [unit][column][gate], and are added there in one order, so
// that the result of a column depends on nothing but its own states.
#pragma once

#include "../generate_plan.h"
#include "words.cuh"

namespace fastlstm {
namespace cuda {

__device__ __forceinline__ int lane_id() { return int(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_id() { return int(threadIdx.x) / 32; }

template <int kTiles_, class S>
struct GenerateShape {
  typedef S Element;
  static constexpr int kTiles = kTiles_, kColumns = 8 * kTiles;
  static constexpr int kSlabs = generate_slabs(sizeof(S), kTiles);
  static constexpr int kPackets = kSlabs * kTiles;  // packet i * kTiles + n: slab i, tile n
};

// The place of a sum, in floats, among the sums of a warp and a tile of columns.
__device__ __forceinline__ int sum_place(int unit, int column, int gate) {
  return unit * 36 + column * 4 + gate;
}
template <class Shape>
__device__ __forceinline__ float* sums_of(float* partial, int tile, int warp, int n) {
  return partial + ((tile * kGenerateWarps + warp) * Shape::kTiles + n) * (kGeneratePartial / 4);
}

// Half types: by tensor cores, in two chains of sums to hide their latency.
template <class Shape>
__device__ __forceinline__ void multiply_half(const unsigned char* weights, int slabs,
                                              const uint4 (&b)[Shape::kPackets], float* partial,
                                              int tile) {
  typedef typename Shape::Element S;
  const int lane = lane_id(), warp = warp_id();
  float sums[2][Shape::kTiles][4] = {};
#pragma unroll
  for (int i = 0; i < Shape::kSlabs; ++i) {
    const int slab = i * kGenerateWarps + warp;
    if (slab >= slabs) break;
    const uint4* fragment = reinterpret_cast<const uint4*>(weights) + slab * 64 + lane;
    const uint4 top = fragment[0], low = fragment[32];
    const uint32_t first[4] = {top.x, low.x, top.y, low.y};
    const uint32_t second[4] = {top.z, low.z, top.w, low.w};
#pragma unroll
    for (int n = 0; n < Shape::kTiles; ++n) {
      const uint4& v = b[i * Shape::kTiles + n];
      const uint32_t b_first[2] = {v.x, v.y}, b_second[2] = {v.z, v.w};
      mma(sums[0][n], first, b_first, S());
      mma(sums[1][n], second, b_second, S());
    }
  }
#pragma unroll
  for (int n = 0; n < Shape::kTiles; ++n) {
    float* to = sums_of<Shape>(partial, tile, warp, n);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      to[sum_place(lane / 16 + e / 2 * 2, lane % 4 * 2 + e % 2, lane / 4 % 4)] =
          sums[0][n][e] + sums[1][n][e];
  }
}

// float: by multiply-adds. A lane sums all 16 rows over its four elements of every slab; then the
// four lanes of a column add their sums, and each has four rows of the result.
template <class Shape>
__device__ __forceinline__ void multiply_float(const unsigned char* weights, int slabs,
                                               const uint4 (&b)[Shape::kPackets], float* partial,
                                               int tile) {
  const int lane = lane_id(), warp = warp_id(), part = lane % 4;
  float sums[Shape::kTiles][16] = {};
#pragma unroll
  for (int i = 0; i < Shape::kSlabs; ++i) {
    const int slab = i * kGenerateWarps + warp;
    if (slab >= slabs) break;
    const float4* rows = reinterpret_cast<const float4*>(weights) + slab * 64 + part;
#pragma unroll
    for (int r = 0; r < 16; ++r) {
      const float4 w = rows[4 * r];
#pragma unroll
      for (int n = 0; n < Shape::kTiles; ++n) {
        const uint4& v = b[i * Shape::kTiles + n];
        float& sum = sums[n][r];
        sum = fmaf(w.x, bits_of<float>(v.x), sum);
        sum = fmaf(w.y, bits_of<float>(v.y), sum);
        sum = fmaf(w.z, bits_of<float>(v.z), sum);
        sum = fmaf(w.w, bits_of<float>(v.w), sum);
      }
    }
  }
  const bool high = part & 2, odd = part & 1;
#pragma unroll
  for (int n = 0; n < Shape::kTiles; ++n) {
    float half[8], mine[4];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float low_rows = sums[n][j], high_rows = sums[n][8 + j];
      half[j] =
          (high ? high_rows : low_rows) + __shfl_xor_sync(~0u, high ? low_rows : high_rows, 2);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
      mine[j] =
          (odd ? half[4 + j] : half[j]) + __shfl_xor_sync(~0u, odd ? half[j] : half[4 + j], 1);
    float* to = sums_of<Shape>(partial, tile, warp, n) + sum_place(part, lane / 4, 0);
    *reinterpret_cast<float4*>(to) = make_float4(mine[0], mine[1], mine[2], mine[3]);
  }
}

template <class Shape>
__device__ __forceinline__ void multiply_tile(const unsigned char* weights, int slabs,
                                              const uint4 (&b)[Shape::kPackets], float* partial,
                                              int tile) {
  if constexpr (sizeof(typename Shape::Element) == 4)
    multiply_float<Shape>(weights, slabs, b, partial, tile);
  else
    multiply_half<Shape>(weights, slabs, b, partial, tile);
}

// The sums of all warps for the four gates of a unit. Called behind a barrier.
template <class Shape>
__device__ __forceinline__ float4 total_of(const float* partial, int tile, int n, int unit,
                                           int column) {
  float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
  for (int w = 0; w < kGenerateWarps; ++w) {
    const float4 part = *reinterpret_cast<const float4*>(
        sums_of<Shape>(const_cast<float*>(partial), tile, w, n) + sum_place(unit, column, 0));
    total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
  }
  return total;
}

}  // namespace cuda
}  // namespace fastlstm

// Sums that neighbouring lanes add up by exchanging halves: of their sums each lane ends up with
// its share, always added in the same order.
#pragma once

#include "exchange.cuh"

namespace fastlstm {
namespace cuda {

// The bit of a lane's number by which it and its partner, lane ^ distance, divide their sums.
__device__ __forceinline__ bool is_upper(int distance) { return threadIdx.x & distance; }

// Of kCount sums brings those to the front that this thread keeps: in upper lanes the second half.
template <int kCount>
__device__ __forceinline__ void order_halves(float* sums, int distance) {
  const bool upper = is_upper(distance);
#pragma unroll
  for (int x = 0; x < kCount / 2; ++x) {
    const float first = sums[x], second = sums[x + kCount / 2];
    sums[x] = upper ? second : first;
    sums[x + kCount / 2] = upper ? first : second;
  }
}

// Adds the partner's second half of kCount sums to this thread's first.
template <int kCount>
__device__ __forceinline__ void add_halves(float* sums, int distance) {
#pragma unroll
  for (int x = 0; x < kCount / 2; ++x)
    sums[x] += __shfl_xor_sync(0xffffffffu, sums[x + kCount / 2], distance);
}

}  // namespace cuda
}  // namespace fastlstm

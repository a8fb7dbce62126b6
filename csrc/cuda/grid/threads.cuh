// A thread's indices, for the grid kernels.
#pragma once

#include "../shared/device.cuh"

namespace fastlstm {
namespace cuda {

// By a shuffle, so that the compiler knows that it is uniform in a warp.
__device__ __forceinline__ int warp_of_thread() {
  return __shfl_sync(~0u, int(threadIdx.x) / 32, 0);
}
__device__ __forceinline__ int lane_of_thread() { return threadIdx.x % 32; }
// The thread's index, pinned: what is computed from it is computed anew in every step, instead of
// occupying registers from step to step.
__device__ __forceinline__ int recomputed_thread() {
  uint32_t thread = threadIdx.x;
  pin(thread);
  return int(thread);
}

}  // namespace cuda
}  // namespace fastlstm

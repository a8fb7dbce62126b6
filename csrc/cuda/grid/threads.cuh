// Numbers of a thread that the grid kernels ask for.
#pragma once

#include "../device.cuh"

namespace fastlstm {
namespace cuda {

// By a shuffle: so it is known to be the same for all lanes.
__device__ __forceinline__ int warp_of_thread() {
  return __shfl_sync(~0u, int(threadIdx.x) / 32, 0);
}
__device__ __forceinline__ int lane_of_thread() { return threadIdx.x % 32; }
// Of the same value each time, but what is made of it is not kept in registers from step to step.
__device__ __forceinline__ int thread_again() {
  uint32_t thread = threadIdx.x;
  pin(thread);
  return int(thread);
}

}  // namespace cuda
}  // namespace fastlstm

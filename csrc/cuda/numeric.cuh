// Storage types, the types in which they are summed, and the cell's functions on the device.
#pragma once

#include <cmath>

#include "cell.h"
#include "device.cuh"

namespace fastlstm {
namespace cuda {

template <class S>
struct AccOf {
  typedef float type;
};
template <>
struct AccOf<double> {
  typedef double type;
};
template <class S>
using Acc = typename AccOf<S>::type;

__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ float to_acc(Bf16 x) { return to_float(x); }
__device__ __forceinline__ float to_acc(F16 x) { return to_float(x); }

__device__ __forceinline__ void from_acc(float x, float& to) { to = x; }
__device__ __forceinline__ void from_acc(double x, double& to) { to = x; }
__device__ __forceinline__ void from_acc(float x, Bf16& to) { from_float(x, to); }
__device__ __forceinline__ void from_acc(float x, F16& to) { from_float(x, to); }

// The value of an element that may be absent.
template <class S>
__device__ __forceinline__ Acc<S> value_or_zero(const S* from, int64_t at) {
  return from ? to_acc(from[at]) : Acc<S>(0);
}

// The accurate functions: a step's cells are few beside its products.
template <class T>
struct Math;
template <>
struct Math<float> {
  FASTLSTM_INLINE static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
  FASTLSTM_INLINE static float tanh(float x) { return tanhf(x); }
  FASTLSTM_INLINE static float one() { return 1.0f; }
};
template <>
struct Math<double> {
  FASTLSTM_INLINE static double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
  FASTLSTM_INLINE static double tanh(double x) { return ::tanh(x); }
  FASTLSTM_INLINE static double one() { return 1.0; }
};

// By the special function unit, for the kernels whose steps wait for their cells: errors of about
// 1e-7, far below what the half types and tf32 round away. expf and tanhf cost six times as much.
struct FastMath {
  __device__ __forceinline__ static float sigmoid(float x) {
    return reciprocal_fast(1.0f + exp2_fast(x * -kLog2E));
  }
  __device__ __forceinline__ static float tanh(float x) {
    const float e = exp2_fast(fabsf(x) * (-2.0f * kLog2E));
    return copysignf((1.0f - e) * reciprocal_fast(1.0f + e), x);
  }
  __device__ __forceinline__ static float one() { return 1.0f; }

 private:
  static constexpr float kLog2E = 1.4426950408889634f;
};

}  // namespace cuda
}  // namespace fastlstm

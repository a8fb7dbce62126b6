// Storage types, the types in which they are summed, accesses to neighbours, the cell's functions
// on the device, and how gates are stored.
#pragma once

#include <cmath>
#include <type_traits>

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

// The type of a storage type's elements as operands of mma: floats are tf32, rounded beforehand.
template <class S>
using MmaElement = std::conditional_t<std::is_same_v<S, float>, RoundedFloat, S>;

// The value of an element that may be absent.
template <class S>
__device__ __forceinline__ Acc<S> value_or_zero(const S* from, int64_t at) {
  return from ? to_acc(from[at]) : Acc<S>(0);
}

// The unit whose weights take the place of one that a layer of `units` units may not have. Kernels
// compute those, too, and multiply their h by zeros. It may be no NaN, which zeros in their rows
// would make of an infinite input or h0: so the last unit stands there again.
FASTLSTM_INLINE constexpr int existing_unit(int unit, int units) {
  return unit < units ? unit : units - 1;
}

// Neighbouring elements that one access moves.
template <class S, int kCount>
struct alignas(kCount * sizeof(S)) Neighbours {
  S at[kCount];
};
template <int kCount, class S>
__device__ __forceinline__ void load_neighbours(const S* from, Acc<S> (&to)[kCount]) {
  const auto x = *reinterpret_cast<const Neighbours<S, kCount>*>(from);
#pragma unroll
  for (int j = 0; j < kCount; ++j) to[j] = to_acc(x.at[j]);
}
// element(j) is the j-th one.
template <int kCount, class S, class Element>
__device__ __forceinline__ void store_neighbours(S* to, Element&& element) {
  Neighbours<S, kCount> x;
#pragma unroll
  for (int j = 0; j < kCount; ++j) from_acc(element(j), x.at[j]);
  *reinterpret_cast<Neighbours<S, kCount>*>(to) = x;
}

// The accurate functions, where a step's cells cost little beside its products.
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

// By the special function unit, for kernels in which every step waits for its cells. Errors are
// about 1e-7, far below the rounding of half types and tf32. expf and tanhf cost six times as much.
struct FastMath {
  __device__ __forceinline__ static float sigmoid(float x) {
    return reciprocal_fast(1.0f + exp2_fast(x * -kLog2E));
  }
  __device__ __forceinline__ static float tanh(float x) {
    const float e = exp2_fast(fabsf(x) * (-2.0f * kLog2E));
    return copysignf((1.0f - e) * reciprocal_fast(1.0f + e), x);
  }
  __device__ __forceinline__ static float one() { return 1.0f; }

 protected:
  static constexpr float kLog2E = 1.4426950408889634f;
};

// FastMath with one reciprocal for a cell's four gates: seven operations of the special function
// unit for each cell instead of ten, which bound a thread that has several. A gate's error is about
// 3e-7; a sigmoid below 2^-40 becomes that; a NaN in one gate spreads to all.
struct JointMath : FastMath {
  // 1 + e^-x, at most 2^40 + 1, so that a product of three is finite.
  __device__ __forceinline__ static float divisor(float x) {
    const float power = x * -kLog2E;
    return 1.0f + exp2_fast(power > 40.0f ? 40.0f : power);  // not fminf: a NaN stays
  }
  __device__ __forceinline__ static float shrinking(float x) {
    return exp2_fast(fabsf(x) * (-2.0f * kLog2E));
  }
};

// For cells in full fp32, at the cost of FastMath and a few multiply-adds. Its tanh would lose
// digits near 0, where 1 - e cancels: there a polynomial of relative error 1e-7 takes its place.
struct FullMath : FastMath {
  __device__ __forceinline__ static float tanh(float x) {
    const float u = x * x;
    const float p = ((0.01645872f * u - 0.05268412f) * u + 0.13320942f) * u - 0.3333296f;
    float far = FastMath::tanh(x);
    pin(far);  // no branch
    return fabsf(x) < 0.55f ? p * u * x + x : far;
  }
};

// The functions of a cluster's cells, by the type of the product's operands: float is full fp32,
// RoundedFloat tf32.
template <class Operand>
struct CellMathOf {
  typedef JointMath type;
};
template <>
struct CellMathOf<float> {
  typedef FullMath type;
};
template <class Operand>
using CellMath = typename CellMathOf<Operand>::type;

}  // namespace cuda

template <>
struct Activation<cuda::JointMath, float> {
  __device__ __forceinline__ static void of(float a_i, float a_f, float a_g, float a_o,
                                            CellForward<float>& out) {
    typedef cuda::JointMath Math;
    const float i = Math::divisor(a_i), f = Math::divisor(a_f), o = Math::divisor(a_o),
                e = Math::shrinking(a_g), g = 1.0f + e;
    const float i_f = i * f, o_g = o * g, one = cuda::reciprocal_fast(i_f * o_g);
    const float one_i_f = one * o_g, one_o_g = one * i_f;
    out.i = one_i_f * f;
    out.f = one_i_f * i;
    out.g = copysignf((1.0f - e) * (one_o_g * o), a_g);
    out.o = one_o_g * g;
  }
};

namespace cuda {

// Stores a unit's four gates, `stride` elements apart: i, f, g, o, as all matrices of gates have
// them.
template <class T, class S>
__device__ __forceinline__ void store_gates(const CellForward<T>& cell, S* to, int stride) {
  from_acc(cell.i, to[0]);
  from_acc(cell.f, to[stride]);
  from_acc(cell.g, to[2 * stride]);
  from_acc(cell.o, to[3 * stride]);
}
// ... and the gradients of its pre-activations.
template <class T, class S>
__device__ __forceinline__ void store_gates(const CellBackward<T>& cell, S* to, int stride) {
  from_acc(cell.a_i, to[0]);
  from_acc(cell.a_f, to[stride]);
  from_acc(cell.a_g, to[2 * stride]);
  from_acc(cell.a_o, to[3 * stride]);
}

}  // namespace cuda
}  // namespace fastlstm

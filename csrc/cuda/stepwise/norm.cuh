// Cells with layer normalisation, for stepwise: they need sums over whole rows between the
// products.
//
// What is computed: csrc/cpu/norm.h has the equations. Forward, a step is two launches: the product
// with W_hh (step_kernel.cuh), then everything else (norm_forward.cuh). Backward it is the other
// way round (norm_backward.cuh). Who owns what: a CTA owns a sequence (blockIdx.x) of one direction
// (blockIdx.z); a thread owns every kRowThreads-th unit with its four gates. Only sums over a row
// cross threads, in a fixed order.
#pragma once

#include "../shared/rows.cuh"
#include "lstm.h"

namespace fastlstm {
namespace cuda {

// The sum of all threads' values, in every thread.
template <class T>
__device__ __forceinline__ T block_sum(T value, T* shared) {
  const int me = threadIdx.x;
  shared[me] = value;
  __syncthreads();
  for (int half = kRowThreads / 2; half > 0; half /= 2) {
    if (me < half) shared[me] += shared[me + half];
    __syncthreads();
  }
  const T sum = shared[0];
  __syncthreads();
  return sum;
}
template <class T>
constexpr int kNormShared = kRowThreads * int(sizeof(T));

template <class T>
struct Moments {
  T mean, scale;  // scale: 1 / sqrt(variance + epsilon)
  __device__ __forceinline__ T of(T x) const { return (x - mean) * scale; }
};

// Of the values at(0) to at(n * units - 1): n blocks of `units` values.
template <class T, class At>
__device__ __forceinline__ Moments<T> moments(int units, int n, T* shared, At&& at) {
  T sum = 0;
  for (int unit = threadIdx.x; unit < units; unit += kRowThreads)
    for (int g = 0; g < n; ++g) sum += at(g * units + unit);
  const T mean = block_sum(sum, shared) / T(n * units);
  T squares = 0;
  for (int unit = threadIdx.x; unit < units; unit += kRowThreads)
    for (int g = 0; g < n; ++g)
      squares += (at(g * units + unit) - mean) * (at(g * units + unit) - mean);
  const T variance = block_sum(squares, shared) / T(n * units);
  return {mean, T(1 / sqrt(double(variance) + kNormEpsilon))};
}

// A CTA for each sequence of a step, in both directions.
inline dim3 sequence_grid(const int (&sequences)[2], int directions) {
  const int most = sequences[0] > sequences[1] ? sequences[0] : sequences[1];
  return dim3(unsigned(most), 1, unsigned(directions));
}

// A saved row has, in this order and for all units each: the activated gates i, f, g and o, the
// four sums W_ih x, the four sums W_hh h.
constexpr int kSavedOfInput = 4, kSavedOfHidden = 8;
static_assert(kSavedOfHidden + 4 == kSavedWithNorm, "lstm.h counts what is saved");

template <class S>
struct NormGains {
  const S *ih, *hh, *c, *c_bias;
};

template <class S>
NormGains<S> norm_gains(const LayerWeights& w) {
  return {static_cast<const S*>(w.norm_ih), static_cast<const S*>(w.norm_hh),
          static_cast<const S*>(w.norm_c), static_cast<const S*>(w.norm_c_bias)};
}

}  // namespace cuda
}  // namespace fastlstm

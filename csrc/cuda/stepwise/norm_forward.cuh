// Layer normalisation, forward: the input part of all steps is normalised at once, then each step's
// sums and cells.
//
// Who owns what: norm.cuh.
// Floor: 4H sums of a row and as many of the input part are read once. No figure measured yet.
#pragma once

#include "norm.cuh"
#include "rules.h"

namespace fastlstm {
namespace cuda {

// to = gain * norm(from) + bias, a row for each blockIdx.x. `to` may be `from`; `saved` gets
// `from`.
template <class S>
struct NormRowsArgs {
  const Acc<S>* from;
  const int* index;  // for each row, its row of `from`; null: the same
  Acc<S>* to;
  const S* gain;
  const Acc<S>* bias;  // or null
  S* saved;            // rows of saved_stride, or null
  int64_t saved_stride;
  int units;
};
template <class S>
__global__ void __launch_bounds__(kRowThreads)
    norm_rows_kernel(const __grid_constant__ NormRowsArgs<S> args) {
  typedef Acc<S> T;
  FASTLSTM_SHARED_BUFFER(shared);
  const int64_t row = blockIdx.x;
  const int units = args.units;
  const T* from = args.from + (args.index ? args.index[row] : row) * 4 * units;
  T* to = args.to + row * 4 * units;
  const Moments<T> m =
      moments(units, 4, reinterpret_cast<T*>(shared), [&](int j) { return from[j]; });
  for (int unit = threadIdx.x; unit < units; unit += kRowThreads)
    for (int g = 0; g < 4; ++g) {
      const int j = g * units + unit;
      if (args.saved) from_acc(from[j], args.saved[row * args.saved_stride + j]);
      to[j] = to_acc(args.gain[j]) * m.of(from[j]) + (args.bias ? args.bias[j] : T(0));
    }
}

// Stores the sums W_hh h of a step as rows.
template <class S>
struct GateSumsStep {
  typedef Acc<S> T;
  static constexpr int kGates = 1, kNeighbours = 16 / int(sizeof(T));

  int width;
  T* to;

  __device__ __forceinline__ T initial(int, int) const { return T(0); }
  FASTLSTM_INLINE bool together() const { return width % kNeighbours == 0; }
  template <int kCount>
  __device__ __forceinline__ void finish(int row, int column, const T (&sums)[1][kCount]) const {
    store_neighbours<kCount>(to + int64_t(row) * width + column, [&](int j) { return sums[0][j]; });
  }
};

// Elements of scratch for each unit of a sequence: the new c, and o.
constexpr int kNormForwardScratch = 2;

// One direction's step, after the product.
template <class S>
struct NormForwardStep {
  typedef Acc<S> T;
  int active, entered, staying, units;
  int64_t first, t;
  const T *z, *pre;  // W_hh h (B, 4H); the input's part and the biases (rows, 4H)
  NormGains<S> gains;
  const S *c0, *h_before;
  T *c, *scratch;  // (B, H), (B, kNormForwardScratch * H)
  S *h, *y, *saved;
  T* cell_states;
  S *h_n, *c_n;
  int64_t h_stride, y_stride;
  DrawnRules<T> rules;
};
template <class S>
struct NormForwardArgs {
  NormForwardStep<S> step[2];
};
template <class S>
__global__ void __launch_bounds__(kRowThreads, 2)
    norm_forward_kernel(const __grid_constant__ NormForwardArgs<S> args) {
  typedef Acc<S> T;
  FASTLSTM_SHARED_BUFFER(raw);
  wait_for_primary();
  start_dependents();
  T* shared = reinterpret_cast<T*>(raw);
  const NormForwardStep<S>& a = args.step[blockIdx.z];
  const int b = blockIdx.x, units = a.units;
  if (b >= a.active) return;
  const int64_t row = a.first + b;
  const T *z = a.z + int64_t(b) * 4 * units, *pre = a.pre + row * 4 * units;
  T *fresh = a.scratch + int64_t(b) * kNormForwardScratch * units, *o = fresh + units;
  S* saved = a.saved ? a.saved + row * kSavedWithNorm * units : nullptr;
  const RuleRow drawn = a.rules.row(a.t, b);
  for (int j = threadIdx.x; saved && j < 4 * units; j += kRowThreads)
    from_acc(z[j], saved[kSavedOfHidden * units + j]);
  const Moments<T> of_z = moments(units, 4, shared, [&](int j) { return z[j]; });
#pragma unroll 1
  for (int unit = threadIdx.x; unit < units; unit += kRowThreads) {
    T sums[4];
    for (int g = 0; g < 4; ++g) {
      const int j = g * units + unit;
      sums[g] = pre[j] + to_acc(a.gains.hh[j]) * of_z.of(z[j]);
    }
    const int64_t state = int64_t(b) * units + unit;
    const T before = b < a.entered ? a.c[state] : value_or_zero(a.c0, state);
    const CellRules<T> rule = a.rules.at(drawn, unit);
    const CellForward<T> out =
        cell_state<Math<T>>(sums[0], sums[1], sums[2], sums[3], before, rule);
    fresh[unit] = out.c;
    o[unit] = out.o;
    const T c = zoned(rule.new_c, out.c, before);
    a.c[state] = c;
    if (b >= a.staying) from_acc(c, a.c_n[state]);
    if (!saved) continue;
    store_gates(out, saved + unit, units);
    a.cell_states[row * units + unit] = c;
  }
  const Moments<T> of_c = moments(units, 1, shared, [&](int j) { return fresh[j]; });
#pragma unroll 1
  for (int unit = threadIdx.x; unit < units; unit += kRowThreads) {
    const T u = to_acc(a.gains.c[unit]) * of_c.of(fresh[unit]) + to_acc(a.gains.c_bias[unit]);
    const T before = to_acc(a.h_before[b * a.h_stride + unit]);
    const T h = zoned(a.rules.at(drawn, unit).new_h, cell_output<Math<T>>(o[unit], u), before);
    from_acc(h, a.h[b * a.h_stride + unit]);
    from_acc(h, a.y[b * a.y_stride + unit]);
    if (b >= a.staying) from_acc(h, a.h_n[int64_t(b) * units + unit]);
  }
}

}  // namespace cuda
}  // namespace fastlstm

// Layer-normalised cells for stepwise: what happens on whole rows between the products.
//
// What it computes: csrc/cpu/norm.h has the equations. A step is two launches: the product with
// W_hh (stepwise.cuh) and, here, everything else; backward the other way round.
// Who owns what: a CTA a sequence (blockIdx.x) of one direction (blockIdx.z); a thread every
// kRowThreads-th unit with its four gates, so that only the sums over a row meet, in a fixed order.
// Floor: a row's 4H products and as many of the input's part are read once. No figure measured yet.
#pragma once

#include "rows.cuh"
#include "stepwise.cuh"

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

// Of n blocks of `units` numbers; at(j) is the j-th.
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

// to = gain * norm(from) + bias, a row per blockIdx.x; `to` may be from. saved: from, as it is.
template <class S>
struct NormRowsArgs {
  const Acc<S>* from;
  const int* index;  // whose row of `from` is a row's, or null for its own
  Acc<S>* to;
  const S* gain;
  const Acc<S>* bias;  // or null
  S* saved;            // at saved_wide from row to row, or null
  int64_t saved_wide;
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
      if (args.saved) from_acc(from[j], args.saved[row * args.saved_wide + j]);
      to[j] = to_acc(args.gain[j]) * m.of(from[j]) + (args.bias ? args.bias[j] : T(0));
    }
}

// The product of a step, as rows.
template <class S>
struct ProductStep {
  typedef Acc<S> T;
  static constexpr bool kGates = false;

  int width;
  T* to;

  __device__ __forceinline__ T initial(int, int) const { return T(0); }
  __device__ __forceinline__ void finish(int row, int column, T sum) const {
    to[int64_t(row) * width + column] = sum;
  }
};

// Backward: the gradient of h_t, as rows.
template <class S>
struct HiddenRowStep {
  typedef Acc<S> T;
  static constexpr bool kGates = false;

  int width;  // H
  FromAbove<S> above;
  const T* dh_stays;  // as CellStep's
  T* to;

  __device__ __forceinline__ T initial(int row, int column) const {
    const T sum = above.at(row, column, width);
    return dh_stays && row < above.after ? sum + dh_stays[int64_t(row) * width + column] : sum;
  }
  __device__ __forceinline__ void finish(int row, int column, T sum) const {
    to[int64_t(row) * width + column] = sum;
  }
};

template <class S>
struct NormGains {
  const S *ih, *hh, *c, *c_bias;
};

template <class S>
NormGains<S> norm_gains(const CellWeights& w) {
  return {static_cast<const S*>(w.norm_ih), static_cast<const S*>(w.norm_hh),
          static_cast<const S*>(w.norm_c), static_cast<const S*>(w.norm_c_bias)};
}

// One direction's step forward, after the product.
template <class S>
struct NormCell {
  typedef Acc<S> T;
  int active, entered, staying, units;
  int64_t first, t;
  const T *z, *pre;  // W_hh h (B, 4H); the input's part and the biases (rows, 4H)
  NormGains<S> gains;
  const S *c0, *h_before;
  T *c, *scratch;  // (B, H), (B, 2H)
  S *h, *y, *saved;
  T* cells;
  S *h_n, *c_n;
  int64_t h_wide, y_wide;
  DrawnRules<T> rules;
};
template <class S>
struct NormForwardArgs {
  NormCell<S> cell[2];
};
template <class S>
__global__ void __launch_bounds__(kRowThreads, 2)
    norm_forward_kernel(const __grid_constant__ NormForwardArgs<S> args) {
  typedef Acc<S> T;
  FASTLSTM_SHARED_BUFFER(raw);
  T* shared = reinterpret_cast<T*>(raw);
  const NormCell<S>& a = args.cell[blockIdx.z];
  const int b = blockIdx.x, units = a.units;
  if (b >= a.active) return;
  const int64_t row = a.first + b;
  const T *z = a.z + int64_t(b) * 4 * units, *pre = a.pre + row * 4 * units;
  T *fresh = a.scratch + int64_t(b) * 2 * units, *o = fresh + units;
  S* saved = a.saved ? a.saved + row * 12 * units : nullptr;
  const RuleRow drawn = a.rules.row(a.t, b);
  for (int j = threadIdx.x; saved && j < 4 * units; j += kRowThreads)
    from_acc(z[j], saved[8 * units + j]);
  const Moments<T> of_z = moments(units, 4, shared, [&](int j) { return z[j]; });
#pragma unroll 1
  for (int unit = threadIdx.x; unit < units; unit += kRowThreads) {
    T sums[4];
    for (int g = 0; g < 4; ++g) {
      const int j = g * units + unit;
      sums[g] = pre[j] + to_acc(a.gains.hh[j]) * of_z.of(z[j]);
    }
    const int64_t own = int64_t(b) * units + unit;
    const T before = b < a.entered ? a.c[own] : value_or_zero(a.c0, own);
    const CellRules<T> rule = a.rules.at(drawn, unit);
    const CellForward<T> out =
        cell_state<Math<T>>(sums[0], sums[1], sums[2], sums[3], before, rule);
    fresh[unit] = out.c;
    o[unit] = out.o;
    const T c = zoned(rule.new_c, out.c, before);
    a.c[own] = c;
    if (b >= a.staying) from_acc(c, a.c_n[own]);
    if (!saved) continue;
    from_acc(out.i, saved[unit]);
    from_acc(out.f, saved[units + unit]);
    from_acc(out.g, saved[2 * units + unit]);
    from_acc(out.o, saved[3 * units + unit]);
    a.cells[row * units + unit] = c;
  }
  const Moments<T> of_c = moments(units, 1, shared, [&](int j) { return fresh[j]; });
#pragma unroll 1
  for (int unit = threadIdx.x; unit < units; unit += kRowThreads) {
    const T u = to_acc(a.gains.c[unit]) * of_c.of(fresh[unit]) + to_acc(a.gains.c_bias[unit]);
    const T before = to_acc(a.h_before[b * a.h_wide + unit]);
    const T h = zoned(a.rules.at(drawn, unit).new_h, cell_output<Math<T>>(o[unit], u), before);
    from_acc(h, a.h[b * a.h_wide + unit]);
    from_acc(h, a.y[b * a.y_wide + unit]);
    if (b >= a.staying) from_acc(h, a.h_n[int64_t(b) * units + unit]);
  }
}

// One direction's step backward, after the product that gives dh.
template <class S>
struct NormCellBackward {
  typedef Acc<S> T;
  int active, after, before, units;
  int64_t first, before_first, t;
  const T* dh;  // (B, H)
  NormGains<S> gains;
  const S* saved;  // (rows, 12H)
  const T *cells, *grad_cells;
  const S *c0, *grad_c_n;
  T *dc, *dh_stays, *scratch;  // (B, H), (B, H) or null, (B, 6H)
  S *da, *dz_x, *dz_h, *grad_c0;
  int64_t wide;  // of da, dz_x and dz_h
  T* terms;      // (rows, 10H): what the gradients of gains and bias sum
  DrawnRules<T> rules;
};
template <class S>
struct NormBackwardArgs {
  NormCellBackward<S> cell[2];
};

// dz from da through gain * norm(z).
template <class S>
__device__ __forceinline__ void norm_product_backward(int units, const Acc<S>* da, const S* z,
                                                      const S* gain, S* dz, Acc<S>* terms,
                                                      Acc<S>* shared) {
  typedef Acc<S> T;
  const Moments<T> m = moments(units, 4, shared, [&](int j) { return to_acc(z[j]); });
  T sum = 0, along = 0;
  for (int unit = threadIdx.x; unit < units; unit += kRowThreads)
    for (int g = 0; g < 4; ++g) {
      const int j = g * units + unit;
      const T x = m.of(to_acc(z[j])), dx = da[j] * to_acc(gain[j]);
      terms[j] = da[j] * x;
      sum += dx;
      along += dx * x;
    }
  const T mean = block_sum(sum, shared) / T(4 * units);
  const T slope = block_sum(along, shared) / T(4 * units);
  for (int unit = threadIdx.x; unit < units; unit += kRowThreads)
    for (int g = 0; g < 4; ++g) {
      const int j = g * units + unit;
      const T dx = da[j] * to_acc(gain[j]);
      from_acc(m.scale * (dx - mean - m.of(to_acc(z[j])) * slope), dz[j]);
    }
}

template <class S>
__global__ void __launch_bounds__(kRowThreads, 2)
    norm_backward_kernel(const __grid_constant__ NormBackwardArgs<S> args) {
  typedef Acc<S> T;
  FASTLSTM_SHARED_BUFFER(raw);
  T* shared = reinterpret_cast<T*>(raw);
  const NormCellBackward<S>& a = args.cell[blockIdx.z];
  const int b = blockIdx.x, units = a.units;
  if (b >= a.active) return;
  const int64_t row = a.first + b, base = int64_t(b) * units;
  const S* saved = a.saved + row * 12 * units;
  T *fresh = a.scratch + base * 6, *dnorm = fresh + units, *da = dnorm + units;
  T* terms = a.terms + row * 10 * units;
  const RuleRow drawn = a.rules.row(a.t, b);
  auto gate = [&](int g, int unit) { return to_acc(saved[g * units + unit]); };
  auto c_before = [&](int unit) {
    return b < a.before ? a.cells[(a.before_first + b) * units + unit]
                        : value_or_zero(a.c0, base + unit);
  };
#pragma unroll 1
  for (int unit = threadIdx.x; unit < units; unit += kRowThreads) {
    const CellRules<T> rule = a.rules.at(drawn, unit);
    fresh[unit] = clipped(
        unbound_cell(gate(0, unit), gate(1, unit), gate(2, unit), c_before(unit), rule), rule);
  }
  const Moments<T> m = moments(units, 1, shared, [&](int j) { return fresh[j]; });
  T sum = 0, along = 0;
#pragma unroll 1
  for (int unit = threadIdx.x; unit < units; unit += kRowThreads) {
    const T x = m.of(fresh[unit]), gain = to_acc(a.gains.c[unit]);
    const T u = gain * x + to_acc(a.gains.c_bias[unit]);
    const T all = a.dh[base + unit], own = a.rules.at(drawn, unit).new_h * all;
    if (a.dh_stays) a.dh_stays[base + unit] = all - own;
    const T du = cell_output_backward<Math<T>>(gate(3, unit), u, own, da[3 * units + unit]);
    terms[8 * units + unit] = du * x;
    terms[9 * units + unit] = du;
    const T dx = dnorm[unit] = du * gain;
    sum += dx;
    along += dx * x;
  }
  const T mean = block_sum(sum, shared) / T(units), slope = block_sum(along, shared) / T(units);
#pragma unroll 1
  for (int unit = threadIdx.x; unit < units; unit += kRowThreads) {
    const CellRules<T> rule = a.rules.at(drawn, unit);
    T arriving = b < a.after ? a.dc[base + unit] : value_or_zero(a.grad_c_n, base + unit);
    if (a.grad_cells) arriving += a.grad_cells[row * units + unit];
    const T kept = rule.new_c * arriving;
    const T through = m.scale * (dnorm[unit] - mean - m.of(fresh[unit]) * slope);
    CellBackward<T> d;
    cell_state_backward<Math<T>>(gate(0, unit), gate(1, unit), gate(2, unit), c_before(unit),
                                 kept + through, rule, d);
    da[unit] = d.a_i;
    da[units + unit] = d.a_f;
    da[2 * units + unit] = d.a_g;
    for (int g = 0; g < 4; ++g)
      from_acc(da[g * units + unit], a.da[row * a.wide + g * units + unit]);
    const T dc = d.c_prev + (arriving - kept);
    if (b < a.before)
      a.dc[base + unit] = dc;
    else if (a.grad_c0)
      from_acc(dc, a.grad_c0[base + unit]);
  }
  norm_product_backward<S>(units, da, saved + 4 * units, a.gains.ih, a.dz_x + row * a.wide, terms,
                           shared);
  norm_product_backward<S>(units, da, saved + 8 * units, a.gains.hh, a.dz_h + row * a.wide,
                           terms + 4 * units, shared);
}

}  // namespace cuda
}  // namespace fastlstm

// Layer-normalised cells, backward: from the gradient of h to those of the gates' two products.
//
// Who owns what: norm.cuh. The terms whose sums are the gradients of gains and bias stay rows.
// Floor: of a row, 12H saved numbers are read and 22H of gradients and terms written, once. No
// figure measured yet.
#pragma once

#include "norm.cuh"

namespace fastlstm {
namespace cuda {

// The gradient of h_t, as rows.
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
  const S* saved = a.saved + row * kSavedWithNorm * units;
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

// Layer normalisation, backward: from the gradient of h to those of W_ih x and W_hh h.
//
// Who owns what: norm.cuh. The terms whose sums are the gradients of gains and bias are stored by
// rows, and summed after all steps (gradient_part.cuh).
// Floor: of a row, 12H saved elements are read, and 22H of gradients and terms written, once. No
// figure measured yet.
#pragma once

#include "../shared/gradient_part.cuh"
#include "backward_steps.cuh"
#include "norm.cuh"

namespace fastlstm {
namespace cuda {

// Stores the gradient of h_t as rows.
template <class S>
struct HiddenGradientRowStep {
  typedef Acc<S> T;
  static constexpr int kGates = 1, kNeighbours = 16 / int(sizeof(T));

  int width;  // H
  IncomingGradient<S> incoming;
  const T* dh_zoneout;  // as CellBackwardStep's
  T* to;

  __device__ __forceinline__ T initial(int row, int column) const {
    return incoming.at(row, column, width);
  }
  FASTLSTM_INLINE bool together() const { return width % kNeighbours == 0; }
  template <int kCount>
  __device__ __forceinline__ void finish(int row, int column, const T (&sums)[1][kCount]) const {
    const int64_t state = int64_t(row) * width + column;
    T zoned[kCount] = {};
    if (dh_zoneout && row < incoming.after) load_neighbours(dh_zoneout + state, zoned);
    store_neighbours<kCount>(to + state, [&](int j) { return sums[0][j] + zoned[j]; });
  }
};

// Elements of scratch for each unit of a sequence: the new c, the gradient of its norm, and those
// of the four gates.
constexpr int kNormBackwardScratch = 6;

// One direction's step, after the product that gives dh.
template <class S>
struct NormBackwardStep {
  typedef Acc<S> T;
  int active, after, before, units;
  int64_t first, before_first, t;
  const T* dh;  // (B, H)
  NormGains<S> gains;
  const S* saved;  // (rows, kSavedWithNorm * H)
  const T *cell_states, *grad_cell_states;
  const S *c0, *grad_c_n;
  T *dc, *dh_zoneout, *scratch;  // (B, H), (B, H) or null, (B, kNormBackwardScratch * H)
  S *da, *dz_x, *dz_h, *grad_c0;
  int64_t stride;  // of da, dz_x and dz_h
  T* terms;        // (rows, kNormTerms * H), see gradient_part.cuh
  DrawnRules<T> rules;
};
template <class S>
struct NormBackwardArgs {
  NormBackwardStep<S> step[2];
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
  wait_for_primary();
  start_dependents();
  T* shared = reinterpret_cast<T*>(raw);
  const NormBackwardStep<S>& a = args.step[blockIdx.z];
  const int b = blockIdx.x, units = a.units;
  if (b >= a.active) return;
  const int64_t row = a.first + b, base = int64_t(b) * units;
  const S* saved = a.saved + row * kSavedWithNorm * units;
  T *fresh = a.scratch + base * kNormBackwardScratch, *dnorm = fresh + units, *da = dnorm + units;
  T* terms = a.terms + row * kNormTerms * units;
  const RuleRow drawn = a.rules.row(a.t, b);
  auto gate = [&](int g, int unit) { return to_acc(saved[g * units + unit]); };
  auto c_before = [&](int unit) {
    return b < a.before ? a.cell_states[(a.before_first + b) * units + unit]
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
    const T dh = a.dh[base + unit], dh_new = a.rules.at(drawn, unit).new_h * dh;
    if (a.dh_zoneout) a.dh_zoneout[base + unit] = dh - dh_new;
    const T du = cell_output_backward<Math<T>>(gate(3, unit), u, dh_new, da[3 * units + unit]);
    terms[kNormTermsOfGainC * units + unit] = du * x;
    terms[kNormTermsOfBiasC * units + unit] = du;
    const T dx = dnorm[unit] = du * gain;
    sum += dx;
    along += dx * x;
  }
  const T mean = block_sum(sum, shared) / T(units), slope = block_sum(along, shared) / T(units);
#pragma unroll 1
  for (int unit = threadIdx.x; unit < units; unit += kRowThreads) {
    const CellRules<T> rule = a.rules.at(drawn, unit);
    T arriving = b < a.after ? a.dc[base + unit] : value_or_zero(a.grad_c_n, base + unit);
    if (a.grad_cell_states) arriving += a.grad_cell_states[row * units + unit];
    const T dc_new = rule.new_c * arriving;
    const T through = m.scale * (dnorm[unit] - mean - m.of(fresh[unit]) * slope);
    CellBackward<T> d;
    cell_state_backward<Math<T>>(gate(0, unit), gate(1, unit), gate(2, unit), c_before(unit),
                                 dc_new + through, rule, d);
    da[unit] = d.a_i;
    da[units + unit] = d.a_f;
    da[2 * units + unit] = d.a_g;
    for (int g = 0; g < 4; ++g)
      from_acc(da[g * units + unit], a.da[row * a.stride + g * units + unit]);
    const T dc = d.c_prev + (arriving - dc_new);
    if (b < a.before)
      a.dc[base + unit] = dc;
    else if (a.grad_c0)
      from_acc(dc, a.grad_c0[base + unit]);
  }
  norm_product_backward<S>(units, da, saved + kSavedOfInput * units, a.gains.ih,
                           a.dz_x + row * a.stride, terms, shared);
  norm_product_backward<S>(units, da, saved + kSavedOfHidden * units, a.gains.hh,
                           a.dz_h + row * a.stride, terms + kNormTermsOfHidden * units, shared);
}

}  // namespace cuda
}  // namespace fastlstm

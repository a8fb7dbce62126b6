// Stepwise, backward: what a step adds to its product (forward_steps.cuh says how).
#pragma once

#include "../shared/numeric.cuh"
#include "rules.h"

namespace fastlstm {
namespace cuda {

// The gradient that reaches h_t from outside of the recurrence.
template <class S>
struct IncomingGradient {
  typedef Acc<S> T;
  const S* output;       // gradient of the output, or null
  const T* upper_input;  // gradient of the upper layer's input, or null
  const S* h_n;          // (B, width) or null
  int64_t stride;
  int after;  // sequences that have a step after this one

  __device__ __forceinline__ T at(int row, int column, int width) const {
    T sum = 0;
    if (output) sum = to_acc(output[row * stride + column]);
    if (upper_input) sum = upper_input[row * stride + column];
    if (row >= after) sum += value_or_zero(h_n, int64_t(row) * width + column);
    return sum;
  }
};

// With a projection: the gradient of h_t, for the product with W_hr.
template <class S>
struct HiddenGradientStep {
  typedef Acc<S> T;
  static constexpr bool kGates = false;

  int width;  // P
  IncomingGradient<S> incoming;
  S* dh;  // of the step's first row
  int64_t dh_stride;

  __device__ __forceinline__ T initial(int row, int column) const {
    return incoming.at(row, column, width);
  }
  __device__ __forceinline__ void finish(int row, int column, T sum) const {
    from_acc(sum, dh[row * dh_stride + column]);
  }
};

// The gradient of the cell. Columns are units; the product is the gradient of o * tanh(c).
template <class S>
struct CellBackwardStep {
  typedef Acc<S> T;
  static constexpr bool kGates = false;

  int width;  // H
  bool projected;
  IncomingGradient<S> incoming;  // unprojected
  int64_t first, before_first;
  int after, before;  // sequences that have a step after, and before, this one
  const S* gates;     // (rows, 4H)
  const T *cell_states, *grad_cell_states;  // (rows, H); grad_cell_states may be null
  const S *c0, *grad_c_n;
  T* dc;  // (B, H)
  S *dgates, *grad_c0;
  int64_t dgates_stride;
  DrawnRules<T> rules;
  int64_t t;
  T* dh_zoneout;  // (B, H), the share of dh that zoneout passes to the previous h; or null

  __device__ __forceinline__ T initial(int row, int unit) const {
    return projected ? T(0) : incoming.at(row, unit, width);
  }
  __device__ __forceinline__ void finish(int row, int unit, T dh) const {
    const int64_t state = int64_t(row) * width + unit, r = first + row;
    const S* act = gates + r * 4 * width + unit;
    if (dh_zoneout && row < after) dh += dh_zoneout[state];
    const T c_prev =
        row < before ? cell_states[(before_first + row) * width + unit] : value_or_zero(c0, state);
    T dc_in = row < after ? dc[state] : value_or_zero(grad_c_n, state);
    if (grad_cell_states) dc_in += grad_cell_states[r * width + unit];
    const T i = to_acc(act[0]), f = to_acc(act[width]), g = to_acc(act[2 * width]),
            o = to_acc(act[3 * width]), c = cell_states[r * width + unit];
    CellBackward<T> d;
    if (rules.plain) {
      d = cell_backward<Math<T>>(i, f, g, o, c_prev, c, dh, dc_in);
    } else {
      d = cell_backward<Math<T>>(i, f, g, o, c_prev, c, dh, dc_in,
                                 rules.at(rules.row(t, row), unit));
      if (dh_zoneout) dh_zoneout[state] = d.h_prev;
    }
    store_gates(d, dgates + r * dgates_stride + unit, width);
    if (row < before)
      dc[state] = d.c_prev;
    else if (grad_c0)
      from_acc(d.c_prev, grad_c0[state]);
  }
};

}  // namespace cuda
}  // namespace fastlstm

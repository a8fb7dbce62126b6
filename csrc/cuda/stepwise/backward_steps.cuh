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
  static constexpr int kGates = 1, kNeighbours = 16 / int(sizeof(T));

  int width;  // P
  IncomingGradient<S> incoming;
  S* dh;  // of the step's first row
  int64_t dh_stride;

  __device__ __forceinline__ T initial(int row, int column) const {
    return incoming.at(row, column, width);
  }
  FASTLSTM_INLINE bool together() const { return width % kNeighbours == 0; }
  template <int kCount>
  __device__ __forceinline__ void finish(int row, int column, const T (&sums)[1][kCount]) const {
    store_neighbours<kCount>(dh + row * dh_stride + column, [&](int j) { return sums[0][j]; });
  }
};

// The gradient of the cell. Columns are units; the product is the gradient of o * tanh(c).
template <class S>
struct CellBackwardStep {
  typedef Acc<S> T;
  static constexpr int kGates = 1, kNeighbours = 16 / int(sizeof(T));

  int width;  // H
  bool projected;
  bool aligned;                  // gates and cell_states begin at 16 bytes
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
  FASTLSTM_INLINE bool together() const {
    return rules.plain && aligned && width % kNeighbours == 0;
  }
  template <int kUnits>
  __device__ __forceinline__ void finish(int row, int unit, const T (&sums)[1][kUnits]) const {
    const int64_t state = int64_t(row) * width + unit, r = first + row;
    T saved[4][kUnits], c[kUnits], c_prev[kUnits], dc_in[kUnits];
#pragma unroll
    for (int q = 0; q < 4; ++q) load_neighbours(gates + (r * 4 + q) * width + unit, saved[q]);
    load_neighbours(cell_states + r * width + unit, c);
    // What the caller owns may begin anywhere.
    if (row < before) {
      load_neighbours(cell_states + (before_first + row) * width + unit, c_prev);
    } else {
#pragma unroll
      for (int j = 0; j < kUnits; ++j) c_prev[j] = value_or_zero(c0, state + j);
    }
    if (row < after) {
      load_neighbours(dc + state, dc_in);
    } else {
#pragma unroll
      for (int j = 0; j < kUnits; ++j) dc_in[j] = value_or_zero(grad_c_n, state + j);
    }
    if (grad_cell_states)
#pragma unroll
      for (int j = 0; j < kUnits; ++j) dc_in[j] += grad_cell_states[r * width + unit + j];
    CellBackward<T> d[kUnits];
    // kNeighbours are taken where together() holds, so there the other branch is not compiled.
    if (kUnits == kNeighbours || rules.plain) {
#pragma unroll
      for (int j = 0; j < kUnits; ++j)
        d[j] = cell_backward<Math<T>>(saved[0][j], saved[1][j], saved[2][j], saved[3][j], c_prev[j],
                                      c[j], sums[0][j], dc_in[j]);
    } else {
      const RuleRow keys = rules.row(t, row);
#pragma unroll
      for (int j = 0; j < kUnits; ++j) {
        const T dh = sums[0][j] + (dh_zoneout && row < after ? dh_zoneout[state + j] : T(0));
        d[j] = cell_backward<Math<T>>(saved[0][j], saved[1][j], saved[2][j], saved[3][j], c_prev[j],
                                      c[j], dh, dc_in[j], rules.at(keys, unit + j));
        if (dh_zoneout) dh_zoneout[state + j] = d[j].h_prev;
      }
    }
    S* to = dgates + r * dgates_stride + unit;
    store_neighbours<kUnits>(to, [&](int j) { return d[j].a_i; });
    store_neighbours<kUnits>(to + width, [&](int j) { return d[j].a_f; });
    store_neighbours<kUnits>(to + 2 * width, [&](int j) { return d[j].a_g; });
    store_neighbours<kUnits>(to + 3 * width, [&](int j) { return d[j].a_o; });
    const auto before_step = [&](int j) { return d[j].c_prev; };
    if (row < before)
      store_neighbours<kUnits>(dc + state, before_step);
    else if (grad_c0)
      store_neighbours<kUnits>(grad_c0 + state, before_step);
  }
};

}  // namespace cuda
}  // namespace fastlstm

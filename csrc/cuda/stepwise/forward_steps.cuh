// Stepwise, forward: what a step adds to its product.
//
// The step kernel (step_kernel.cuh) calls a step for each sum of its product: the sum starts from
// initial(), and finish() receives the result. With kGates the product's columns are gates, in
// blocks of 32 (i, f, g, o of eight units), and finish() receives the four gates of a unit
// together.
//
// initial() reads only what was complete before the first step: it runs before a step waits for the
// one before it.
#pragma once

#include "../shared/numeric.cuh"
#include "rules.h"

namespace fastlstm {
namespace cuda {

// The cell. h goes to the operand of the next step and, without a projection, to the output.
template <class S>
struct CellForwardStep {
  typedef Acc<S> T;
  static constexpr bool kGates = true;

  const T* start;    // the input part: the gates of row r at (index ? index[r] : r) * 4H
  const int* index;  // or null
  const T* bias;     // (4H) or null
  int64_t first;     // number of the step's first row
  int units;
  int entered;  // sequences that had a step before; the others start from c0
  int staying;  // sequences that have a step after; the others write h_n and c_n
  const S* c0;  // (B, H) or null
  T* c;         // (B, H)
  S* h;         // the h of this step, or the projection's operand: rows of h_stride
  int64_t h_stride, y_stride;
  S* y;            // (step's first row), or null with a projection
  S* gates;        // (rows, 4H) or null
  T* cell_states;  // (rows, H) or null
  S *h_n, *c_n;
  DrawnRules<T> rules;
  int64_t t;
  const S* h_before;  // rows of h_stride, for zoneout; or null

  __device__ __forceinline__ T initial(int row, int block, int q, int place) const {
    const int unit = block * 8 + place;
    if (unit >= units) return T(0);
    const int64_t r = index ? index[first + row] : first + row;
    const T sum = start[(r * 4 + q) * units + unit];
    return bias ? sum + bias[q * units + unit] : sum;
  }

  __device__ __forceinline__ void finish(int row, int block, int place, const T (&pre)[4]) const {
    const int unit = block * 8 + place;
    if (unit >= units) return;
    const int64_t state = int64_t(row) * units + unit, element = (first + row) * units + unit;
    const T before = row < entered ? c[state] : value_or_zero(c0, state);
    CellForward<T> out;
    if (rules.plain)
      out = cell_forward<Math<T>>(pre[0], pre[1], pre[2], pre[3], before);
    else
      out = cell_forward<Math<T>>(pre[0], pre[1], pre[2], pre[3], before,
                                  value_or_zero(h_before, row * h_stride + unit),
                                  rules.at(rules.row(t, row), unit));
    c[state] = out.c;
    from_acc(out.h, h[row * h_stride + unit]);
    if (y) from_acc(out.h, y[row * y_stride + unit]);
    if (gates) {
      store_gates(out, gates + element + (first + row) * 3 * units, units);
      cell_states[element] = out.c;
    }
    if (row >= staying) {
      from_acc(out.c, c_n[state]);
      if (y) from_acc(out.h, h_n[state]);
    }
  }
};

// The projection: h = W_hr (o * tanh(c)).
template <class S>
struct ProjectionStep {
  typedef Acc<S> T;
  static constexpr bool kGates = false;

  int width;    // P
  int staying;  // as above
  S* h;
  int64_t h_stride, y_stride;
  S *y, *h_n;

  __device__ __forceinline__ T initial(int, int) const { return T(0); }
  __device__ __forceinline__ void finish(int row, int column, T sum) const {
    from_acc(sum, h[row * h_stride + column]);
    from_acc(sum, y[row * y_stride + column]);
    if (row >= staying) from_acc(sum, h_n[int64_t(row) * width + column]);
  }
};

}  // namespace cuda
}  // namespace fastlstm

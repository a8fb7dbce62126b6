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
  const S* h_before;  // laid out as h, for zoneout; or null

  __device__ __forceinline__ T initial(int row, int block, int q, int place) const {
    const int unit = block * 8 + place;
    if (unit >= units) return T(0);
    const int64_t r = index ? index[first + row] : first + row;
    const T sum = start[(r * 4 + q) * units + unit];
    return bias ? sum + bias[q * units + unit] : sum;
  }

  // The gates of neighbouring units of a sequence.
  template <int kUnits>
  __device__ __forceinline__ void initial_units(int row, int unit, T (&pre)[4][kUnits]) const {
    const int64_t r = index ? index[first + row] : first + row;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      load_neighbours(start + (r * 4 + q) * units + unit, pre[q]);
      T more[kUnits] = {};
      if (bias) load_neighbours(bias + q * units + unit, more);
#pragma unroll
      for (int j = 0; j < kUnits; ++j) pre[q][j] += more[j];
    }
  }

  __device__ __forceinline__ void finish(int row, int block, int place, const T (&pre)[4]) const {
    const int unit = block * 8 + place;
    if (unit >= units) return;
    const T gates_of_unit[4][1] = {{pre[0]}, {pre[1]}, {pre[2]}, {pre[3]}};
    T before[1];
    load_states(row, unit, before);
    finish_units(row, unit, row * h_stride + unit, before, gates_of_unit);
  }
  // c before the step, of neighbouring units of a sequence.
  template <int kUnits>
  __device__ __forceinline__ void load_states(int row, int unit, T (&before)[kUnits]) const {
    const int64_t state = int64_t(row) * units + unit;
    if (row < entered) return load_neighbours(c + state, before);
    // The caller's memory may begin anywhere.
#pragma unroll
    for (int j = 0; j < kUnits; ++j) before[j] = value_or_zero(c0, state + j);
  }
  // Their cells; h is at h[h_at] and behind it.
  template <int kUnits>
  __device__ __forceinline__ void finish_units(int row, int unit, int64_t h_at,
                                               const T (&before)[kUnits],
                                               const T (&pre)[4][kUnits]) const {
    const int64_t state = int64_t(row) * units + unit, element = (first + row) * units + unit;
    T zoned[kUnits] = {};
    CellForward<T> out[kUnits];
    if (rules.plain) {
#pragma unroll
      for (int j = 0; j < kUnits; ++j)
        out[j] = cell_forward<Math<T>>(pre[0][j], pre[1][j], pre[2][j], pre[3][j], before[j]);
    } else {
      if (h_before) load_neighbours(h_before + h_at, zoned);
      const RuleRow keys = rules.row(t, row);
#pragma unroll
      for (int j = 0; j < kUnits; ++j)
        out[j] = cell_forward<Math<T>>(pre[0][j], pre[1][j], pre[2][j], pre[3][j], before[j],
                                       zoned[j], rules.at(keys, unit + j));
    }
    const auto state_of = [&](int j) { return out[j].c; };
    const auto hidden = [&](int j) { return out[j].h; };
    store_neighbours<kUnits>(c + state, state_of);
    store_neighbours<kUnits>(h + h_at, hidden);
    if (y) store_neighbours<kUnits>(y + row * y_stride + unit, hidden);
    if (gates) {
      S* to = gates + element + (first + row) * 3 * units;
      store_neighbours<kUnits>(to, [&](int j) { return out[j].i; });
      store_neighbours<kUnits>(to + units, [&](int j) { return out[j].f; });
      store_neighbours<kUnits>(to + 2 * units, [&](int j) { return out[j].g; });
      store_neighbours<kUnits>(to + 3 * units, [&](int j) { return out[j].o; });
      store_neighbours<kUnits>(cell_states + element, state_of);
    }
    if (row >= staying) {
      store_neighbours<kUnits>(c_n + state, state_of);
      if (y) store_neighbours<kUnits>(h_n + state, hidden);
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

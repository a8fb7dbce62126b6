// Stepwise, forward: what a step adds to its product.
//
// The step kernel (step_kernel.cuh) calls a step for each sum of its product: the sum starts from
// initial(), and finish() receives the sums of neighbouring columns of a sequence. With four kGates
// the product's columns are gates, in blocks of 32 (i, f, g, o of eight units), and finish()
// receives the four gates of neighbouring units.
//
// finish() takes kNeighbours columns at once where together() holds, and one otherwise: where rows
// do not begin at multiples of 16 bytes, or where draws would make the code long.
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
  static constexpr int kGates = 4, kNeighbours = 16 / int(sizeof(T));

  const T* start;    // the input part: the gates of row r at (index ? index[r] : r) * 4H
  const int* index;  // or null
  const T* bias;     // (4H) or null
  int64_t first;     // number of the step's first row
  int width;         // H
  int entered;       // sequences that had a step before; the others start from c0
  int staying;       // sequences that have a step after; the others write h_n and c_n
  const S* c0;       // (B, H) or null
  T* c;              // (B, H)
  S* h;              // the h of this step, or the projection's operand: rows of h_stride
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
    if (unit >= width) return T(0);
    const int64_t r = index ? index[first + row] : first + row;
    const T sum = start[(r * 4 + q) * width + unit];
    return bias ? sum + bias[q * width + unit] : sum;
  }

  // The gates of neighbouring units of a sequence.
  template <int kUnits>
  __device__ __forceinline__ void initial_units(int row, int unit, T (&pre)[4][kUnits]) const {
    const int64_t r = index ? index[first + row] : first + row;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      load_neighbours(start + (r * 4 + q) * width + unit, pre[q]);
      T more[kUnits] = {};
      if (bias) load_neighbours(bias + q * width + unit, more);
#pragma unroll
      for (int j = 0; j < kUnits; ++j) pre[q][j] += more[j];
    }
  }

  FASTLSTM_INLINE bool together() const { return rules.plain && width % kNeighbours == 0; }
  template <int kUnits>
  __device__ __forceinline__ void finish(int row, int unit, const T (&pre)[4][kUnits]) const {
    T before[kUnits];
    load_states(row, unit, before);
    finish_units(row, unit, row * h_stride + unit, before, pre);
  }
  // c before the step, of neighbouring units of a sequence.
  template <int kUnits>
  __device__ __forceinline__ void load_states(int row, int unit, T (&before)[kUnits]) const {
    const int64_t state = int64_t(row) * width + unit;
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
    const int64_t state = int64_t(row) * width + unit, element = (first + row) * width + unit;
    T zoned[kUnits] = {};
    CellForward<T> out[kUnits];
    // kNeighbours are taken where together() holds, so there the other branch is not compiled.
    if (kUnits == kNeighbours || rules.plain) {
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
      S* to = gates + element + (first + row) * 3 * width;
      store_neighbours<kUnits>(to, [&](int j) { return out[j].i; });
      store_neighbours<kUnits>(to + width, [&](int j) { return out[j].f; });
      store_neighbours<kUnits>(to + 2 * width, [&](int j) { return out[j].g; });
      store_neighbours<kUnits>(to + 3 * width, [&](int j) { return out[j].o; });
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
  static constexpr int kGates = 1, kNeighbours = 16 / int(sizeof(T));

  int width;    // P
  int staying;  // as above
  S* h;
  int64_t h_stride, y_stride;
  S *y, *h_n;

  FASTLSTM_INLINE bool together() const { return width % kNeighbours == 0; }
  __device__ __forceinline__ T initial(int, int) const { return T(0); }
  template <int kCount>
  __device__ __forceinline__ void finish(int row, int column, const T (&sums)[1][kCount]) const {
    const auto sum = [&](int j) { return sums[0][j]; };
    store_neighbours<kCount>(h + row * h_stride + column, sum);
    store_neighbours<kCount>(y + row * y_stride + column, sum);
    if (row >= staying) store_neighbours<kCount>(h_n + int64_t(row) * width + column, sum);
  }
};

}  // namespace cuda
}  // namespace fastlstm

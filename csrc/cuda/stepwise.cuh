// Stepwise: one launch per time step and direction pair, a product with the cell fused behind it.
//
// What it computes: forward, h_{t-1} W_hh^T plus the input's part, and the cell; backward, the
// gradient of h_t from dgates_{t+1} W_hh and from above, and the cell's gradient. With a projection
// each is two launches, the second (first) one the product with W_hr.
// Who owns what: a CTA the tile of (rows of the batch) x (units or columns) of tile.cuh, for one
// direction (blockIdx.z); a thread whole cells, whose state nobody else touches.
// What moves per step: every CTA reads its rows of h and its columns of W from the L2 cache.
// Large products are the library's (kLibraryTile): then a step is its product, kept in the
// accumulation type, and the cells as a second launch.
// Floor: docs/kernels.md. No figure measured yet.
#pragma once

#include "rules.h"
#include "tile.cuh"
#include "tiles.h"

namespace fastlstm {
namespace cuda {

// Forward. Columns are gates; h goes to the next step's operand and, unprojected, to the output.
template <class S>
struct GatesStep {
  typedef Acc<S> T;
  static constexpr bool kGates = true;

  const T* start;    // the input's part: row r's four gates at (index ? index[r] : r) * 4H
  const int* index;  // or null
  const T* bias;     // (4H) or null
  int64_t first;     // number of the step's first row
  int units;
  int entered;  // sequences that have a state; the others start from c0
  int staying;  // sequences that go on; the others leave their states in h_n and c_n
  const S* c0;  // (B, H) or null
  T* c;         // (B, H)
  S* h;         // h, or what the projection takes, at h_wide from sequence to sequence
  int64_t h_wide, y_wide;
  S* y;      // (step's first row), or null with a projection
  S* gates;  // (rows, 4H) or null
  T* cells;  // (rows, H) or null
  S *h_n, *c_n;
  DrawnRules<T> rules;
  int64_t t;
  const S* h_before;  // at h_wide, for zoneout; or null

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
    const int64_t own = int64_t(row) * units + unit, saved = (first + row) * units + unit;
    const T before = row < entered ? c[own] : value_or_zero(c0, own);
    CellForward<T> out;
    if (rules.plain)
      out = cell_forward<Math<T>>(pre[0], pre[1], pre[2], pre[3], before);
    else
      out = cell_forward<Math<T>>(pre[0], pre[1], pre[2], pre[3], before,
                                  value_or_zero(h_before, row * h_wide + unit),
                                  rules.at(rules.row(t, row), unit));
    c[own] = out.c;
    from_acc(out.h, h[row * h_wide + unit]);
    if (y) from_acc(out.h, y[row * y_wide + unit]);
    if (gates) {
      S* to = gates + saved + (first + row) * 3 * units;
      from_acc(out.i, to[0]);
      from_acc(out.f, to[units]);
      from_acc(out.g, to[2 * units]);
      from_acc(out.o, to[3 * units]);
      cells[saved] = out.c;
    }
    if (row >= staying) {
      from_acc(out.c, c_n[own]);
      if (y) from_acc(out.h, h_n[own]);
    }
  }
};

// Forward with a projection: h = W_hr (o * tanh(c)).
template <class S>
struct ProjectStep {
  typedef Acc<S> T;
  static constexpr bool kGates = false;

  int width;    // P
  int staying;  // as above
  S* h;
  int64_t h_wide, y_wide;
  S *y, *h_n;

  __device__ __forceinline__ T initial(int, int) const { return T(0); }
  __device__ __forceinline__ void finish(int row, int column, T sum) const {
    from_acc(sum, h[row * h_wide + column]);
    from_acc(sum, y[row * y_wide + column]);
    if (row >= staying) from_acc(sum, h_n[int64_t(row) * width + column]);
  }
};

// The gradient that reaches h_t from outside the recurrence.
template <class S>
struct FromAbove {
  typedef Acc<S> T;
  const S* output;       // gradient of the output, or null
  const T* upper_input;  // gradient of the upper layer's input, or null
  const S* h_n;          // (B, width) or null
  int64_t wide;
  int after;  // sequences that have a step after this one

  __device__ __forceinline__ T at(int row, int column, int width) const {
    T sum = 0;
    if (output) sum = to_acc(output[row * wide + column]);
    if (upper_input) sum = upper_input[row * wide + column];
    if (row >= after) sum += value_or_zero(h_n, int64_t(row) * width + column);
    return sum;
  }
};

// Backward with a projection: the gradient of h_t, kept for the product with W_hr.
template <class S>
struct HiddenGradientStep {
  typedef Acc<S> T;
  static constexpr bool kGates = false;

  int width;  // P
  FromAbove<S> above;
  S* dh;  // of the step's first row
  int64_t dh_wide;

  __device__ __forceinline__ T initial(int row, int column) const {
    return above.at(row, column, width);
  }
  __device__ __forceinline__ void finish(int row, int column, T sum) const {
    from_acc(sum, dh[row * dh_wide + column]);
  }
};

// Backward: the cell. Columns are units, the product is the gradient of o * tanh(c).
template <class S>
struct CellStep {
  typedef Acc<S> T;
  static constexpr bool kGates = false;

  int width;  // H
  bool projected;
  FromAbove<S> above;  // unprojected
  int64_t first, before_first;
  int after, before;            // sequences that have a step after, and before, this one
  const S* gates;               // (rows, 4H)
  const T *cells, *grad_cells;  // (rows, H); grad_cells may be null
  const S *c0, *grad_c_n;
  T* dc;  // (B, H)
  S *dgates, *grad_c0;
  int64_t dgates_wide;
  DrawnRules<T> rules;
  int64_t t;
  T* dh_stays;  // (B, H), what zoneout hands to the h before; or null

  __device__ __forceinline__ T initial(int row, int unit) const {
    if (projected) return T(0);
    const T sum = above.at(row, unit, width);
    return dh_stays && row < after ? sum + dh_stays[int64_t(row) * width + unit] : sum;
  }
  __device__ __forceinline__ void finish(int row, int unit, T dh) const {
    const int64_t own = int64_t(row) * width + unit, r = first + row;
    const S* act = gates + r * 4 * width + unit;
    const T c_prev =
        row < before ? cells[(before_first + row) * width + unit] : value_or_zero(c0, own);
    T dc_in = row < after ? dc[own] : value_or_zero(grad_c_n, own);
    if (grad_cells) dc_in += grad_cells[r * width + unit];
    const T i = to_acc(act[0]), f = to_acc(act[width]), g = to_acc(act[2 * width]),
            o = to_acc(act[3 * width]), c = cells[r * width + unit];
    CellBackward<T> d;
    if (rules.plain) {
      d = cell_backward<Math<T>>(i, f, g, o, c_prev, c, dh, dc_in);
    } else {
      d = cell_backward<Math<T>>(i, f, g, o, c_prev, c, dh, dc_in,
                                 rules.at(rules.row(t, row), unit));
      if (dh_stays) dh_stays[own] = d.h_prev;
    }
    S* to = dgates + r * dgates_wide + unit;
    from_acc(d.a_i, to[0]);
    from_acc(d.a_f, to[width]);
    from_acc(d.a_g, to[2 * width]);
    from_acc(d.a_o, to[3 * width]);
    if (row < before)
      dc[own] = d.c_prev;
    else if (grad_c0)
      from_acc(d.c_prev, grad_c0[own]);
  }
};

template <class Step>
struct StepArgs;
template <template <class> class Step, class S>
struct StepArgs<Step<S>> {
  Operands<S> operands[2];  // by direction
  Step<S> step[2];
  int active[2];  // sequences in the step
};

template <class Tile, class Step>
__device__ __forceinline__ void step_of_tile(const StepArgs<Step>& args) {
  FASTLSTM_SHARED_BUFFER(shared);
  typedef typename Step::T T;
  const int d = blockIdx.z, first = blockIdx.y * Tile::kRows, active = args.active[d];
  if (first >= active) return;
  const Step& step = args.step[d];
  TileProduct<Tile> product(shared, args.operands[d], first, blockIdx.x * Tile::kColumns);
  product.begin();

  // A block is eight units with their gates, or 32 columns.
  const int block = blockIdx.x * Tile::kColumnWarps + product.column_warp;
  typename TileProduct<Tile>::Sums sums;
#pragma unroll
  for (int f = 0; f < Tile::kRowFrags; ++f)
#pragma unroll
    for (int q = 0; q < 4; ++q)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = first + product.row_of(f, e), place = product.place_of(e);
        const bool own = product.own_sums() && row < active;
        if constexpr (Step::kGates) {
          sums[f][q][e] = own ? step.initial(row, block, q, place) : T(0);
        } else {
          const int column = block * 32 + q * 8 + place;
          sums[f][q][e] = own && column < step.width ? step.initial(row, column) : T(0);
        }
      }
  product.finish(sums);
  if (!product.own_sums()) return;

#pragma unroll
  for (int f = 0; f < Tile::kRowFrags; ++f)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = first + product.row_of(f, e), place = product.place_of(e);
      if (row >= active) continue;
      if constexpr (Step::kGates) {
        const T pre[4] = {sums[f][0][e], sums[f][1][e], sums[f][2][e], sums[f][3][e]};
        step.finish(row, block, place, pre);
      } else {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const int column = block * 32 + q * 8 + place;
          if (column < step.width) step.finish(row, column, sums[f][q][e]);
        }
      }
    }
}

template <class Tile, class Step>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtas)
    step_kernel(const __grid_constant__ StepArgs<Step> args) {
  // What no GPU of this architecture can hold is never launched there.
  if constexpr (FASTLSTM_SM80 || Tile::kSharedBytes <= kOldSharedBytes) step_of_tile<Tile>(args);
}

// What follows a product that the library made: a thread owns a cell, or a column, of one sequence.
constexpr int kFinishThreads = 256;

template <class Step>
struct FinishArgs {
  typedef typename Step::T T;
  Step step[2];  // by direction
  int active[2];
  // Rows of the product as in tile.cuh: gates by blocks of 32. It has `rows` of them, at `wide`; it
  // is zero for the others.
  const T* product[2];
  int rows[2];
  int64_t wide;
};

template <class Step>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const __grid_constant__ FinishArgs<Step> args) {
  typedef typename Step::T T;
  const int d = blockIdx.z, row = blockIdx.x, j = blockIdx.y * kFinishThreads + threadIdx.x;
  if (row >= args.active[d]) return;
  const Step& step = args.step[d];
  const T* product = row < args.rows[d] ? args.product[d] + row * args.wide : nullptr;
  if constexpr (Step::kGates) {
    if (j >= step.units) return;
    const int block = j / 8, place = j % 8;
    T pre[4];
#pragma unroll
    for (int q = 0; q < 4; ++q)
      pre[q] =
          step.initial(row, block, q, place) + (product ? product[block * 32 + q * 8 + place] : 0);
    step.finish(row, block, place, pre);
  } else {
    if (j >= step.width) return;
    step.finish(row, j, step.initial(row, j) + (product ? product[j] : 0));
  }
}

}  // namespace cuda
}  // namespace fastlstm

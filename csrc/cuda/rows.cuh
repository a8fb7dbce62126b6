// Small kernels around the steps: operands packed once a call, rows gathered and dropped out.
//
// Each reads and writes its matrix once, so its floor is bytes over bandwidth: at 10,000 rows of
// 512 bf16, some 20 MB, about 5 microseconds on an H200 (4.8 TB/s). No figure measured yet.
// A thread owns elements of the result.
#pragma once

#include "dropout.h"
#include "numeric.cuh"

namespace fastlstm {
namespace cuda {

constexpr int kRowThreads = 256;

// Which (t, b) a row is. Sequences of one length need no table.
struct RowMap {
  const int *t, *b, *first;  // (rows), (rows), (steps + 1), or null
  int steps, batch;

  __device__ __forceinline__ int step(int64_t row) const { return t ? t[row] : int(row / batch); }
  __device__ __forceinline__ int sequence(int64_t row) const {
    return t ? b[row] : int(row % batch);
  }
  // The row of sequence b in step t, or -1.
  __device__ __forceinline__ int64_t at(int t, int b) const {
    if (t < 0 || t >= steps) return -1;
    if (first == nullptr) return int64_t(t) * batch + b;
    return b < first[t + 1] - first[t] ? first[t] + b : -1;
  }
};

// Fills the table for some steps. The numbers travel as arguments: copied from host memory, they
// would be frozen in a CUDA graph as a pointer that no longer holds them.
constexpr int kTableSteps = 512;
struct TableArgs {
  int *t, *b, *first;
  int begin, steps;
  int starts[kTableSteps + 1];
};
static __global__ void __launch_bounds__(kRowThreads, 4)
    table_kernel(const __grid_constant__ TableArgs args) {
  const int step = blockIdx.x, start = args.starts[step], end = args.starts[step + 1];
  for (int row = start + threadIdx.x; row < end; row += kRowThreads) {
    args.t[row] = args.begin + step;
    args.b[row] = row - start;
  }
  if (threadIdx.x == 0) {
    args.first[args.begin + step] = start;
    if (step == args.steps - 1) args.first[args.begin + args.steps] = end;
  }
}

// How the gates of `units` units stand in a packed matrix: by slots of `slot` units, in each the
// units' i, then their f, g and o. Without units: any matrix, as it is stored.
struct GateOrder {
  int units, slot;

  // The gate of the source that stands at j; beyond all gates where there is none.
  __device__ __forceinline__ int64_t source(int64_t j) const {
    if (units == 0) return j;
    const int64_t unit = j / (4 * slot) * slot + j % slot;
    return unit < units ? j % (4 * slot) / slot * units + unit : 4 * int64_t(units);
  }
};

constexpr GateOrder kAsStored{0, 0};

// to (to_rows, wide) = a matrix (rows, depth) whose element (r, k) stands at
// r * row_stride + k * k_stride; zero beyond it. Rows: those that `index` names, or by `row_order`.
// Two matrices of one shape, one per blockIdx.y, are packed by one launch.
template <class S, class To>
struct PackArgs {
  const S* from[2];  // null: zeros
  To* to[2];
  const int* index;
  int64_t row_stride, k_stride, rows, to_rows, wide;
  int depth;
  GateOrder row_order, k_order;
};
template <class S, class To>
__global__ void __launch_bounds__(kRowThreads, 4)
    pack_kernel(const __grid_constant__ PackArgs<S, To> args) {
  const S* from = args.from[blockIdx.y];
  To* to = args.to[blockIdx.y];
  // Neighbouring threads read neighbouring elements of the source.
  const bool along_rows = args.row_stride == 1 && args.k_stride != 1;
  const int64_t across = along_rows ? args.to_rows : args.wide;
  const int64_t stride = int64_t(gridDim.x) * kRowThreads;
  for (int64_t j = int64_t(blockIdx.x) * kRowThreads + threadIdx.x; j < args.to_rows * args.wide;
       j += stride) {
    const int64_t r = along_rows ? j % across : j / across;
    const int64_t k = along_rows ? j / across : j % across;
    int64_t row = args.row_order.source(r);
    const int64_t column = args.k_order.source(k);
    const bool inside = from && row < args.rows && column < args.depth;
    if (inside && args.index) row = args.index[row];
    Acc<S> value = 0;
    if (inside) value = to_acc(from[row * args.row_stride + column * args.k_stride]);
    from_acc(value, to[r * args.wide + k]);
  }
}

// sums (cells, count) = b_ih + b_hh of each cell, a cell per blockIdx.y.
constexpr int kBiasCells = 64;
template <class S>
struct BiasArgs {
  const S *b_ih[kBiasCells], *b_hh[kBiasCells];
  Acc<S>* sums;
  int count;
};
template <class S>
__global__ void __launch_bounds__(kRowThreads, 4)
    bias_kernel(const __grid_constant__ BiasArgs<S> args) {
  const int j = blockIdx.x * kRowThreads + threadIdx.x, cell = blockIdx.y;
  if (j < args.count)
    args.sums[int64_t(cell) * args.count + j] =
        to_acc(args.b_ih[cell][j]) + to_acc(args.b_hh[cell][j]);
}

// to += more
template <class S>
struct AddArgs {
  S* to;
  const Acc<S>* more;
  int64_t count;
};
template <class S>
__global__ void __launch_bounds__(kRowThreads, 4)
    add_kernel(const __grid_constant__ AddArgs<S> args) {
  const int64_t j = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (j < args.count) from_acc(to_acc(args.to[j]) + args.more[j], args.to[j]);
}

struct DropoutArgs {
  const int64_t* seed;
  uint64_t threshold;  // 0: none
  double scale;
  int layer, width;  // whose output is dropped; width of one direction

  template <class T>
  __device__ __forceinline__ T apply(T value, const RowMap& map, int64_t row, int column) const {
    const int d = column / width;
    const uint32_t key =
        dropout_row(dropout_key(*seed, layer, d), map.step(row), map.sequence(row));
    return dropout_keeps(key, column - d * width, threshold) ? value * T(scale) : T(0);
  }
};

// Where a row of the input begins: by its (t, b), or by its number.
struct RowPlace {
  bool by_number;
  int64_t stride_t, stride_b;

  __device__ __forceinline__ int64_t at(const RowMap& map, int64_t row) const {
    return by_number ? row * stride_b : map.step(row) * stride_t + map.sequence(row) * stride_b;
  }
};

// A matrix of `rows` rows made from others, a row of it per warp, columns among its lanes. Columns
// from `width` to `to_wide` become zero.
enum class RowKind {
  copy,      // from `place`, dropped out
  previous,  // h before the row's step: a row of y, or of h0
  raw_h,     // o * tanh(c), what the projection took
  one_hot,   // 1 in the column that the row's index names
};
constexpr int kRowsOfBlock = kRowThreads / 32;
template <class S>
struct RowArgs {
  RowKind kind;
  RowMap map;
  S* to;
  int64_t rows, to_wide;
  int width;
  const S* from;  // copy: input; previous: y; raw_h: gates (rows, 4H)
  RowPlace place;
  DropoutArgs dropout;
  const S* h0;          // previous
  int direction;        // previous
  const Acc<S>* cells;  // raw_h
  const int* index;     // one_hot
  bool aligned;         // copy, previous: whole rows begin at 16 bytes and are copied so
};
template <class S>
__global__ void __launch_bounds__(kRowThreads, 4)
    row_kernel(const __grid_constant__ RowArgs<S> args) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * kRowsOfBlock + threadIdx.x / 32;
  if (row >= args.rows) return;
  const S* from = args.from;
  S* to = args.to + row * args.to_wide;
  if (args.kind == RowKind::copy) {
    from += args.place.at(args.map, row);
  } else if (args.kind == RowKind::previous) {
    const int t = args.map.step(row), b = args.map.sequence(row);
    const int64_t before = args.map.at(args.direction == 0 ? t - 1 : t + 1, b);
    from = before >= 0 ? from + before * args.place.stride_b
           : args.h0   ? args.h0 + int64_t(b) * args.width
                       : nullptr;
  }
  if (args.aligned) {
    const int pieces = args.width / int(16 / sizeof(S));
    for (int j = lane; j < pieces; j += 32)
      reinterpret_cast<uint4*>(to)[j] =
          from ? reinterpret_cast<const uint4*>(from)[j] : make_uint4(0, 0, 0, 0);
    return;
  }
  for (int j = lane; j < args.to_wide; j += 32) {
    Acc<S> value = 0;
    if (j < args.width) {
      if (args.kind == RowKind::one_hot) {
        value = j == args.index[row] ? 1 : 0;
      } else if (args.kind == RowKind::raw_h) {
        value = to_acc(from[(row * 4 + 3) * args.width + j]) *
                Math<Acc<S>>::tanh(args.cells[row * args.width + j]);
      } else {
        value = value_or_zero(from, j);
        if (args.dropout.threshold) value = args.dropout.apply(value, args.map, row, j);
      }
    }
    from_acc(value, to[j]);
  }
}

// The gradient of a layer's input, dropped out in place.
template <class T>
struct GradientArgs {
  RowMap map;
  T* gradient;
  int width;
  DropoutArgs dropout;
};
template <class T>
__global__ void __launch_bounds__(kRowThreads, 4)
    gradient_kernel(const __grid_constant__ GradientArgs<T> args) {
  const int64_t row = blockIdx.x;
  T* gradient = args.gradient + row * args.width;
  for (int j = threadIdx.x; j < args.width; j += kRowThreads)
    gradient[j] = args.dropout.apply(gradient[j], args.map, row, j);
}

// Indices as 32-bit numbers in the order of rows. One out of range ends the kernel with an error.
struct IndexArgs {
  RowMap map;
  const void* from;
  bool wide;  // 64 bits
  RowPlace place;
  int64_t rows, bound;
  int* to;
};
static __global__ void __launch_bounds__(kRowThreads, 4)
    index_kernel(const __grid_constant__ IndexArgs args) {
  const int64_t row = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (row >= args.rows) return;
  const int64_t at = args.place.at(args.map, row);
  const int64_t x = args.wide ? static_cast<const int64_t*>(args.from)[at]
                              : int64_t(static_cast<const int32_t*>(args.from)[at]);
  if (x < 0 || x >= args.bound) trap("index out of range");
  args.to[row] = int(x);
}

}  // namespace cuda
}  // namespace fastlstm

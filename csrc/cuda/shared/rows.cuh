// Small kernels around the steps: they pack operands once per call, gather rows and apply dropout.
//
// A row is one (t, b) pair, in time-major order (csrc/lstm.h). Each kernel reads and writes its
// matrix once, so its floor is bytes over bandwidth: 10,000 rows of 512 bf16 are some 20 MB, about
// 5 microseconds on an H200 (4.8 TB/s). No figure measured yet. A thread owns elements of the
// result.
#pragma once

#include "dropout.h"
#include "numeric.cuh"
#include "step_rows.cuh"

namespace fastlstm {
namespace cuda {

constexpr int kRowThreads = 256;

// Maps rows to (t, b) pairs and back. Where all sequences have one length, it needs no tables.
struct RowMap {
  const int *t, *b;  // (rows) each, or null
  StepRows steps;

  __device__ __forceinline__ int step(int64_t row) const {
    return t ? t[row] : int(row / steps.batch);
  }
  __device__ __forceinline__ int sequence(int64_t row) const {
    return t ? b[row] : int(row % steps.batch);
  }
  // The row of sequence b in step t, or -1.
  __device__ __forceinline__ int64_t at(int t, int b) const {
    if (t < 0 || t >= steps.count || b >= steps.sequences(t)) return -1;
    return steps.first_row(t) + b;
  }
};

// Fills the tables for some steps. The numbers travel as kernel arguments: a copy from host memory
// would be recorded in a CUDA graph as a pointer, which is stale when the graph is replayed.
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

// The order of the gates of `units` units in a packed matrix: slots of `slot` units, each slot with
// i of its units, then their f, g and o. With units == 0: any matrix, in the order of the source.
struct GateOrder {
  int units, slot;

  // The index in the source of what goes to index j.
  __device__ __forceinline__ int64_t source(int64_t j) const {
    if (units == 0) return j;
    const int unit = existing_unit(int(j / (4 * slot) * slot + j % slot), units);
    return j % (4 * slot) / slot * int64_t(units) + unit;
  }
};

constexpr GateOrder kAsStored{0, 0};

// Copies a matrix (rows, depth), whose element (r, k) is at r * row_stride + k * k_stride, to
// (to_rows, to_stride), with zeros beyond it. With an index, row r is the source's row index[r].
// One launch packs up to two matrices of one shape, one for each blockIdx.y.
template <class S, class To>
struct PackArgs {
  const S* from[2] = {};  // null: zeros
  To* to[2] = {};
  const int* index = nullptr;
  int64_t row_stride = 0, k_stride = 1, rows = 0, to_rows = 0, to_stride = 0;
  int depth = 0;
  GateOrder row_order = kAsStored, k_order = kAsStored;
};
template <class S, class To>
__global__ void __launch_bounds__(kRowThreads, 4)
    pack_kernel(const __grid_constant__ PackArgs<S, To> args) {
  const S* from = args.from[blockIdx.y];
  To* to = args.to[blockIdx.y];
  // Neighbouring threads read neighbouring elements of the source.
  const bool along_rows = args.row_stride == 1 && args.k_stride != 1;
  const int64_t across = along_rows ? args.to_rows : args.to_stride;
  const int64_t stride = int64_t(gridDim.x) * kRowThreads;
  for (int64_t j = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
       j < args.to_rows * args.to_stride; j += stride) {
    const int64_t r = along_rows ? j % across : j / across;
    const int64_t k = along_rows ? j / across : j % across;
    int64_t row = args.row_order.source(r);
    const int64_t column = args.k_order.source(k);
    const bool inside = from && row < args.rows && column < args.depth;
    if (inside && args.index) row = args.index[row];
    Acc<S> value = 0;
    if (inside) value = to_acc(from[row * args.row_stride + column * args.k_stride]);
    from_acc(value, to[r * args.to_stride + k]);
  }
}

// sums (pseudo-layers, count) = b_ih + b_hh of each pseudo-layer (one direction of one layer), a
// pseudo-layer for each blockIdx.y.
constexpr int kBiasesOfLaunch = 64;
template <class S>
struct BiasArgs {
  const S *b_ih[kBiasesOfLaunch], *b_hh[kBiasesOfLaunch];
  Acc<S>* sums;
  int count;
};
template <class S>
__global__ void __launch_bounds__(kRowThreads, 4)
    bias_kernel(const __grid_constant__ BiasArgs<S> args) {
  const int j = blockIdx.x * kRowThreads + threadIdx.x, pseudo_layer = blockIdx.y;
  if (j < args.count)
    args.sums[int64_t(pseudo_layer) * args.count + j] =
        to_acc(args.b_ih[pseudo_layer][j]) + to_acc(args.b_hh[pseudo_layer][j]);
}

// to += addend
template <class S>
struct AddArgs {
  S* to;
  const Acc<S>* addend;
  int64_t count;
};
template <class S>
__global__ void __launch_bounds__(kRowThreads, 4)
    add_kernel(const __grid_constant__ AddArgs<S> args) {
  const int64_t j = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (j < args.count) from_acc(to_acc(args.to[j]) + args.addend[j], args.to[j]);
}

// Dropout of a layer's output; of nothing where it is left at its defaults.
struct DropoutArgs {
  const int64_t* seed = nullptr;
  uint64_t threshold = 0;    // 0: no dropout
  double scale = 1;          // of elements that are not dropped
  int layer = 0, width = 1;  // whose output it is; the width of one direction

  template <class T>
  __device__ __forceinline__ T apply(T value, const RowMap& map, int64_t row, int column) const {
    const int d = column / width;
    const uint32_t key =
        dropout_row(dropout_key(*seed, layer, d), map.step(row), map.sequence(row));
    return dropout_keeps(key, column - d * width, threshold) ? value * T(scale) : T(0);
  }
};

// Where a row of the input begins: by its number, or by its step and sequence.
struct RowPlace {
  bool by_number;
  int64_t stride_t, stride_b;

  __device__ __forceinline__ int64_t at(const RowMap& map, int64_t row) const {
    return by_number ? row * stride_b : map.step(row) * stride_t + map.sequence(row) * stride_b;
  }
};

// Makes a matrix of `rows` rows, one row a warp. Columns from `width` to `to_stride` become zero.
enum class RowKind {
  copy,           // the input at `place`, with dropout
  previous,       // h before the row's step: a row of y, or of h0
  unprojected_h,  // o * tanh(c), the projection's operand
  one_hot,        // 1 in the column that the row's index names
};
constexpr int kRowsOfBlock = kRowThreads / 32;
template <class S>
struct RowArgs {
  RowKind kind;
  RowMap map;
  S* to;
  int64_t begin, rows, to_stride;  // begin: the first row that is made, which `to` begins with
  int width;
  const S* from;  // copy: input; previous: y; unprojected_h: gates (rows, 4H)
  RowPlace place;
  DropoutArgs dropout;
  const S* h0;                // previous
  int direction;              // previous
  const Acc<S>* cell_states;  // unprojected_h
  const int* index;           // one_hot
  bool aligned;  // copy, previous: rows begin at 16 bytes and are copied in pieces of 16 bytes
};
template <class S>
__global__ void __launch_bounds__(kRowThreads, 4)
    row_kernel(const __grid_constant__ RowArgs<S> args) {
  const int lane = threadIdx.x % 32;
  const int64_t made = int64_t(blockIdx.x) * kRowsOfBlock + threadIdx.x / 32;
  if (made >= args.rows) return;
  const int64_t row = args.begin + made;
  const S* from = args.from;
  S* to = args.to + made * args.to_stride;
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
  for (int j = lane; j < args.to_stride; j += 32) {
    Acc<S> value = 0;
    if (j < args.width) {
      if (args.kind == RowKind::one_hot) {
        value = j == args.index[row] ? 1 : 0;
      } else if (args.kind == RowKind::unprojected_h) {
        value = to_acc(from[(row * 4 + 3) * args.width + j]) *  // the gate o
                Math<Acc<S>>::tanh(args.cell_states[row * args.width + j]);
      } else {
        value = value_or_zero(from, j);
        if (args.dropout.threshold) value = args.dropout.apply(value, args.map, row, j);
      }
    }
    from_acc(value, to[j]);
  }
}

// Applies dropout to the gradient of a layer's input, in place.
template <class T>
struct GradientArgs {
  RowMap map;
  T* gradient;
  int64_t begin;  // the first row that it applies to
  int width;
  DropoutArgs dropout;
};
template <class T>
__global__ void __launch_bounds__(kRowThreads, 4)
    gradient_kernel(const __grid_constant__ GradientArgs<T> args) {
  const int64_t row = args.begin + blockIdx.x;
  T* gradient = args.gradient + row * args.width;
  for (int j = threadIdx.x; j < args.width; j += kRowThreads)
    gradient[j] = args.dropout.apply(gradient[j], args.map, row, j);
}

// Indices as 32-bit numbers in the order of rows. An index out of range traps.
struct IndexArgs {
  RowMap map;
  const void* from;
  bool is_64_bit;
  RowPlace place;
  int64_t rows, bound;
  int* to;
};
static __global__ void __launch_bounds__(kRowThreads, 4)
    index_kernel(const __grid_constant__ IndexArgs args) {
  const int64_t row = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (row >= args.rows) return;
  const int64_t at = args.place.at(args.map, row);
  const int64_t x = args.is_64_bit ? static_cast<const int64_t*>(args.from)[at]
                                   : int64_t(static_cast<const int32_t*>(args.from)[at]);
  if (x < 0 || x >= args.bound) trap("index out of range");
  args.to[row] = int(x);
}

}  // namespace cuda
}  // namespace fastlstm

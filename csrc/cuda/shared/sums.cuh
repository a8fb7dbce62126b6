// Sums over rows in a fixed order, without atomics: the gradients of biases, and that of W_ih for
// index input.
#pragma once

#include "numeric.cuh"

namespace fastlstm {
namespace cuda {

// Sums of the columns of a matrix, in two launches: the first sums each part of kSumRows rows by
// itself, the second sums the parts. A CTA owns 32 columns; each of its eight warps adds every
// eighth row. The parts are along the grid's x, because the other axes end at 65,535.
constexpr int kSumRows = 512, kSumWarps = 8;

template <class From, class To>
struct ColumnArgs {
  const From* from;
  // Columns are in up to two groups. Column j of group d goes to to[d] and copy_to[d], either of
  // which may be null; the sums of part p begin at p * columns.
  To *to[2], *copy_to[2];
  int64_t rows, stride, part_rows;
  int columns, group_columns, used_columns;  // in all; of a group; those of a group to store
};
template <class From, class To>
__global__ void __launch_bounds__(32 * kSumWarps)
    column_kernel(const __grid_constant__ ColumnArgs<From, To> args) {
  typedef Acc<From> T;
  FASTLSTM_SHARED_BUFFER(shared);
  T(*sums)[32] = reinterpret_cast<T(*)[32]>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.y * 32 + lane;
  const int64_t begin = blockIdx.x * args.part_rows;
  const int64_t end = begin + args.part_rows < args.rows ? begin + args.part_rows : args.rows;
  T sum = 0;
  if (column < args.columns)
    for (int64_t row = begin + warp; row < end; row += kSumWarps)
      sum += to_acc(args.from[row * args.stride + column]);
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= args.columns) return;
  for (int w = 1; w < kSumWarps; ++w) sum += sums[w][lane];
  const int d = column / args.group_columns, j = column - d * args.group_columns;
  if (j >= args.used_columns) return;
  const int64_t at = int64_t(blockIdx.x) * args.columns + j;
  if (args.to[d]) from_acc(sum, args.to[d][at]);
  if (args.copy_to[d]) from_acc(sum, args.copy_to[d][at]);
}
template <class T>
constexpr int kColumnShared = 32 * kSumWarps * int(sizeof(T));

// to (columns, vocabulary): column x is the sum of the rows whose index is x. A CTA owns
// kSumIndices indices by kSumColumns columns in shared memory. It scans all indices, kSumColumns at
// a time, and adds the rows of its indices in their order.
constexpr int kSumIndices = 32, kSumColumns = 128;

template <class S>
struct IndexSumArgs {
  const S* from;
  const int* index;
  S* to;
  int64_t rows, stride, vocabulary;
  int columns;
};
template <class S>
struct IndexSumShared {
  Acc<S> sums[kSumIndices][kSumColumns];
  int index[kSumColumns];
};
template <class S>
__global__ void __launch_bounds__(kSumColumns, 8)
    index_sum_kernel(const __grid_constant__ IndexSumArgs<S> args) {
  FASTLSTM_SHARED_BUFFER(raw);
  IndexSumShared<S>& shared = *reinterpret_cast<IndexSumShared<S>*>(raw);
  const int me = threadIdx.x, column = blockIdx.y * kSumColumns + me;
  const int64_t first = int64_t(blockIdx.x) * kSumIndices;
  for (int j = 0; j < kSumIndices; ++j) shared.sums[j][me] = 0;
  for (int64_t begin = 0; begin < args.rows; begin += kSumColumns) {
    __syncthreads();
    const int64_t mine = begin + me < args.rows ? args.index[begin + me] - first : -1;
    shared.index[me] = mine < kSumIndices ? int(mine) : -1;
    __syncthreads();
    if (column >= args.columns) continue;
    for (int j = 0; j < kSumColumns; ++j)
      if (shared.index[j] >= 0)
        shared.sums[shared.index[j]][me] += to_acc(args.from[(begin + j) * args.stride + column]);
  }
  if (column >= args.columns) return;
  for (int j = 0; j < kSumIndices && first + j < args.vocabulary; ++j)
    from_acc(shared.sums[j][me], args.to[column * args.vocabulary + first + j]);
}

}  // namespace cuda
}  // namespace fastlstm

// A^T B, summed over rows that arrive in chunks: the form of every gradient of a weight matrix.
//
// A task has some rows of A^T, and all columns of one sum or of several that share A. For
// kSliceRows rows of A and B at a time it packs its part of A into slivers, and kTileN columns of B
// after another into panels, and multiplies them. So a sum is a sum of partial sums, which is more
// accurate, in an order that depends neither on threads nor on tasks.
#pragma once

#include "gemm.h"

namespace fastlstm {
namespace {

template <class E>
struct RowSum {
  typedef Acc<E> T;

  void reset(int64_t rows, int64_t columns) {
    m = rows;
    n = columns;
    stride = padded<T>(n);
    const int64_t size = round_up(m, kTileRows) * stride;  // whole slivers
    values.reset(size);
    for (int64_t j = 0; j < size; ++j) values[j] = 0;
  }

  template <class S>
  void write(const Runtime& runtime, S* to) const {
    constexpr int64_t kRows = 64;
    parallel_if_worth(runtime, m * n, ceil_div(m, kRows), [&](int64_t task) {
      for (int64_t i = task * kRows; i < min_of(m, (task + 1) * kRows); ++i)
        for (int64_t j = 0; j < n; ++j) from_acc(values[i * stride + j], to[i * n + j]);
    });
  }

  int64_t m = 0, n = 0, stride = 0;
  Buffer<T> values;
};

// The rows of A^T in even parts, one for a task: whole slivers, at most kTileM rows. As many parts
// for each thread, unless they would be so low that packing B costs more than that gains.
struct RowSumTiles {
  RowSumTiles(int64_t m, int64_t threads) {
    const int64_t slivers = ceil_div(m, kTileRows);
    const int64_t most = max_of(1, slivers / kLeastSlivers);
    const int64_t tiles = min_of(round_up(ceil_div(m, kTileM), threads), most);
    rows = ceil_div(slivers, max_of(tiles, ceil_div(m, kTileM))) * kTileRows;
    count = ceil_div(m, rows);
  }
  static constexpr int64_t kLeastSlivers = 3;

  int64_t rows, count;
};

// A's rows are prefetched so far ahead: a tile's part of a row is too short for the hardware.
template <class E>
constexpr int64_t kRowsAhead = kDeep<E> > 4 ? kDeep<E> : 4;

// Packs columns [0, columns) of rows of A into slivers, and adds the rows to `sums`, if any.
template <class E>
void pack_slivers(E* slivers, const E* a, int64_t stride, int64_t rows, int64_t columns,
                  const E* zeros, Acc<E>* sums) {
  const int64_t deep = packed_depth<E>(rows);
  for (int64_t k = 0; k < deep; k += kDeep<E>) {
    const E* row[kDeep<E>];
    for (int q = 0; q < kDeep<E>; ++q) row[q] = k + q < rows ? a + (k + q) * stride : zeros;
    for (int q = 0; q < kDeep<E>; ++q) prefetch(a + (k + q + kRowsAhead<E>)*stride, columns);
    for (int64_t j = 0; j < columns; j += kTileRows) {
      const E* from[kDeep<E>];
      for (int q = 0; q < kDeep<E>; ++q) from[q] = row[q] + j;
      pack_sliver(slivers + j * deep + k * kTileRows, from, min_of(kTileRows, columns - j));
    }
    for (int q = 0; sums && q < kDeep<E> && k + q < rows; ++q)
      for (int64_t j = 0; j < columns; ++j) sums[j] += to_acc(row[q][j]);
  }
}

// Packs `columns` columns of rows of B into panels. read(room, r, n) gives where so many elements
// of row r are, either as they stand in memory or put into `room`.
template <class E, class Read>
void pack_panels(E* panels, E* room, int64_t rows, int64_t columns, const E* zeros, Read&& read) {
  typedef Acc<E> T;
  const int64_t deep = packed_depth<E>(rows), stride = padded<T>(columns);
  for (int64_t k = 0; k < deep; k += kPair<E>) {
    const E* row[kPair<E>];
    for (int q = 0; q < kPair<E>; ++q)
      row[q] = k + q < rows ? read(room + q * stride, k + q, columns) : zeros;
    for (int64_t j = 0; j < stride; j += kPanel<T>) {
      const E* from[kPair<E>];
      for (int q = 0; q < kPair<E>; ++q) from[q] = row[q] + j;
      E* const to = panels + j * deep + packed_at<E>(k, 0);
      if (j + kPanel<T> > columns) memset(to, 0, kPanel<T> * kPair<E> * sizeof(E));
      interleave(to, from, min_of(kPanel<T>, columns - j));  // a row may end with its last column
    }
  }
}

// What a sum is of: read(room, r, first, n) gives columns [first, first + n) of row r of B.
template <class E, class Read>
struct RowSumPart {
  const RowSum<E>& sum;
  Read read;
};
template <class E, class Read>
RowSumPart<E, Read> part_of(const RowSum<E>& sum, Read read) {
  return {sum, read};
}

// Adds `rows` rows to a task's part of the sums, which have the same A. a: its first row, whose
// other rows are `stride` apart. sums: those of A's columns, to which its rows are added, or null.
template <class E, class... Part>
void add_rows(const RowSumTiles& tiles, int64_t task, int64_t m, const E* a, int64_t stride,
              int64_t rows, Acc<E>* sums, const Part&... parts) {
  const int64_t m0 = task * tiles.rows, tile_m = min_of(tiles.rows, m - m0);
  int64_t widest = 0;
  ((widest = max_of(widest, min_of(kTileN, padded<Acc<E>>(parts.sum.n)))), ...);
  Buffer<E> slivers, panels(widest * kSliceRows), room(kPair<E> * widest), zeros;
  Buffer<Acc<E>> slice_sums(tile_m);
  slivers.reset_to_zero(round_up(tile_m, kTileRows) * kSliceRows);
  zeros.reset_to_zero(max_of(widest, tile_m));
  for_even_blocks(rows, kSliceRows, [&](int depth, int64_t first) {
    for (int64_t j = 0; j < tile_m; ++j) slice_sums[j] = 0;
    pack_slivers(slivers.get(), a + first * stride + m0, stride, depth, tile_m, zeros.get(),
                 sums ? slice_sums.get() : nullptr);
    for (int64_t j = 0; sums && j < tile_m; ++j) sums[m0 + j] += slice_sums[j];
    auto add_part = [&](const auto& part) {
      for (int64_t n0 = 0; n0 < part.sum.n; n0 += kTileN) {
        const int64_t columns = min_of(kTileN, part.sum.n - n0);
        pack_panels(panels.get(), room.get(), depth, columns, zeros.get(),
                    [&](E* to, int64_t r, int64_t n) { return part.read(to, first + r, n0, n); });
        gemm_slivers(part.sum.values.get() + m0 * part.sum.stride + n0, part.sum.stride,
                     slivers.get(), panels.get(), tile_m, columns, depth);
      }
    };
    (add_part(parts), ...);
  });
}

}  // namespace
}  // namespace fastlstm

// A^T B, summed over rows that arrive in chunks: the form of every gradient of a weight matrix.
//
// A task has kTileM x kTileN elements of the sum. For kSliceRows rows at a time it packs its part
// of A into slivers and its part of B into panels, and multiplies them. So a sum is a sum of
// partial sums, which is more accurate, in an order that does not depend on threads.
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
    const int64_t size = round_up(m, kTileRows) * stride;  // whole tiles
    values.reset(size);
    for (int64_t j = 0; j < size; ++j) values[j] = 0;
  }
  int64_t tiles_across() const { return ceil_div(n, kTileN); }
  int64_t tiles() const { return ceil_div(m, kTileM) * tiles_across(); }

  // Adds the rows of A (row r at a + r * a_stride) times those of B: load_b(to, r, column, count).
  template <class LoadB>
  void add(int64_t tile, const E* a, int64_t a_stride, int64_t rows, LoadB&& load_b) const {
    const int64_t m0 = tile / tiles_across() * kTileM, n0 = tile % tiles_across() * kTileN;
    const int64_t tile_m = min_of(kTileM, m - m0), tile_n = min_of(kTileN, n - n0);
    const int64_t b_stride = padded<T>(tile_n);
    Buffer<E> slivers, panels, b_rows, zeros;
    slivers.reset_to_zero(round_up(tile_m, kTileRows) * kSliceRows);
    panels.reset(b_stride * kSliceRows);
    b_rows.reset_to_zero(kDeep<E> * b_stride);
    zeros.reset_to_zero(max_of(b_stride, tile_m));
    for (int64_t first = 0; first < rows; first += kSliceRows) {
      const int64_t depth = min_of(kSliceRows, rows - first), deep = packed_depth<E>(depth);
      for (int64_t k = 0; k < deep; k += kDeep<E>) {
        const E *a_row[kDeep<E>], *b_row[kDeep<E>];
        for (int q = 0; q < kDeep<E>; ++q) {
          const bool within = k + q < depth;
          E* loaded = b_rows.get() + q * b_stride;
          if (within) load_b(loaded, first + k + q, n0, tile_n);
          a_row[q] = within ? a + (first + k + q) * a_stride + m0 : zeros.get();
          b_row[q] = within ? loaded : zeros.get();
        }
        for (int64_t j = 0; j < tile_m; j += kTileRows) {
          const E* from[kDeep<E>];
          for (int q = 0; q < kDeep<E>; ++q) from[q] = a_row[q] + j;
          pack_sliver(slivers.get() + j * deep + k * kTileRows, from,
                      min_of(kTileRows, tile_m - j));
        }
        for (int q = 0; q < kDeep<E>; q += kPair<E>)
          for (int64_t j = 0; j < b_stride; j += kPanel<T>) {
            const E* pair[kPair<E>];
            for (int s = 0; s < kPair<E>; ++s) pair[s] = b_row[q + s] + j;
            interleave(panels.get() + j * deep + packed_at<E>(k + q, 0), pair, kPanel<T>);
          }
      }
      gemm_slivers(values.get() + m0 * stride + n0, stride, slivers.get(), panels.get(), tile_m,
                   tile_n, depth);
    }
  }

  template <class S>
  void write(const Runtime& runtime, S* to) const {
    parallel(runtime, ceil_div(m, kTileM), [&](int64_t task) {
      for (int64_t i = task * kTileM; i < min_of(m, (task + 1) * kTileM); ++i)
        for (int64_t j = 0; j < n; ++j) from_acc(values[i * stride + j], to[i * n + j]);
    });
  }

  int64_t m = 0, n = 0, stride = 0;
  Buffer<T> values;
};

}  // namespace
}  // namespace fastlstm

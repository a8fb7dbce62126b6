// The matrix products of the CPU kernels: one register tile over packed weights.
//
// B (K x N) is packed once into panels of kPanel columns, [panel][k][kPanel], zero-padded; with
// operands in pairs (vec.h) [panel][k / 2][kPanel][2], and every depth rounded up to even. A tile
// of up to kTileRows rows times one panel stays in registers for the whole K loop: per k it loads
// kPanelVecs vectors of B and broadcasts one element of A a row. Rows are split evenly (50 rows
// are not eight sixes and a two), for a thin tile cannot hide the latency of the FMAs.
#pragma once

#include "vec.h"

namespace fastlstm {
namespace {

#if FASTLSTM_VEC_BYTES == 64
constexpr int kTileRows = 12;  // 24 accumulators of 32 registers
#else
constexpr int kTileRows = 6;  // 12 accumulators of 16 registers
#endif
constexpr int kPanelVecs = 2;
template <class T>
constexpr int kPanel = kPanelVecs * kWidth<T>;

// A chunk of K: a panel's part and the rows of a tile fit the first-level cache.
constexpr int64_t kChunkK = 512;

FASTLSTM_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTLSTM_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
FASTLSTM_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T>
FASTLSTM_INLINE int64_t panels_of(int64_t n) {
  return ceil_div(n, kPanel<T>);
}
template <class T>
FASTLSTM_INLINE int64_t padded(int64_t n) {
  return panels_of<T>(n) * kPanel<T>;
}

template <class T, int G, int M>
using Tile = Vec<T>[G][M][kPanelVecs];

// Where element k of column (or, in a sliver, row) j of `wide` stands in what was packed.
template <class E>
FASTLSTM_INLINE int64_t packed_at(int64_t k, int64_t j, int64_t wide) {
  return (k / kPair<E> * wide + j) * kPair<E> + k % kPair<E>;
}
template <class E>
FASTLSTM_INLINE int64_t packed_depth(int64_t depth) {
  return ceil_div(depth, kPair<E>) * kPair<E>;
}

// acc[g][m] += sum over k of a[m, k] * b_g[k], for G neighbouring panels of B. A element (m, k)
// is at m * lda + k, or, in a sliver packed for the purpose, at packed_at(k, m, kTileRows).
template <class E, int G, int M, bool kSliver>
FASTLSTM_INLINE void tile_fma(const E* a, int64_t lda, const E* b, int64_t panel_stride,
                              int64_t depth, Tile<Acc<E>, G, M>& acc) {
  typedef Acc<E> T;
  for (int64_t k = 0; k < depth; k += kPair<E>) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      Vec<Word<E>> cols[kPanelVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v)
        cols[v] = load_words(b + g * panel_stride + k * kPanel<T> + v * kPair<E> * kWidth<T>);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Word<E> x = load_word(a + (kSliver ? k * kTileRows + m * kPair<E> : m * lda + k));
#pragma GCC unroll 4
        for (int v = 0; v < kPanelVecs; ++v) acc[g][m][v] = multiply_add(acc[g][m][v], cols[v], x);
      }
    }
  }
}

template <int N>
struct Int {
  static constexpr int value = N;
};

template <int N, class F>
FASTLSTM_INLINE void with_rows(int rows, F&& f) {
  if (rows == N)
    f(Int<N>{});
  else if constexpr (N > 1)
    with_rows<N - 1>(rows, f);
}

// Calls f(Int<M>{}, first row) for blocks of at most kMost rows, as even as can be.
template <int kMost = kTileRows, class F>
FASTLSTM_INLINE void for_row_blocks(int64_t rows, F&& f) {
  const int64_t blocks = ceil_div(rows, kMost);
  for (int64_t j = 0, row = 0; j < blocks; ++j) {
    const int size = int(rows / blocks + (j < rows % blocks));
    with_rows<kMost>(size, [&](auto m) { f(m, row); });
    row += size;
  }
}

// out[r][m] += the product of row r of W (R rows in memory, w_stride apart) with x[m], M rows.
template <class S, int R, int M>
FASTLSTM_INLINE void row_products(Acc<S> (*out)[M], const S* w, int64_t w_stride,
                                  const Operand<S>* x, int64_t ldx, int64_t depth) {
  typedef Acc<S> T;
  Vec<T> acc[R][M] = {};
  auto add = [&](auto&& load_w, auto&& load_x) {
    Vec<T> columns[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) columns[m] = load_x(x + m * ldx);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> row = load_w(w + r * w_stride);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[r][m] += row * columns[m];
    }
  };
  int64_t k = 0;
  for (; k + kWidth<T> <= depth; k += kWidth<T>)
    add([=](const S* p) { return load_as(p + k); },
        [=](const Operand<S>* p) { return load_as(p + k); });
  const int rest = int(depth - k);
  if (rest)
    add([=](const S* p) { return load_part(p + k, rest); },
        [=](const Operand<S>* p) { return load_part(p + k, rest); });
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      T sum = 0;
      for (int lane = 0; lane < kWidth<T>; ++lane) sum += acc[r][m][lane];
      out[r][m] += sum;
    }
}

// C (rows x n, ldc) = A (rows x depth, lda) * panels, for panels [0, ceil(n / kPanel)). C is
// padded to whole panels: its row holds padded(n) elements. With `add` the product is added.
template <class E>
void gemm_rows(Acc<E>* c, int64_t ldc, const E* a, int64_t lda, const E* panels, int64_t rows,
               int64_t depth, int64_t n, bool add) {
  typedef Acc<E> T;
  const int64_t panel_depth = packed_depth<E>(depth);
  // A's rows of one chunk of K stay in the second-level cache while the panels pass.
  for (int64_t k0 = 0; k0 < depth; k0 += kChunkK) {
    const int64_t chunk = min_of(kChunkK, depth - k0);
    const bool accumulate = add || k0 > 0;
    for (int64_t p = 0; p < panels_of<T>(n); ++p) {
      const E* panel = panels + (p * panel_depth + k0) * kPanel<T>;
      for_row_blocks(rows, [&](auto block, int64_t row) {
        constexpr int M = decltype(block)::value;
        Tile<T, 1, M> acc = {};
        tile_fma<E, 1, M, false>(a + row * lda + k0, lda, panel, 0, chunk, acc);
        for (int m = 0; m < M; ++m)
          for (int v = 0; v < kPanelVecs; ++v) {
            T* to = c + (row + m) * ldc + p * kPanel<T> + v * kWidth<T>;
            store(to, accumulate ? load(to) + acc[0][m][v] : acc[0][m][v]);
          }
      });
    }
  }
}

// C (m x n, ldc, padded to whole tiles) += A^T B over `depth` rows: A packed in slivers
// [sliver][k][kTileRows], B in panels [panel][k][kPanel]. The sum over this depth is made in
// registers from zero, so a long sum is one of partial sums.
template <class E>
void gemm_slivers(Acc<E>* c, int64_t ldc, const E* slivers, const E* panels, int64_t m, int64_t n,
                  int64_t depth) {
  typedef Acc<E> T;
  const int64_t deep = packed_depth<E>(depth);
  for (int64_t s = 0; s < ceil_div(m, kTileRows); ++s)
    for (int64_t p = 0; p < panels_of<T>(n); ++p) {
      Tile<T, 1, kTileRows> acc = {};
      tile_fma<E, 1, kTileRows, true>(slivers + s * deep * kTileRows, 0,
                                      panels + p * deep * kPanel<T>, 0, depth, acc);
      for (int i = 0; i < kTileRows; ++i)
        for (int v = 0; v < kPanelVecs; ++v) {
          T* to = c + (s * kTileRows + i) * ldc + p * kPanel<T> + v * kWidth<T>;
          store(to, load(to) + acc[0][i][v]);
        }
    }
}

}  // namespace
}  // namespace fastlstm

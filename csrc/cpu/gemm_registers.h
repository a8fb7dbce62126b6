// Products with one register tile over packed weights (gemm.h has their layout).
//
// A tile of up to kTileRows rows times one panel stays in registers for the whole K loop: per k it
// loads kPanelVecs vectors of B and broadcasts one element of A a row.
#pragma once

namespace fastlstm {
namespace {

#if FASTLSTM_VEC_BYTES == 64
constexpr int kTileRows = 14;   // 28 accumulators of 32 registers
constexpr int64_t kAhead = 24;  // how many k ahead panels are fetched to the first-level cache
#else
constexpr int kTileRows = 6;  // 12 accumulators of 16 registers
constexpr int64_t kAhead = 0;
#endif

// A chunk of K: a panel's part and the rows of a tile fit the first-level cache.
constexpr int64_t kChunkK = 512;

// A task's part of a sum over rows, and how many rows it packs at a time: for second-level caches
// of 2 MiB and, without AVX-512, of half of one.
#if FASTLSTM_VEC_BYTES == 64
constexpr int64_t kTileM = 30 * kTileRows, kTileN = 512, kSliceRows = 192;
#else
constexpr int64_t kTileM = 24 * kTileRows, kTileN = 256, kSliceRows = 192;
#endif

template <class F>
FASTLSTM_INLINE void for_row_blocks(int64_t rows, F&& f) {
  for_even_blocks(rows, kTileRows, f);
}

template <class T, int G, int M>
using Tile = Vec<T>[G][M][kPanelVecs];

// acc[g][m] += sum over k of a[m, k] * b_g[k], for G neighbouring panels of B. A element (m, k)
// is at m * lda + k, or, in a sliver packed for the purpose, at packed_at(k, m) of kTileRows
// columns.
template <class E, int G, int M, bool kSliver>
FASTLSTM_INLINE void tile_fma(const E* a, int64_t lda, const E* b, int64_t panel_stride,
                              int64_t depth, Tile<Acc<E>, G, M>& acc) {
  typedef Acc<E> T;
  for (int64_t k = 0; k < depth; k += kPair<E>) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      Vec<Word<E>> cols[kPanelVecs];
      if constexpr (kAhead > 0 && !kSliver)
        for (int v = 0; v < kPanelVecs; ++v)
          __builtin_prefetch(b + g * panel_stride + (k + kAhead) * kPanel<T> +
                             v * kPair<E> * kWidth<T>);
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

// out[g] = A (rows x depth, lda) * panel g, for four neighbouring panels, `apart` elements apart.
template <class E>
FASTLSTM_INLINE void multiply_gates(Acc<E> (*out)[kTileRows][kPanel<Acc<E>>], const E* a,
                                    int64_t lda, const E* panels, int64_t apart, int64_t depth,
                                    int rows) {
  typedef Acc<E> T;
  with_rows<kTileRows>(rows, [&](auto block) {
    constexpr int M = decltype(block)::value;
    // Few rows: several gates at once, for enough independent sums to fill the FMA pipeline.
    constexpr int G = M * 4 <= kTileRows ? 4 : M * 2 <= kTileRows ? 2 : 1;
    for (int g = 0; g < 4; g += G) {
      Tile<T, G, M> acc = {};
      tile_fma<E, G, M, false>(a, lda, panels + g * apart, apart, depth, acc);
      for (int j = 0; j < G; ++j)
        for (int m = 0; m < M; ++m)
          for (int v = 0; v < kPanelVecs; ++v) store(&out[g + j][m][v * kWidth<T>], acc[j][m][v]);
    }
  });
}

// C (rows x n, ldc) = start + A (rows x depth, lda) * panels, for panels [0, ceil(n / kPanel)). C
// is padded to whole panels: its row holds padded(n) elements, and so does one of `start`.
template <class E>
void gemm_rows(Acc<E>* c, int64_t ldc, const E* a, int64_t lda, const E* panels, int64_t rows,
               int64_t depth, int64_t n, Start<Acc<E>> start) {
  typedef Acc<E> T;
  const int64_t panel_depth = packed_depth<E>(depth);
  // A's rows of one chunk of K stay in the second-level cache while the panels pass.
  for (int64_t k0 = 0; k0 < depth; k0 += kChunkK) {
    const int64_t chunk = min_of(kChunkK, depth - k0);
    const Start<T> from = k0 > 0 ? Start<T>{c, ldc} : start;
    for (int64_t p = 0; p < panels_of<T>(n); ++p) {
      const E* panel = panels + (p * panel_depth + k0) * kPanel<T>;
      for_row_blocks(rows, [&](int count, int64_t row) {
        with_rows<kTileRows>(count, [&](auto block) {
          constexpr int M = decltype(block)::value;
          Tile<T, 1, M> acc = {};
          tile_fma<E, 1, M, false>(a + row * lda + k0, lda, panel, 0, chunk, acc);
          for (int m = 0; m < M; ++m)
            for (int v = 0; v < kPanelVecs; ++v) {
              const int64_t at = p * kPanel<T> + v * kWidth<T>;
              const T* own = from.rows + (row + m) * from.stride + at;
              store(c + (row + m) * ldc + at, from.rows ? load(own) + acc[0][m][v] : acc[0][m][v]);
            }
        });
      });
    }
  }
}

// Elements [0, n) of kDeep<E> rows of A, neighbours in K, to a sliver's place for them.
template <class E>
FASTLSTM_INLINE void pack_sliver(E* to, const E* const* rows, int64_t n) {
  if (n == kTileRows)
    interleave(to, rows, kTileRows);
  else
    interleave(to, rows, n);
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

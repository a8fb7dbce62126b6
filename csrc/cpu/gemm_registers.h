// Matrix products that compute a tile of C in vector registers, over packed weights (panels.h).
//
// A tile of C is up to kTileRows rows of one panel. It stays in registers for the whole loop over
// K, which loads kPanelVecs vectors of B for each k and broadcasts one element of A for each row.
#pragma once

#include "panels.h"

namespace fastlstm {
namespace {

#if FASTLSTM_VEC_BYTES == 64
constexpr int kTileRows = 14;      // 28 accumulators of 32 registers
constexpr int64_t kPrefetch = 24;  // B is prefetched into L1 so many k ahead
#else
constexpr int kTileRows = 6;  // 12 accumulators of 16 registers
constexpr int64_t kPrefetch = 0;
#endif

// K is cut into chunks, so that a panel's chunk and the rows of a tile fit into L1.
constexpr int64_t kChunkK = 512;

// Of a sum over rows: the part of C that is one task's, and how many rows it packs at a time. Both
// fit into an L2 cache of 2 MiB or, without AVX-512, of half a MiB.
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

// acc[g][m] += sum over k of a[m, k] * b_g[k], for G neighbouring panels of B. Element (m, k) of A
// is at m * lda + k. In a sliver (pack_sliver) it is where packed_at(k, m) would put it in a panel
// of kTileRows columns.
template <class E, int G, int M, bool kSliver>
FASTLSTM_INLINE void tile_fma(const E* a, int64_t lda, const E* b, int64_t panel_stride,
                              int64_t depth, Tile<Acc<E>, G, M>& acc) {
  typedef Acc<E> T;
  for (int64_t k = 0; k < depth; k += kPair<E>) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      Vec<Word<E>> cols[kPanelVecs];
      if constexpr (kPrefetch > 0 && !kSliver)
        for (int v = 0; v < kPanelVecs; ++v)
          __builtin_prefetch(b + g * panel_stride + (k + kPrefetch) * kPanel<T> +
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

// out[g] = A (rows x depth, lda) * panel g, for four panels, panel_stride elements apart.
template <class E>
FASTLSTM_INLINE void multiply_gates(Acc<E> (*out)[kTileRows][kPanel<Acc<E>>], const E* a,
                                    int64_t lda, const E* panels, int64_t panel_stride,
                                    int64_t depth, int rows) {
  typedef Acc<E> T;
  with_rows<kTileRows>(rows, [&](auto block) FASTLSTM_INLINED {
    constexpr int M = decltype(block)::value;
    // With few rows, several gates at once give enough independent sums to fill the FMA pipeline.
    constexpr int G = M * 4 <= kTileRows ? 4 : M * 2 <= kTileRows ? 2 : 1;
    for (int g = 0; g < 4; g += G) {
      Tile<T, G, M> acc = {};
      tile_fma<E, G, M, false>(a, lda, panels + g * panel_stride, panel_stride, depth, acc);
      for (int j = 0; j < G; ++j)
        for (int m = 0; m < M; ++m)
          for (int v = 0; v < kPanelVecs; ++v) store(&out[g + j][m][v * kWidth<T>], acc[j][m][v]);
    }
  });
}

// C (rows x n, ldc) = addend + A (rows x depth, lda) * panels, for panels [0, ceil(n / kPanel)).
// The rows of C and of the addend are padded to whole panels: they hold padded(n) elements.
template <class E>
void gemm_rows(Acc<E>* c, int64_t ldc, const E* a, int64_t lda, const E* panels, int64_t rows,
               int64_t depth, int64_t n, Addend<Acc<E>> addend) {
  typedef Acc<E> T;
  const int64_t panel_depth = packed_depth<E>(depth);
  // The chunk of A's rows stays in L2 while it is multiplied by all panels.
  for (int64_t k0 = 0; k0 < depth; k0 += kChunkK) {
    const int64_t chunk = min_of(kChunkK, depth - k0);
    const Addend<T> sum = k0 > 0 ? Addend<T>{c, ldc} : addend;
    for (int64_t p = 0; p < panels_of<T>(n); ++p) {
      const E* panel = panels + (p * panel_depth + k0) * kPanel<T>;
      for_row_blocks(rows, [&](int count, int64_t row) FASTLSTM_INLINED {
        with_rows<kTileRows>(count, [&](auto block) FASTLSTM_INLINED {
          constexpr int M = decltype(block)::value;
          Tile<T, 1, M> acc = {};
          tile_fma<E, 1, M, false>(a + row * lda + k0, lda, panel, 0, chunk, acc);
          for (int m = 0; m < M; ++m)
            for (int v = 0; v < kPanelVecs; ++v) {
              const int64_t at = p * kPanel<T> + v * kWidth<T>;
              const T* before = sum.rows + (row + m) * sum.stride + at;
              store(c + (row + m) * ldc + at,
                    sum.rows ? load(before) + acc[0][m][v] : acc[0][m][v]);
            }
        });
      });
    }
  }
}

// Packs elements [0, n) of kDeep<E> rows of A, neighbours in K, into their place in a sliver.
template <class E>
FASTLSTM_INLINE void pack_sliver(E* to, const E* const* rows, int64_t n) {
  if (n == kTileRows)
    interleave(to, rows, kTileRows);
  else
    interleave(to, rows, n);
}

// C (m x n, ldc, padded to whole tiles) += A^T B over `depth` rows. A is packed in slivers
// [sliver][k][kTileRows], B in panels [panel][k][kPanel]. The sum over this depth begins at zero in
// registers, so a long sum is a sum of partial sums.
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

// The matrix products of the CPU kernels: what is common to their two ways. Included ones multiply:
// gemm_registers.h with a tile of vector registers, gemm_tiles.h with AMX's tiles.
//
// B (K x N) is packed once into panels of kPanel columns, [panel][k][kPanel], zero-padded; with
// operands in pairs (vec.h) [panel][k / 2][kPanel][2]. Every depth is rounded up to whole kDeep<E>:
// what A holds there meets zeros of B, so it must be finite, and who allocates A makes it zero.
//
// Both offer multiply_gates(), gemm_rows() and gemm_slivers(), pack_sliver() for what the latter
// reads, for_row_blocks(), and the sizes kTileRows, kTileM, kTileN and kSliceRows.
#pragma once

#include "vec.h"

namespace fastlstm {
namespace {

constexpr int kPanelVecs = 2;
template <class T>
constexpr int kPanel = kPanelVecs * kWidth<T>;

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

// Where element k of column j of a panel stands.
template <class E>
FASTLSTM_INLINE int64_t packed_at(int64_t k, int64_t j) {
  return (k / kPair<E> * kPanel<Acc<E>> + j) * kPair<E> + k % kPair<E>;
}
template <class E>
FASTLSTM_INLINE int64_t packed_depth(int64_t depth) {
  return ceil_div(depth, kDeep<E>) * kDeep<E>;
}

// Puts n elements of kPair<E> rows, neighbours in K, into words.
template <class E>
FASTLSTM_INLINE void interleave(E* to, const E* const* rows, int64_t n) {
  if constexpr (kPair<E> == 1) {
    memcpy(to, rows[0], size_t(n) * sizeof(E));
  } else {
    int64_t j = 0;
    for (; j + kWidth<float> <= n; j += kWidth<float>) {
      const VecFu words = paired(rows[0] + j, rows[1] + j);
      __builtin_memcpy(to + 2 * j, &words, sizeof words);
    }
    for (; j < n; ++j)
      for (int q = 0; q < 2; ++q) to[2 * j + q] = rows[q][j];
  }
}

// What a product is added to: row m begins at `rows` + m * stride; zeros where that is null.
template <class T>
struct Start {
  const T* rows = nullptr;
  int64_t stride = 0;
};

template <bool kFirst, class A, class B>
struct PickOf {
  typedef A Type;
};
template <class A, class B>
struct PickOf<false, A, B> {
  typedef B Type;
};
template <bool kFirst, class A, class B>
using Pick = typename PickOf<kFirst, A, B>::Type;

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

// Calls f(number, first row) for blocks of at most `most` rows, as even as can be: 50 rows are not
// eight sixes and a two, for few sums cannot hide the latency of the multiply-adds.
template <class F>
FASTLSTM_INLINE void for_even_blocks(int64_t rows, int64_t most, F&& f) {
  const int64_t blocks = ceil_div(rows, most);
  for (int64_t j = 0, row = 0; j < blocks; ++j) {
    const int size = int(rows / blocks + (j < rows % blocks));
    f(size, row);
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

}  // namespace
}  // namespace fastlstm

#if FASTLSTM_AMX
#include "gemm_tiles.h"
#else
#include "gemm_registers.h"
#endif

// The right operand of a matrix product, packed into panels, and rows padded to fit them.
//
// B (K x N) is packed once into panels of kPanel columns, [panel][k][kPanel], zero-padded; with
// operands in pairs (operands.h) [panel][k / 2][kPanel][2]. Depths are rounded up to a multiple of
// kDeep<E>: the elements of A there are multiplied by zeros of B, so they must be finite. Whoever
// allocates A sets them to zero.
#pragma once

#include "blocks.h"
#include "operands.h"
#include "runtime.h"

namespace fastlstm {
namespace {

constexpr int kPanelVecs = 2;
template <class T>
constexpr int kPanel = kPanelVecs * kWidth<T>;

template <class T>
FASTLSTM_INLINE int64_t panels_of(int64_t n) {
  return ceil_div(n, kPanel<T>);
}
template <class T>
FASTLSTM_INLINE int64_t padded(int64_t n) {
  return panels_of<T>(n) * kPanel<T>;
}

// The stride of rows of n elements: whole panels, and no multiple of 1 KiB, which would put the
// rows of a tile into the same cache sets.
template <class T>
FASTLSTM_INLINE int64_t row_stride(int64_t n) {
  const int64_t whole = padded<T>(n);
  return whole * int64_t(sizeof(T)) % 1024 == 0 ? whole + kPanel<T> : whole;
}

// The place of element k of column j in a panel.
template <class E>
FASTLSTM_INLINE int64_t packed_at(int64_t k, int64_t j) {
  return (k / kPair<E> * kPanel<Acc<E>> + j) * kPair<E> + k % kPair<E>;
}
template <class E>
FASTLSTM_INLINE int64_t packed_depth(int64_t depth) {
  return round_up(depth, kDeep<E>);
}

// Interleaves n elements of kPair<E> rows, neighbours in K, into words.
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

// What a product is added to: row m begins at `rows` + m * stride. Null: zeros.
template <class T>
struct Addend {
  const T* rows = nullptr;
  int64_t stride = 0;
};

// A matrix packed into panels of operands E.
template <class E>
struct Panels {
  typedef Acc<E> T;

  // Packs B from its columns, each contiguous in memory: `column(panel, j)` points at column j of
  // the panel, or is null in the padding. Squares of words are transposed in registers.
  template <class Column>
  void pack_columns(const Runtime& runtime, int64_t count, int64_t rows, Column&& column) {
    constexpr int kWords = kWidth<T>, kBlock = kWords * kPair<E>;
    for_panels(runtime, count, rows, [&](E* panel, int64_t p) {
      for (int first = 0; first < kPanel<T>; first += kWords) {
        decltype(column(p, first)) from[kWords];
        bool whole = true;
        for (int j = 0; j < kWords; ++j) whole &= (from[j] = column(p, first + j)) != nullptr;
        for (int64_t k = 0; k < stored; k += kBlock) {
          Vec<Word<E>> words[kWords];
          if (whole && k + kBlock <= depth) {
#pragma GCC unroll 16
            for (int j = 0; j < kWords; ++j) words[j] = load_converted<E>(from[j] + k);
          } else {
            for (int j = 0; j < kWords; ++j) {
              E elements[kBlock] = {};
              if (from[j] && k < depth) convert(elements, from[j] + k, min_of(kBlock, depth - k));
              words[j] = load_words(elements);
            }
          }
          transpose(words);
          E* const to = panel + packed_at<E>(k, first);
          if (k + kBlock <= stored) {
#pragma GCC unroll 16
            for (int j = 0; j < kWords; ++j)
              __builtin_memcpy(to + j * kPair<E> * kPanel<T>, &words[j], sizeof words[j]);
          } else {
            for (int j = 0; k + j * kPair<E> < stored; ++j)
              __builtin_memcpy(to + j * kPair<E> * kPanel<T>, &words[j], sizeof words[j]);
          }
        }
      }
    });
  }
  // Packs B (rows x columns), row-major.
  template <class S>
  void pack_row_major(const Runtime& runtime, const S* b, int64_t rows, int64_t columns) {
    for_panels(runtime, panels_of<T>(columns), rows, [&](E* panel, int64_t p) {
      const int64_t first = p * kPanel<T>, n = min_of(kPanel<T>, columns - first);
      for (int64_t k = 0; k < stored; k += kPair<E>) {
        E converted[kPair<E>][kPanel<T>] = {};
        const E* pair[kPair<E>];
        for (int q = 0; q < kPair<E>; ++q) {
          const S* from = b + (k + q) * columns + first;
          pair[q] = converted[q];
          if constexpr (kSame<E, S>)
            if (n == kPanel<T> && k + q < depth) {
              pair[q] = from;
              continue;
            }
          if (k + q < depth) convert(converted[q], from, n);
        }
        interleave(panel + packed_at<E>(k, 0), pair, kPanel<T>);
      }
    });
  }
  // Packs the transpose of B (columns x rows), row-major.
  template <class S>
  void pack_transposed(const Runtime& runtime, const S* b, int64_t rows, int64_t columns) {
    pack_columns(runtime, panels_of<T>(columns), rows, [=](int64_t p, int j) {
      const int64_t column = p * kPanel<T> + j;
      return column < columns ? b + column * rows : nullptr;
    });
  }

  const E* panel(int64_t p) const { return data.get() + p * stored * kPanel<T>; }
  E at(int64_t p, int64_t k, int64_t j) const { return panel(p)[packed_at<E>(k, j)]; }
  bool packed() const { return data.get() != nullptr; }

  Buffer<E> data;
  int64_t depth = 0, stored = 0;  // stored: packed_depth

 private:
  template <class F>
  void for_panels(const Runtime& runtime, int64_t count, int64_t rows, F&& f) {
    depth = rows;
    stored = packed_depth<E>(depth);
    data.reset(count * stored * kPanel<T>);
    const int64_t tasks = min_of(count, 4 * runtime.threads);
    parallel_if_worth(runtime, 4 * count * depth * kPanel<T>, tasks, [&](int64_t task) {
      for (int64_t p = count * task / tasks; p < count * (task + 1) / tasks; ++p)
        f(data.get() + p * stored * kPanel<T>, p);
    });
  }
};

}  // namespace
}  // namespace fastlstm

// Arithmetic of block sizes, and loops over rows in blocks whose size the compiler knows.
#pragma once

#include <stdint.h>

#include "../cell.h"

namespace fastlstm {
namespace {

FASTLSTM_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTLSTM_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return ceil_div(n, multiple) * multiple;
}
FASTLSTM_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
FASTLSTM_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Of a lambda whose loops are hot: with more callers than one the compiler would call it.
#define FASTLSTM_INLINED __attribute__((always_inline))

template <int N>
struct Int {
  static constexpr int value = N;
};

// Calls f(Int<rows>{}) for a number of rows from 1 to N.
template <int N, class F>
FASTLSTM_INLINE void with_rows(int rows, F&& f) {
  if (rows == N)
    f(Int<N>{});
  else if constexpr (N > 1)
    with_rows<N - 1>(rows, f);
}

// Calls f(number of rows, first row) for blocks of at most `most` rows and nearly equal size. A
// small block at the end would have too few sums to hide the latency of the multiply-adds.
template <class F>
FASTLSTM_INLINE void for_even_blocks(int64_t rows, int64_t most, F&& f) {
  const int64_t blocks = ceil_div(rows, most);
  for (int64_t j = 0, row = 0; j < blocks; ++j) {
    const int size = int(rows / blocks + (j < rows % blocks));
    f(size, row);
    row += size;
  }
}

}  // namespace
}  // namespace fastlstm

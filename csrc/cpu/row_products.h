// Products with weights as they are in memory, for a few rows.
#pragma once

#include "blocks.h"
#include "operands.h"

namespace fastlstm {
namespace {

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

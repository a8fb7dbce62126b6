// Gradients of the weights of one layer: dgates^T times the layer's input and previous h.
//
// The output is cut into tiles of kTileM gate rows by kTileN columns. A task sums one tile over
// all rows, kChunkRows at a time: it packs that slice of dgates into slivers and of the other
// factor into panels (converting, dropping out or recomputing it on the way), multiplies, and
// writes the tile once at the end. Sums are sums of per-chunk partial sums: shorter and in an
// order that does not depend on threads.
#pragma once

#include "layer.h"

namespace fastlstm {
namespace {

constexpr int64_t kTileN = 128, kChunkRows = 256;
constexpr int64_t kTileM = 20 * kTileRows;

// What the steps of one direction of a layer leave for the sums: gradients of the pre-activations
// and, with a projection, of h. Rows are padded so that they spread over cache sets.
template <class T>
struct CellWork {
  void reset(const Problem& p) {
    gates_wide = spread<T>(4 * p.hidden_size);
    dgates.reset(p.rows * gates_wide);
    if (p.projected) {
      dh_wide = spread<T>(p.out_size);
      dh.reset(p.rows * dh_wide);
    }
  }
  Buffer<T> dgates, dh;
  int64_t gates_wide = 0, dh_wide = 0;
};

// One product A^T B for a weight of m x n elements.
template <class T>
struct Product {
  const T* a;  // (rows, m) at stride a_wide
  int64_t a_wide, m, n;
};

// Tile (m0, n0) of a product, written to `to` (m x n). load(buffer, row, first, count) gives a row
// of B.
template <class S, class Load>
void sum_tile(const Product<Acc<S>>& x, int64_t rows, int64_t m0, int64_t n0, S* to,
              Load&& load_b) {
  typedef Acc<S> T;
  const int64_t m = min_of(kTileM, x.m - m0), n = min_of(kTileN, x.n - n0);
  const int64_t slivers = ceil_div(m, kTileRows), panels = panels_of<T>(n);
  const int64_t wide = panels * kPanel<T>;
  Buffer<T> sum(slivers * kTileRows * wide), row(wide);
  Buffer<T> a(slivers * kTileRows * kChunkRows), b(wide * kChunkRows);
  for (int64_t j = 0; j < slivers * kTileRows * wide; ++j) sum[j] = 0;
  for (int64_t j = 0; j < wide; ++j) row[j] = 0;
  for (int64_t first = 0; first < rows; first += kChunkRows) {
    const int64_t depth = min_of(kChunkRows, rows - first);
    for (int64_t k = 0; k < depth; ++k) {
      const T* from = x.a + (first + k) * x.a_wide + m0;
      for (int64_t s = 0; s < m / kTileRows; ++s)
        memcpy(a.get() + (s * depth + k) * kTileRows, from + s * kTileRows, kTileRows * sizeof(T));
      if (m % kTileRows) {
        T* last = a.get() + ((slivers - 1) * depth + k) * kTileRows;
        for (int i = 0; i < kTileRows; ++i)
          last[i] = i < m % kTileRows ? from[(slivers - 1) * kTileRows + i] : T(0);
      }
      load_b(row.get(), first + k, n0, n);
      for (int64_t p = 0; p < panels; ++p)
        memcpy(b.get() + (p * depth + k) * kPanel<T>, row.get() + p * kPanel<T>,
               kPanel<T> * sizeof(T));
    }
    gemm_slivers(sum.get(), wide, a.get(), b.get(), m, n, depth);
  }
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) from_acc(sum[i * wide + j], to[(m0 + i) * x.n + n0 + j]);
}

template <class S, class Load>
void sum_product(const Runtime& runtime, const Product<Acc<S>>& x, int64_t rows, void* to,
                 Load&& load_b) {
  const int64_t across = ceil_div(x.n, kTileN);
  parallel(runtime, ceil_div(x.m, kTileM) * across, [&](int64_t task) {
    sum_tile<S>(x, rows, task / across * kTileM, task % across * kTileN, static_cast<S*>(to),
                load_b);
  });
}

// Sums dgates over rows, or, for index input, over the rows of each index: `to` (4H, n) gets
// column x from the rows whose index is x.
template <class S, class Column>
void sum_rows(const Runtime& runtime, const Problem& p, const CellWork<Acc<S>>& work, int64_t n,
              S* to, S* also_to, Column&& column) {
  typedef Acc<S> T;
  constexpr int64_t kBlock = 64, kPartial = 256;
  const int64_t m = 4 * p.hidden_size;
  parallel(runtime, ceil_div(m, kBlock), [&](int64_t task) {
    const int64_t first = task * kBlock, count = min_of(kBlock, m - first);
    Buffer<T> sum(n * kBlock), partial(n == 1 ? kBlock : 0);
    for (int64_t j = 0; j < n * kBlock; ++j) sum[j] = 0;
    for (int64_t begin = 0; begin < p.rows; begin += kPartial) {
      const int64_t end = min_of(begin + kPartial, p.rows);
      if (n == 1)
        for (int64_t j = 0; j < kBlock; ++j) partial[j] = 0;
      for (int64_t row = begin; row < end; ++row) {
        const T* from = work.dgates.get() + row * work.gates_wide + first;
        T* into = n == 1 ? partial.get() : sum.get() + column(row) * kBlock;
        for (int64_t j = 0; j < count; ++j) into[j] += from[j];
      }
      if (n == 1)
        for (int64_t j = 0; j < kBlock; ++j) sum[j] += partial[j];
    }
    for (int64_t j = 0; j < count; ++j)
      for (int64_t x = 0; x < n; ++x) {
        const int64_t at = (first + j) * n + x;
        if (to) from_acc(sum[x * kBlock + j], to[at]);
        if (also_to) from_acc(sum[x * kBlock + j], also_to[at]);
      }
  });
}

template <class S>
void weight_gradients(const Backward& f, const Runtime& runtime, const Rows& rows, int layer,
                      const CellWork<Acc<S>>* work) {
  typedef Acc<S> T;
  const Problem& p = f.problem;
  const int64_t units = p.hidden_size, out = p.out_size, y_wide = p.directions * out;
  const LayerInput<S> input(p, f.saved, rows, layer);
  const S* y = layer == p.layers - 1
                   ? static_cast<const S*>(f.saved.output)
                   : static_cast<const S*>(f.saved.hidden) + layer * p.rows * y_wide;
  for (int d = 0; d < p.directions; ++d) {
    const int64_t index = int64_t(layer) * p.directions + d;
    const CellGrads& g = f.grads[index];
    const Product<T> gates = {work[d].dgates.get(), work[d].gates_wide, 4 * units, 0};
    if (g.w_ih && input.kind == InputKind::dense) {
      Product<T> x = gates;
      x.n = input.width;
      sum_product<S>(runtime, x, p.rows, g.w_ih, [&](T* to, int64_t row, int64_t n0, int64_t n) {
        input.load(to, row, n0, n);
      });
    } else if (g.w_ih) {
      sum_rows<S>(runtime, p, work[d], input.width, static_cast<S*>(g.w_ih), nullptr,
                  [&](int64_t row) { return input.index(row); });
    }
    if (g.w_hh) {
      Product<T> x = gates;
      x.n = out;
      const S* h0 = cell_part<S>(p.h0, index, p.batch * out);
      sum_product<S>(runtime, x, p.rows, g.w_hh, [&](T* to, int64_t row, int64_t n0, int64_t n) {
        const int64_t t = rows.t(row), b = rows.b(row), before = d == 0 ? t - 1 : t + 1;
        if (b < rows.active(before))
          convert(to, y + rows.at(before, b) * y_wide + d * out + n0, n);
        else if (h0)
          convert(to, h0 + b * out + n0, n);
        else
          for (int64_t j = 0; j < n; ++j) to[j] = 0;
      });
    }
    if (g.b_ih || g.b_hh)
      sum_rows<S>(runtime, p, work[d], 1, static_cast<S*>(g.b_ih), static_cast<S*>(g.b_hh),
                  [](int64_t) { return int64_t(0); });
    if (g.w_hr) {  // (P, H) = dh^T (o * tanh(c)), the second factor recomputed
      const Product<T> x = {work[d].dh.get(), work[d].dh_wide, out, units};
      const S* gates_o = cell_part<S>(f.saved.gates, index, p.rows * 4 * units) + 3 * units;
      const T* cells = cell_part<T>(f.saved.cells, index, p.rows * units);
      sum_product<S>(runtime, x, p.rows, g.w_hr, [&](T* to, int64_t row, int64_t n0, int64_t n) {
        for (int64_t j = 0; j < n; j += kWidth<T>) {
          const int count = int(min_of(kWidth<T>, n - j));
          const Vec<T> o = load_part(gates_o + row * 4 * units + n0 + j, count);
          store_part<T>(to + j, o * Math<T>::tanh(load_part(cells + row * units + n0 + j, count)),
                        count);
        }
      });
    }
  }
}

}  // namespace
}  // namespace fastlstm

// Gradients of the weights of one direction of a layer: dgates^T times the layer's input and
// previous h, summed as the chunks of rows come from the pass back through time.
//
// A task owns kTileM x kTileN of one sum. For kSliceRows rows at a time it packs its part
// of dgates into slivers and of the other factor into panels (converting, dropping out or
// recomputing it on the way) and multiplies them. Sums are sums of such partial sums: shorter, and
// in an order that does not depend on threads.
#pragma once

#include "norm.h"

namespace fastlstm {
namespace {

constexpr int64_t kTileColumns = 64;  // of dgates, in a task that sums rows

// What the pass back through time leaves of a chunk of rows: gradients of the pre-activations;
// with a projection, of h; with layer normalisation also those of the products of the
// pre-activations, and the terms of the gains' gradients. Rows are padded so that they spread over
// cache sets.
template <class E>
struct Chunk {
  typedef Acc<E> T;

  static int64_t row_bytes(const Problem& p) {
    const int64_t wide = spread<E>(4 * p.hidden_size) * int64_t(sizeof(E));
    return p.layer_norm ? 3 * wide + norm_terms(p.hidden_size) * int64_t(sizeof(T)) : wide;
  }
  void reset(const Problem& p, int64_t most_rows) {
    const int64_t gates = 4 * p.hidden_size;
    gates_wide = spread<E>(gates);
    reset_rows(dgates, most_rows, gates, gates_wide);
    normed = p.layer_norm;
    if (normed) {
      reset_rows(dz_x, most_rows, gates, gates_wide);
      reset_rows(dz_h, most_rows, gates, gates_wide);
      terms.reset(most_rows * norm_terms(p.hidden_size));
    }
    if (p.projected) {
      dh_wide = spread<E>(p.out_size);
      reset_rows(dh, most_rows, p.out_size, dh_wide);
    }
  }
  // Rows of n elements, with zeros to the depth of their products.
  static void reset_rows(Buffer<E>& to, int64_t rows, int64_t n, int64_t wide) {
    to.reset(rows * wide);
    const int64_t rest = packed_depth<E>(n) - n;
    for (int64_t r = 0; rest > 0 && r < rows; ++r)
      memset(to.get() + r * wide + n, 0, size_t(rest) * sizeof(E));
  }
  // What is multiplied by W_ih and the input, and by W_hh and h.
  const Buffer<E>& to_input() const { return normed ? dz_x : dgates; }
  const Buffer<E>& to_hidden() const { return normed ? dz_h : dgates; }
  E* row(const Buffer<E>& of, int64_t r) const { return of.get() + (r - first) * gates_wide; }

  Buffer<E> dgates, dh, dz_x, dz_h;
  Buffer<T> terms;
  bool normed = false;
  int64_t gates_wide = 0, dh_wide = 0;
  int64_t first = 0, rows = 0;  // which rows of the problem
};

// A sum of products A^T B over rows: m x n, padded to whole tiles of registers.
template <class E>
struct Sum {
  typedef Acc<E> T;

  void reset(int64_t rows, int64_t columns) {
    m = rows;
    n = columns;
    wide = padded<T>(n);
    const int64_t size = ceil_div(m, kTileRows) * kTileRows * wide;
    values.reset(size);
    for (int64_t j = 0; j < size; ++j) values[j] = 0;
  }
  int64_t across() const { return ceil_div(n, kTileN); }
  int64_t tiles() const { return ceil_div(m, kTileM) * across(); }

  // Adds the rows of A (row r at a + r * a_wide) times those of B: load_b(to, r, column, count).
  template <class LoadB>
  void add(int64_t tile, const E* a, int64_t a_wide, int64_t rows, LoadB&& load_b) const {
    const int64_t m0 = tile / across() * kTileM, n0 = tile % across() * kTileN;
    const int64_t own_m = min_of(kTileM, m - m0), own_n = min_of(kTileN, n - n0);
    const int64_t all_slivers = ceil_div(own_m, kTileRows), wide_b = padded<T>(own_n);
    Buffer<E> slivers, b, rows_b, zeros;
    slivers.reset_to_zero(all_slivers * kTileRows * kSliceRows);
    b.reset(wide_b * kSliceRows);
    rows_b.reset_to_zero(kDeep<E> * wide_b);
    zeros.reset_to_zero(max_of(wide_b, own_m));
    for (int64_t first = 0; first < rows; first += kSliceRows) {
      const int64_t depth = min_of(kSliceRows, rows - first), deep = packed_depth<E>(depth);
      for (int64_t k = 0; k < deep; k += kDeep<E>) {
        const E *at_a[kDeep<E>], *at_b[kDeep<E>];
        for (int q = 0; q < kDeep<E>; ++q) {
          const bool within = k + q < depth;
          E* own = rows_b.get() + q * wide_b;
          if (within) load_b(own, first + k + q, n0, own_n);
          at_a[q] = within ? a + (first + k + q) * a_wide + m0 : zeros.get();
          at_b[q] = within ? own : zeros.get();
        }
        for (int64_t j = 0; j < own_m; j += kTileRows) {
          const E* rows_a[kDeep<E>];
          for (int q = 0; q < kDeep<E>; ++q) rows_a[q] = at_a[q] + j;
          pack_sliver(slivers.get() + j * deep + k * kTileRows, rows_a,
                      min_of(kTileRows, own_m - j));
        }
        for (int q = 0; q < kDeep<E>; q += kPair<E>)
          for (int64_t j = 0; j < wide_b; j += kPanel<T>) {
            const E* words[kPair<E>];
            for (int s = 0; s < kPair<E>; ++s) words[s] = at_b[q + s] + j;
            interleave(b.get() + j * deep + packed_at<E>(k + q, 0), words, kPanel<T>);
          }
      }
      gemm_slivers(values.get() + m0 * wide + n0, wide, slivers.get(), b.get(), own_m, own_n,
                   depth);
    }
  }

  template <class S>
  void write(const Runtime& runtime, S* to) const {
    parallel(runtime, ceil_div(m, kTileM), [&](int64_t task) {
      for (int64_t i = task * kTileM; i < min_of(m, (task + 1) * kTileM); ++i)
        for (int64_t j = 0; j < n; ++j) from_acc(values[i * wide + j], to[i * n + j]);
    });
  }

  int64_t m = 0, n = 0, wide = 0;
  Buffer<T> values;
};

template <class S>
class WeightGrads {
 public:
  typedef Acc<S> T;
  typedef Operand<S> E;

  WeightGrads(const Backward& f, const Runtime& runtime, const Rows& rows,
              const LayerInput<S>& input, int layer, int direction)
      : p_(f.problem), runtime_(runtime), rows_(rows), input_(input), direction_(direction) {
    const int64_t index = int64_t(layer) * p_.directions + direction, units = p_.hidden_size;
    grads_ = f.grads[index];
    y_wide_ = p_.directions * p_.out_size;
    y_ = layer == p_.layers - 1 ? static_cast<const S*>(f.saved.output)
                                : static_cast<const S*>(f.saved.hidden) + layer * p_.rows * y_wide_;
    y_ += direction * p_.out_size;
    h0_ = cell_part<S>(p_.h0, index, p_.batch * p_.out_size);
    if (p_.projected)
      gates_o_ = cell_part<S>(f.saved.gates, index, p_.rows * 4 * units) + 3 * units;
    cells_ = cell_part<T>(f.saved.cells, index, p_.rows * units);
    if (grads_.w_ih && input.kind == InputKind::dense) ih_.reset(4 * units, input.width);
    if (grads_.w_hh) hh_.reset(4 * units, p_.out_size);
    if (grads_.w_hr) hr_.reset(p_.out_size, units);
    // dgates summed over rows, and over the rows of each index: transposed, a column's task writes
    // neighbouring elements.
    if (grads_.b_ih || grads_.b_hh) bias_.reset(1, 4 * units);
    if (grads_.w_ih && input.kind != InputKind::dense) by_index_.reset(input.width, 4 * units);
    if (grads_.norm_ih || grads_.norm_hh || grads_.norm_c || grads_.norm_c_bias)
      terms_.reset(1, norm_terms(units));
  }

  void add(const Chunk<E>& chunk) {
    const int64_t columns = bias_.n || by_index_.n ? ceil_div(4 * p_.hidden_size, kTileColumns) : 0;
    const int64_t ih = ih_.tiles(), hh = ih + hh_.tiles(), hr = hh + hr_.tiles();
    const int64_t terms = ceil_div(terms_.n, kTileColumns);
    parallel(runtime_, hr + columns + terms, [&](int64_t task) {
      if (task < ih)
        ih_.add(task, chunk.to_input().get(), chunk.gates_wide, chunk.rows,
                [&](E* to, int64_t r, int64_t first, int64_t n) {
                  input_.load(to, chunk.first + r, first, n);
                });
      else if (task < hh)
        hh_.add(task - ih, chunk.to_hidden().get(), chunk.gates_wide, chunk.rows,
                [&](E* to, int64_t r, int64_t first, int64_t n) {
                  load_h_prev(to, chunk.first + r, first, n);
                });
      else if (task < hr)
        hr_.add(task - hh, chunk.dh.get(), chunk.dh_wide, chunk.rows,
                [&](E* to, int64_t r, int64_t first, int64_t n) {
                  load_raw_h(to, chunk.first + r, first, n);
                });
      else if (task < hr + columns)
        sum_columns(chunk, (task - hr) * kTileColumns);
      else
        sum_terms(chunk, (task - hr - columns) * kTileColumns);
    });
  }

  void write() const {
    if (ih_.n) ih_.write(runtime_, static_cast<S*>(grads_.w_ih));
    if (hh_.n) hh_.write(runtime_, static_cast<S*>(grads_.w_hh));
    if (hr_.n) hr_.write(runtime_, static_cast<S*>(grads_.w_hr));
    if (grads_.b_ih) bias_.write(runtime_, static_cast<S*>(grads_.b_ih));
    if (grads_.b_hh) bias_.write(runtime_, static_cast<S*>(grads_.b_hh));
    const int64_t units = p_.hidden_size;
    write_terms(grads_.norm_ih, 0, 4 * units);
    write_terms(grads_.norm_hh, 4 * units, 4 * units);
    write_terms(grads_.norm_c, 8 * units, units);
    write_terms(grads_.norm_c_bias, 9 * units, units);
    S* w_ih = static_cast<S*>(grads_.w_ih);
    parallel(runtime_, ceil_div(by_index_.n, kTileColumns), [&](int64_t task) {
      const int64_t last = min_of(by_index_.n, (task + 1) * kTileColumns);
      for (int64_t j = task * kTileColumns; j < last; ++j)
        for (int64_t x = 0; x < by_index_.m; ++x)
          from_acc(by_index_.values[x * by_index_.wide + j], w_ih[j * by_index_.m + x]);
    });
  }

 private:
  void load_h_prev(E* to, int64_t row, int64_t first, int64_t n) const {
    const int64_t t = rows_.t(row), b = rows_.b(row), before = direction_ == 0 ? t - 1 : t + 1;
    if (b < rows_.active(before))
      convert(to, y_ + rows_.at(before, b) * y_wide_ + first, n);
    else if (h0_)
      convert(to, h0_ + b * p_.out_size + first, n);
    else
      memset(to, 0, size_t(n) * sizeof(E));
  }

  // h before projection, o * tanh(c), is not saved.
  void load_raw_h(E* to, int64_t row, int64_t first, int64_t n) const {
    const S* o = gates_o_ + row * 4 * p_.hidden_size + first;
    const T* c = cells_ + row * p_.hidden_size + first;
    for (int64_t j = 0; j < n; j += kWidth<T>) {
      const int count = int(min_of(kWidth<T>, n - j));
      store_part<E>(to + j, load_part(o + j, count) * Math<T>::tanh(load_part(c + j, count)),
                    count);
    }
  }

  void sum_columns(const Chunk<E>& chunk, int64_t first) const {
    const int64_t n = min_of(kTileColumns, 4 * p_.hidden_size - first);
    T sum[kTileColumns] = {};
    for (int64_t r = 0; r < chunk.rows; ++r) {
      const E* from = chunk.dgates.get() + r * chunk.gates_wide + first;
      for (int64_t j = 0; j < n; ++j) sum[j] += to_acc(from[j]);
      if (by_index_.n == 0) continue;
      from = chunk.to_input().get() + r * chunk.gates_wide + first;
      T* to = by_index_.values.get() + input_.index(chunk.first + r) * by_index_.wide + first;
      for (int64_t j = 0; j < n; ++j) to[j] += to_acc(from[j]);
    }
    for (int64_t j = 0; bias_.n && j < n; ++j) bias_.values[first + j] += sum[j];
  }

  void sum_terms(const Chunk<E>& chunk, int64_t first) const {
    const int64_t n = min_of(kTileColumns, terms_.n - first);
    T sum[kTileColumns] = {};
    for (int64_t r = 0; r < chunk.rows; ++r) {
      const T* from = chunk.terms.get() + r * terms_.n + first;
      for (int64_t j = 0; j < n; ++j) sum[j] += from[j];
    }
    for (int64_t j = 0; j < n; ++j) terms_.values[first + j] += sum[j];
  }

  void write_terms(void* to, int64_t first, int64_t n) const {
    if (to) convert(static_cast<S*>(to), terms_.values.get() + first, n);
  }

  const Problem& p_;
  const Runtime& runtime_;
  const Rows& rows_;
  const LayerInput<S>& input_;
  const int direction_;
  CellGrads grads_;
  int64_t y_wide_;
  const S *y_, *h0_, *gates_o_ = nullptr;
  const T* cells_;
  Sum<E> ih_, hh_, hr_, bias_, by_index_, terms_;
};

}  // namespace
}  // namespace fastlstm

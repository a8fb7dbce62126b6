// What the backward pass of a layer does besides its steps: after each chunk of steps, the
// gradients of the input and of the weights as large products.
#pragma once

#include "cell_vectors.h"
#include "chunk.h"
#include "pseudo_layer.h"
#include "row_sum.h"
#include "rows.h"

namespace fastlstm {
namespace {

// Gradients of the weights of a pseudo-layer: dgates^T [x, h_{t-1}], running sums over chunks.
template <class S>
class WeightGradients {
 public:
  typedef Acc<S> T;
  typedef Operand<S> E;

  WeightGradients(const Backward& f, const Runtime& runtime, const Rows& rows,
                  const LayerInput<S>& input, const PseudoLayer<S>& layer)
      : p_(f.problem),
        runtime_(runtime),
        rows_(rows),
        input_(input),
        layer_(layer),
        units_(p_.hidden_size),
        grads_(f.grads[layer.number]),
        h0_(layer.states(p_.h0, p_.out_size)) {
    if (grads_.w_ih && input.dense()) ih_.reset(4 * units_, input.width);
    if (grads_.w_hh) hh_.reset(4 * units_, p_.out_size);
    if (grads_.w_hr) hr_.reset(p_.out_size, units_);
    if (grads_.b_ih || grads_.b_hh) bias_.reset(1, 4 * units_);
    // Transposed: a task has some columns, and writes them next to each other.
    if (grads_.w_ih && !input.dense()) by_index_.reset(input.width, 4 * units_);
    if (grads_.norm_ih || grads_.norm_hh || grads_.norm_c || grads_.norm_c_bias)
      terms_.reset(1, norm_terms(units_));
  }

  void add(const Chunk<E>& chunk) {
    const int64_t gates = 4 * units_;
    auto ih = part_of(ih_, [&](E* room, int64_t r, int64_t first, int64_t n) {
      return input_.read(room, chunk.first + r, first, n);
    });
    auto hh = part_of(hh_, [&](E* room, int64_t r, int64_t first, int64_t n) {
      return read_h_prev(room, chunk.first + r, first, n);
    });
    auto hr = part_of(hr_, [&](E* room, int64_t r, int64_t first, int64_t n) {
      load_unprojected_h(room, chunk.first + r, first, n);
      return room;
    });
    const Runtime runtime{int(worthwhile_threads(runtime_.threads, chunk.rows * gates * units_)),
                          runtime_.parallel};
    const RowSumTiles tiles(gates, runtime.threads), hr_tiles(p_.out_size, runtime.threads);
    // Of dgates alone both sums are, and the biases' gradients: a task packs it once for all.
    const bool joint = ih_.n && hh_.n && !chunk.normed;
    T* const bias = hh_.n && !chunk.normed && bias_.n ? bias_.values.get() : nullptr;
    const bool sums_columns = by_index_.n || (bias_.n && !bias);
    // Tasks are numbered in this order; each number is the end of its kind.
    const int64_t to_ih = ih_.n && !joint ? tiles.count : 0,
                  to_hh = to_ih + (hh_.n ? tiles.count : 0),
                  to_hr = to_hh + (hr_.n ? hr_tiles.count : 0),
                  to_columns = to_hr + (sums_columns ? ceil_div(gates, kColumns) : 0),
                  to_terms = to_columns + ceil_div(terms_.n, kColumns);
    parallel(runtime, to_terms, [&](int64_t task) {
      const E* const for_input = chunk.to_input().get();
      const E* const for_hidden = chunk.to_hidden().get();
      const int64_t stride = chunk.gates_stride, rows = chunk.rows;
      if (task < to_ih)
        add_rows<E>(tiles, task, gates, for_input, stride, rows, nullptr, ih);
      else if (task < to_hh && joint)
        add_rows<E>(tiles, task - to_ih, gates, for_hidden, stride, rows, bias, ih, hh);
      else if (task < to_hh)
        add_rows<E>(tiles, task - to_ih, gates, for_hidden, stride, rows, bias, hh);
      else if (task < to_hr)
        add_rows<E>(hr_tiles, task - to_hh, p_.out_size, chunk.dh.get(), chunk.dh_stride, rows,
                    nullptr, hr);
      else if (task < to_columns)
        sum_columns(chunk, (task - to_hr) * kColumns, bias == nullptr);
      else
        sum_terms(chunk, (task - to_columns) * kColumns);
    });
  }

  void write() const {
    if (ih_.n) ih_.write(runtime_, static_cast<S*>(grads_.w_ih));
    if (hh_.n) hh_.write(runtime_, static_cast<S*>(grads_.w_hh));
    if (hr_.n) hr_.write(runtime_, static_cast<S*>(grads_.w_hr));
    if (grads_.b_ih) bias_.write(runtime_, static_cast<S*>(grads_.b_ih));
    if (grads_.b_hh) bias_.write(runtime_, static_cast<S*>(grads_.b_hh));
    write_terms(grads_.norm_ih, NormTerms::kGainX, 4);
    write_terms(grads_.norm_hh, NormTerms::kGainH, 4);
    write_terms(grads_.norm_c, NormTerms::kGainC, 1);
    write_terms(grads_.norm_c_bias, NormTerms::kBiasC, 1);
    S* w_ih = static_cast<S*>(grads_.w_ih);
    parallel(runtime_, ceil_div(by_index_.n, kColumns), [&](int64_t task) {
      const int64_t last = min_of(by_index_.n, (task + 1) * kColumns);
      for (int64_t j = task * kColumns; j < last; ++j)
        for (int64_t x = 0; x < by_index_.m; ++x)
          from_acc(by_index_.values[x * by_index_.stride + j], w_ih[j * by_index_.m + x]);
    });
  }

 private:
  static constexpr int64_t kColumns = 64;  // of dgates or terms, in a task that sums rows of them

  const E* read_h_prev(E* room, int64_t row, int64_t first, int64_t n) const {
    const int64_t b = rows_.b(row), before = layer_.before(rows_.t(row));
    const S* from = b < rows_.active(before)
                        ? layer_.output + rows_.at(before, b) * layer_.output_stride + first
                    : h0_ ? h0_ + b * p_.out_size + first
                          : nullptr;
    if constexpr (kSame<S, E>)
      if (from) return from;
    if (from)
      convert(room, from, n);
    else
      memset(room, 0, size_t(n) * sizeof(E));
    return room;
  }

  // h before projection is not saved: o * tanh(c).
  void load_unprojected_h(E* to, int64_t row, int64_t first, int64_t n) const {
    const S* o = layer_.gates + (row * kSavedGates + 3) * units_ + first;
    const T* c = layer_.cell_states + row * units_ + first;
    for (int64_t j = 0; j < n; j += kWidth<T>) {
      const int count = int(min_of(kWidth<T>, n - j));
      store_part<E>(to + j, load_part(o + j, count) * Math<T>::tanh(load_part(c + j, count)),
                    count);
    }
  }

  // dgates summed over rows, for the biases, and over the rows of each index.
  void sum_columns(const Chunk<E>& chunk, int64_t first, bool for_bias) const {
    const int64_t n = min_of(kColumns, 4 * units_ - first);
    T sum[kColumns] = {};
    for (int64_t r = 0; r < chunk.rows; ++r) {
      const E* from = chunk.dgates.get() + r * chunk.gates_stride + first;
      for (int64_t j = 0; for_bias && j < n; ++j) sum[j] += to_acc(from[j]);
      if (by_index_.n == 0) continue;
      from = chunk.to_input().get() + r * chunk.gates_stride + first;
      T* to = by_index_.values.get() + input_.index(chunk.first + r) * by_index_.stride + first;
      for (int64_t j = 0; j < n; ++j) to[j] += to_acc(from[j]);
    }
    for (int64_t j = 0; for_bias && bias_.n && j < n; ++j) bias_.values[first + j] += sum[j];
  }

  void sum_terms(const Chunk<E>& chunk, int64_t first) const {
    const int64_t n = min_of(kColumns, terms_.n - first);
    T sum[kColumns] = {};
    for (int64_t r = 0; r < chunk.rows; ++r) {
      const T* from = chunk.terms.get() + r * terms_.n + first;
      for (int64_t j = 0; j < n; ++j) sum[j] += from[j];
    }
    for (int64_t j = 0; j < n; ++j) terms_.values[first + j] += sum[j];
  }

  void write_terms(void* to, int term, int count) const {
    if (to) convert(static_cast<S*>(to), terms_.values.get() + term * units_, count * units_);
  }

  const Problem& p_;
  const Runtime& runtime_;
  const Rows& rows_;
  const LayerInput<S>& input_;
  const PseudoLayer<S> layer_;
  const int64_t units_;
  const LayerGrads grads_;
  const S* const h0_;
  RowSum<E> ih_, hh_, hr_, bias_, by_index_, terms_;
};

// Gradient of a layer's input (rows, width): dgates W_ih, with the dropout of the layer below.
template <class S>
class InputGradient {
 public:
  typedef Acc<S> T;
  typedef Operand<S> E;

  // to: where it is written; null where it is not needed.
  InputGradient(const Problem& p, const Runtime& runtime, const Rows& rows, int layer, S* to)
      : p_(p),
        runtime_(runtime),
        rows_(rows),
        dropout_(p, layer - 1),
        width_(layer > 0 ? p.directions * p.out_size : p.input_size),
        stride_(row_stride<T>(width_)),
        to_(to) {
    for (int d = 0; to && d < p.directions; ++d)
      ih_[d].pack_row_major(runtime,
                            static_cast<const S*>(p.weights[layer * p.directions + d].w_ih),
                            4 * p.hidden_size, width_);
    // The directions reach a row in different chunks: the sum of both stays in the accumulation
    // type until all chunks are done.
    if (to && p.directions == 2) {
      both_.reset(p.rows * stride_);
      for (int64_t j = 0; j < p.rows * stride_; ++j) both_[j] = 0;
    }
  }

  void add(const Chunk<E>& chunk, int direction) {
    if (to_ == nullptr) return;
    const bool sums_both = both_.get() != nullptr;
    for_blocks(chunk.rows, [&](int64_t first, int64_t count) {
      Buffer<T> block(sums_both ? 0 : count * stride_);
      T* sum = sums_both ? both_.get() + (chunk.first + first) * stride_ : block.get();
      gemm_rows(sum, stride_, chunk.to_input().get() + first * chunk.gates_stride,
                chunk.gates_stride, ih_[direction].data.get(), count, 4 * p_.hidden_size, width_,
                sums_both ? Addend<T>{sum, stride_} : Addend<T>{});
      if (!sums_both) write_rows(sum, chunk.first + first, count);
    });
  }

  void write() {
    if (both_.get())
      for_blocks(p_.rows, [&](int64_t first, int64_t count) {
        write_rows(both_.get() + first * stride_, first, count);
      });
  }

 private:
  template <class F>
  void for_blocks(int64_t rows, F&& f) const {
    constexpr int64_t kBlock = 96;
    parallel(runtime_, ceil_div(rows, kBlock),
             [&](int64_t task) { f(task * kBlock, min_of(kBlock, rows - task * kBlock)); });
  }

  void write_rows(T* from, int64_t first, int64_t count) const {
    for (int64_t row = first; row < first + count; ++row, from += stride_) {
      if (dropout_.active()) dropout_.apply(from, rows_.t(row), rows_.b(row), 0, width_);
      for (int64_t j = 0; j < width_; ++j) from_acc(from[j], to_[row * width_ + j]);
    }
  }

  const Problem& p_;
  const Runtime& runtime_;
  const Rows& rows_;
  const Dropout<T> dropout_;
  const int64_t width_, stride_;
  S* const to_;
  Panels<E> ih_[2];
  Buffer<T> both_;
};

// Both for one layer, chunk by chunk, from the last steps to the first.
template <class S>
class GradientPart {
 public:
  typedef Operand<S> E;

  // grad_input: (rows, width), or null where it is not needed.
  GradientPart(const Backward& f, const Runtime& runtime, const Rows& rows,
               const LayerInput<S>& input, int layer, S* grad_input)
      : p_(f.problem),
        rows_(rows),
        most_rows_(chunk_rows(Chunk<E>::row_bytes(p_))),
        weights_(p_.directions),
        input_(p_, runtime, rows, layer, grad_input) {
    for (int d = 0; d < p_.directions; ++d) {
      chunk_[d].reset(p_, min_of(p_.rows, max_of(most_rows_, p_.batch)));
      weights_.add(f, runtime, rows, input, PseudoLayer<S>(p_, f.saved, layer, d));
    }
  }

  const Chunk<E>& chunk(int d) const { return chunk_[d]; }

  // Begins the chunk that ends before step `last`. Returns its first step.
  int64_t begin_chunk(int64_t last) {
    int64_t first = last - 1;
    while (first > 0 && set_chunk(first - 1, last) <= most_rows_) --first;
    set_chunk(first, last);
    return first;
  }

  // After the chunk's steps.
  void add_chunk() {
    for (int d = 0; d < p_.directions; ++d) {
      input_.add(chunk_[d], d);
      weights_[d].add(chunk_[d]);
    }
  }

  // After all chunks.
  void write() {
    input_.write();
    for (int d = 0; d < p_.directions; ++d) weights_[d].write();
  }

 private:
  // As few as stay close to the cores, but enough to pay for packing the rows' products, and for
  // the threads' meetings. A chunk of kMostBytes stays in the shared cache.
  static int64_t chunk_rows(int64_t row_bytes) {
    constexpr int64_t kBytes = 2 << 20, kMostBytes = 8 << 20, kRows = 1024, kLeastRows = 256;
    return max_of(max_of(kLeastRows, kBytes / row_bytes), min_of(kRows, kMostBytes / row_bytes));
  }

  // Each direction's chunk is its rows of steps [first, last) in its order. Returns the most rows.
  int64_t set_chunk(int64_t first, int64_t last) {
    int64_t most = 0;
    for (int d = 0; d < p_.directions; ++d) {
      const int64_t begin = d == 0 ? first : p_.steps - last,
                    end = d == 0 ? last : p_.steps - first;
      chunk_[d].first = rows_.at(begin, 0);
      chunk_[d].rows = rows_.at(end, 0) - chunk_[d].first;
      most = max_of(most, chunk_[d].rows);
    }
    return most;
  }

  const Problem& p_;
  const Rows& rows_;
  const int64_t most_rows_;
  Chunk<E> chunk_[2];
  List<WeightGradients<S>> weights_;
  InputGradient<S> input_;
};

}  // namespace
}  // namespace fastlstm

// The rows of a problem: which (t, b) each one is, the dropout of a row, the input of a row.
#pragma once

#include "../dropout.h"
#include "operands.h"
#include "runtime.h"

namespace fastlstm {
namespace {

// The (t, b) pairs in time-major order; sequences of different lengths are packed, longest first.
class Rows {
 public:
  explicit Rows(const Problem& p)
      : steps(p.steps), batch(p.batch), first_(p.steps + 1), t_(p.rows), b_(p.rows) {
    first_[0] = 0;
    for (int64_t t = 0, row = 0; t < steps; ++t) {
      const int64_t n = p.batch_sizes ? p.batch_sizes[t] : batch;
      for (int64_t b = 0; b < n; ++b, ++row) {
        t_[row] = t;
        b_[row] = b;
      }
      first_[t + 1] = row;
    }
  }

  int64_t at(int64_t t, int64_t b) const { return first_[t] + b; }
  // How many sequences reach step t; 0 outside the steps.
  int64_t active(int64_t t) const { return t < 0 || t >= steps ? 0 : first_[t + 1] - first_[t]; }
  int64_t t(int64_t row) const { return t_[row]; }
  int64_t b(int64_t row) const { return b_[row]; }

  const int64_t steps, batch;

 private:
  Buffer<int64_t> first_, t_, b_;
};

// Dropout of one layer's output, a row at a time.
template <class T>
struct Dropout {
  Dropout(const Problem& p, int layer) : width(p.out_size) {
    if (p.dropout <= 0 || layer < 0 || layer >= p.layers - 1) return;
    threshold = dropout_threshold(p.dropout);
    scale = T(dropout_scale(p.dropout));
    for (int d = 0; d < p.directions; ++d) key[d] = dropout_key(*p.seed, layer, d);
  }

  bool active() const { return threshold > 0; }
  // Columns [first, first + n) of row (t, b) of the layer's output (directions side by side).
  template <class E>
  void apply(E* values, int64_t t, int64_t b, int64_t first, int64_t n) const {
    const uint32_t rows[2] = {dropout_row(key[0], t, b), dropout_row(key[1], t, b)};
    for (int64_t j = 0; j < n; ++j) {
      const int d = first + j >= width;
      const bool keep = dropout_keeps(rows[d], first + j - d * width, threshold);
      from_acc(keep ? to_acc(values[j]) * scale : T(0), values[j]);
    }
  }

  int64_t width;
  uint64_t threshold = 0;
  T scale = 1;
  uint32_t key[2] = {0, 0};
};

// The input of one layer: rows converted to operands, with the dropout of the layer below.
template <class S>
class LayerInput {
 public:
  typedef Acc<S> T;

  LayerInput(const Problem& p, const Saved& saved, const Rows& rows, int layer)
      : rows_(rows), dropout_(p, layer - 1) {
    if (layer == 0) {
      width = p.input_size;
      kind = p.input_kind;
      first_ = p.input;
      stride_t_ = p.batch_sizes ? 0 : p.stride_t;
      stride_b_ = p.stride_b;
      packed_ = p.batch_sizes != nullptr;
    } else {
      width = p.directions * p.out_size;
      kind = InputKind::dense;
      first_ = static_cast<const S*>(saved.hidden) + (layer - 1) * p.rows * width;
      stride_b_ = width;
      packed_ = true;
    }
  }

  bool dense() const { return kind == InputKind::dense; }

  // Columns [first, first + n) of a row.
  void load(Operand<S>* to, int64_t row, int64_t first, int64_t n) const {
    convert(to, static_cast<const S*>(first_) + offset(row) + first, n);
    if (dropout_.active()) dropout_.apply(to, rows_.t(row), rows_.b(row), first, n);
  }
  // The same where they stand, if as they are, else in `room`.
  const Operand<S>* read(Operand<S>* room, int64_t row, int64_t first, int64_t n) const {
    if constexpr (kSame<S, Operand<S>>)
      if (!dropout_.active()) return static_cast<const S*>(first_) + offset(row) + first;
    load(room, row, first, n);
    return room;
  }

  int64_t index(int64_t row) const {
    return kind == InputKind::index64 ? static_cast<const int64_t*>(first_)[offset(row)]
                                      : int64_t(static_cast<const int32_t*>(first_)[offset(row)]);
  }

  int64_t width;
  InputKind kind;

 private:
  int64_t offset(int64_t row) const {
    return packed_ ? row * stride_b_ : rows_.t(row) * stride_t_ + rows_.b(row) * stride_b_;
  }

  const Rows& rows_;
  Dropout<T> dropout_;
  const void* first_;
  int64_t stride_t_ = 0, stride_b_ = 0;
  bool packed_;
};

}  // namespace
}  // namespace fastlstm

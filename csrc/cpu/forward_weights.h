// The weights of a pseudo-layer as the forward pass reads them.
//
// They are packed once into panels whose columns are gates: block by block of kPanel units, and
// within a block gate by gate (i, f, g, o). So the four pre-activations of a unit come from four
// neighbouring panels. With layer normalisation they are packed row by row of W instead, because a
// row of gates is normalised as a whole.
//
// Packing does not pay for few rows, such as a step of a stream: there the weights are read as they
// are in memory, or packed by blocks of units in each step.
#pragma once

#include "norm.h"
#include "panels.h"

namespace fastlstm {
namespace {

// The largest vocabulary of index input for which a table is made: its rows are W_ih's columns.
constexpr int64_t kTableRows = 4096;

template <class S>
struct ForwardWeights {
  typedef Acc<S> T;
  typedef Operand<S> E;

  // dense: whether the input may be dense. direct_: whether the weights are read as they are.
  ForwardWeights(const Problem& p, const Runtime& runtime, const LayerWeights& weights,
                 int64_t input_width, bool dense, bool direct_)
      : norm(p, weights),
        direct(direct_),
        w_ih(static_cast<const S*>(weights.w_ih)),
        w_hh(static_cast<const S*>(weights.w_hh)),
        units_(p.hidden_size),
        width_(input_width) {
    gates_stride = p.layer_norm ? row_stride<T>(4 * units_) : 4 * padded<T>(units_);
    if (p.layer_norm)
      pack_by_row(p, runtime, weights, dense);
    else
      pack_by_block(p, runtime, weights, dense);
    if (p.projected)
      hr.pack_transposed(runtime, static_cast<const S*>(weights.w_hr), units_, p.out_size);
  }

  bool tabled() const { return table.get() != nullptr; }
  const T* table_row(int64_t index) const { return table.get() + index * gates_stride; }

  // The pre-activations of an index: its column of W_ih and the bias, by blocks.
  void gather(T* to, int64_t index) const {
    for (int64_t panel = 0; panel < gates_stride / kPanel<T>; ++panel)
      for (int j = 0; j < kPanel<T>; ++j) {
        const int64_t row = row_of(panel, j), at = panel * kPanel<T> + j;
        to[at] = bias[at];
        if (row >= 0)
          to[at] +=
              ih.packed() ? to_acc(ih.at(panel, index, j)) : to_acc(w_ih[row * width_ + index]);
      }
  }
  // Of W_ih or W_hh as it is in memory: the four panels of a block of units.
  void pack_block(Panels<E>& to, const S* from, int64_t depth, int64_t block) const {
    pack_panels(Runtime{1, nullptr}, to, from, depth, 4 * block, 4);
  }
  // The column of W_ih, in the weights' order.
  void gather_column(T* to, int64_t index) const {
    for (int64_t j = 0; j < 4 * units_; ++j)
      to[j] = ih.packed() ? to_acc(ih.at(j / kPanel<T>, index, j % kPanel<T>))
                          : to_acc(w_ih[j * width_ + index]);
  }

  Panels<E> ih, hh, hr;
  Buffer<T> table;  // rows of gates, one for each index; by blocks
  Buffer<T> bias;   // b_ih + b_hh, a row of gates
  NormWeights<S> norm;
  const bool direct;
  const S *w_ih, *w_hh;  // as they are in memory; once packed, they are not read
  int64_t gates_stride;  // of rows of pre-activations

 private:
  // The row of W (4H rows) in column j of a panel, or -1 in the padding.
  int64_t row_of(int64_t panel, int j) const {
    const int64_t unit = panel / 4 * kPanel<T> + j;
    return unit < units_ ? panel % 4 * units_ + unit : int64_t(-1);
  }

  void pack_by_block(const Problem& p, const Runtime& runtime, const LayerWeights& weights,
                     bool dense) {
    const int64_t panels = gates_stride / kPanel<T>;
    const S *b_ih = static_cast<const S*>(weights.b_ih),
            *b_hh = static_cast<const S*>(weights.b_hh);
    bias.reset(gates_stride);
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int j = 0; j < kPanel<T>; ++j) {
        const int64_t row = row_of(panel, j);
        bias[panel * kPanel<T> + j] =
            row < 0 || b_ih == nullptr ? T(0) : to_acc(b_ih[row]) + to_acc(b_hh[row]);
      }
    if (!direct) pack_panels(runtime, hh, w_hh, p.out_size, 0, panels);
    if (dense) {
      if (!direct) pack_panels(runtime, ih, w_ih, width_, 0, panels);
    } else if (width_ <= min_of(kTableRows, p.rows)) {
      table.reset(width_ * gates_stride);
      const int64_t tasks = min_of(width_, 4 * runtime.threads);
      parallel(runtime, tasks, [&](int64_t task) {
        for (int64_t j = width_ * task / tasks; j < width_ * (task + 1) / tasks; ++j)
          gather(table.get() + j * gates_stride, j);
      });
    }
  }

  void pack_panels(const Runtime& runtime, Panels<E>& to, const S* from, int64_t depth,
                   int64_t first, int64_t count) const {
    to.pack_columns(runtime, count, depth, [=](int64_t panel, int j) {
      const int64_t row = row_of(first + panel, j);
      return row < 0 ? nullptr : from + row * depth;
    });
  }

  void pack_by_row(const Problem& p, const Runtime& runtime, const LayerWeights& weights,
                   bool dense) {
    const int64_t gates = 4 * units_;
    const S *b_ih = static_cast<const S*>(weights.b_ih),
            *b_hh = static_cast<const S*>(weights.b_hh);
    bias.reset(gates);
    for (int64_t j = 0; j < gates; ++j) bias[j] = b_ih ? to_acc(b_ih[j]) + to_acc(b_hh[j]) : T(0);
    hh.pack_transposed(runtime, w_hh, p.out_size, gates);
    if (dense) ih.pack_transposed(runtime, w_ih, width_, gates);
  }

  const int64_t units_, width_;
};

}  // namespace
}  // namespace fastlstm

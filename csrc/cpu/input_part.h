// The input's part of a task's pre-activations: W_ih x and the biases.
//
// It is computed for the rows of a few steps at once (up to kInputRows), so that W_ih is read once
// for all of them and the result stays in cache. For index input it is a row of a table, or a
// gathered column of W_ih. Layer normalisation normalises it.
#pragma once

#include "forward_weights.h"
#include "gemm.h"
#include "rows.h"
#include "team.h"

namespace fastlstm {
namespace {

constexpr int64_t kInputRows = 192;

template <class S>
class InputPart {
 public:
  typedef Acc<S> T;
  typedef Operand<S> E;

  // batch: the task's sequences, the most rows of a step. saved: with layer normalisation where
  // W_ih x of row 0 is saved, saved_stride from row to row, or null.
  InputPart(const Problem& p, const LayerInput<S>& input, const ForwardWeights<S>& weights,
            int64_t batch, S* saved, int64_t saved_stride)
      : input_(input),
        weights_(weights),
        normed_(p.layer_norm),
        gates_(4 * p.hidden_size),
        stride_(weights.gates_stride),
        x_stride_(row_stride<E>(input.width)),
        saved_(saved),
        saved_stride_(saved_stride) {
    const int64_t capacity = min_of(p.rows, max_of(kInputRows, batch));
    first_.reset(p.steps);
    rows_.reset(capacity);
    start_.reset(capacity);
    // Zeros: the padding of a row is multiplied too (panels.h).
    if (input.dense()) x_.reset_to_zero(capacity * x_stride_);
    if (computed()) values_.reset(capacity * stride_);
  }

  // Steps are added in their order, from step s on, as long as their rows fit.
  void begin(int64_t s) {
    first_step_ = last_step_ = s;
    count_ = 0;
  }
  bool fits(int64_t rows) const { return count_ == 0 || count_ + rows <= kInputRows; }
  // A step of `rows` rows, from row `first` of the problem on.
  void add_step(int64_t first, int64_t rows) {
    first_[last_step_++] = count_;
    for (int64_t b = 0; b < rows; ++b) rows_[count_++] = first + b;
  }
  // The steps that were added are [first_step, last_step).
  int64_t first_step() const { return first_step_; }
  int64_t last_step() const { return last_step_; }

  // Computes all rows that were added: one member's share of it.
  void multiply_input(Team& team, Team::Member& member) {
    team.share_ranges(member, count_, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) start_[n] = prepare(n);
    });
    if (input_.dense() && !weights_.direct) {
      const int64_t panels = normed_ ? panels_of<T>(gates_) : stride_ / kPanel<T>;
      team.share_ranges(member, panels, [&](int64_t first, int64_t last) {
        const int64_t column = first * kPanel<T>;
        gemm_rows(values_.get() + column, stride_, x_.get(), x_stride_, weights_.ih.panel(first),
                  count_, input_.width, (last - first) * kPanel<T>,
                  normed_ ? Addend<T>{} : Addend<T>{weights_.bias.get() + column, 0});
      });
    }
    if (normed_) normalise(team, member);
  }

  // Of row b of a step: its pre-activations, and its input.
  const T* start(int64_t s, int64_t b) const { return start_[first_[s] + b]; }
  const E* x(int64_t s, int64_t b) const { return x_.get() + (first_[s] + b) * x_stride_; }
  int64_t x_stride() const { return x_stride_; }

 private:
  // Whether rows are computed, and not taken from the table or from the biases alone.
  bool computed() const { return !weights_.tabled() && !(input_.dense() && weights_.direct); }

  // Everything of row n but the product: returns where its pre-activations are.
  const T* prepare(int64_t n) {
    T* values = computed() ? values_.get() + n * stride_ : nullptr;
    if (input_.dense()) {
      input_.load(x_.get() + n * x_stride_, rows_[n], 0, input_.width);
      return values ? values : weights_.bias.get();
    }
    const int64_t index = input_.index(rows_[n]);
    if (weights_.tabled()) return weights_.table_row(index);
    if (normed_)
      weights_.gather_column(values, index);
    else
      weights_.gather(values, index);
    return values;
  }

  void normalise(Team& team, Team::Member& member) {
    team.share_ranges(member, count_, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        T* values = values_.get() + n * stride_;
        if (saved_) convert(saved_ + rows_[n] * saved_stride_, values, gates_);
        write_normed(values, values, weights_.norm.ih.get(), weights_.bias.get(), gates_);
      }
    });
  }

  const LayerInput<S>& input_;
  const ForwardWeights<S>& weights_;
  const bool normed_;
  const int64_t gates_, stride_, x_stride_;  // gates_: 4H
  S* const saved_;
  const int64_t saved_stride_;
  Buffer<int64_t> first_;   // of each step that was added: its first row here
  Buffer<int64_t> rows_;    // of the problem
  Buffer<const T*> start_;  // each row's pre-activations
  Buffer<E> x_;             // dense input
  Buffer<T> values_;        // rows of pre-activations, as ForwardWeights orders them
  int64_t first_step_ = 0, last_step_ = 0;
  int64_t count_ = 0;  // rows that were added
};

}  // namespace
}  // namespace fastlstm

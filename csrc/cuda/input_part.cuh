// What every forward pass does before its steps: the input's part of a layer's pre-activations, as
// one large product (or, for index input, a table of W_ih's columns), kept in the accumulation type
// so that no gate is rounded before its activation; and the biases' sum.
#pragma once

#include "stack.cuh"

namespace fastlstm {
namespace cuda {

template <class S, bool kTensor>
class InputPart : protected Stack<S, kTensor> {
  typedef Stack<S, kTensor> Base;

 protected:
  typedef Acc<S> T;
  using Base::arena, Base::p, Base::wide;

  // Of layers whose number is below `layers`; the others need only biases.
  InputPart(const Forward& f, const Plan& plan, const Context* context, int layers)
      : Base(f.problem, f.saved, plan, context),
        units_(p.hidden_size),
        table_(p.input_size <= p.rows) {
    int64_t most = 0;
    for (int layer = 0; layer < layers; ++layer) {
      const int64_t n = this->dense(layer) || !table_ ? p.rows : p.input_size;
      if (n > most) most = n;
    }
    if (!this->dense(0)) index_ = arena.template take<int>(p.rows);
    copy_ = arena.template take<S>(p.rows * this->widest_copied_input());
    for (T*& start : start_)
      start = arena.template take<T>(&start - start_ < p.directions ? most * 4 * units_ : 0);
  }

  T* take_bias() { return arena.template take<T>(4 * units_); }

  void begin() const {
    this->fill_map();
    if (index_) this->fill_index(index_);
  }

  void add_biases(int cell, T* sum) const {
    const CellWeights& w = p.weights[cell];
    if (w.b_ih)
      this->run_kernel(bias_kernel<S>, dim3(blocks_of(4 * units_, kRowThreads)), kRowThreads, 0,
                       BiasArgs<S>{static_cast<const S*>(w.b_ih), static_cast<const S*>(w.b_hh),
                                   sum, int(4 * units_)});
  }

  // Fills start_ of both directions.
  void multiply_input(int layer) const {
    int64_t stride = 0;
    const S* x = this->dense(layer) ? this->input(layer, copy_, &stride) : nullptr;
    for (int d = 0; d < p.directions; ++d) {
      const CellWeights& w = p.weights[layer * p.directions + d];
      if (x) {
        const int64_t width = this->input_width(layer);
        this->gemm({dtype_of<S>(),
                    dtype_of<T>(),
                    p.rows,
                    4 * units_,
                    width,
                    {x, stride, 1},
                    {w.w_ih, 1, width},
                    start_[d]});
      } else {
        const int64_t n = table_ ? p.input_size : p.rows;
        this->pack(PackArgs<S, T>{static_cast<const S*>(w.w_ih), start_[d],
                                  table_ ? nullptr : index_, 1, p.input_size, n, n, 4 * units_,
                                  int(4 * units_), 0});
      }
    }
  }

  // Whether start_ is a table of W_ih's columns.
  bool tabled(int layer) const { return !this->dense(layer) && table_; }
  // Which row of start_ belongs to a row of the input: its own (null) or that of its index.
  const int* start_index(int layer) const { return tabled(layer) ? index_ : nullptr; }

  const int64_t units_;
  T* start_[2];

 private:
  const bool table_;  // index input: W_ih's columns once, or gathered for every row
  int* index_ = nullptr;
  S* copy_;
};

}  // namespace cuda
}  // namespace fastlstm

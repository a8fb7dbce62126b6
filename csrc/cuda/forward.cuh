// Stepwise forward pass of the stack: host side, one layer after the other.
//
// Per layer: the input's part of all pre-activations as one large product (or, for index input, a
// table of W_ih's columns), kept in the accumulation type so that no gate is rounded before its
// activation; W_hh packed once; then one launch a step for both directions (two with a
// projection). h goes from step to step through two padded buffers that take turns.
#pragma once

#include "stack.cuh"

namespace fastlstm {
namespace cuda {

template <class S, bool kTensor>
class ForwardPass : Stack<S, kTensor> {
  typedef Stack<S, kTensor> Base;
  typedef Acc<S> T;
  using Base::active, Base::arena, Base::first, Base::map, Base::p, Base::padded, Base::plan;
  using Base::saved, Base::wide;

 public:
  ForwardPass(const Forward& f, const Plan& plan, const Context* context)
      : Base(f.problem, f.saved, plan, context),
        f_(f),
        units_(p.hidden_size),
        out_(p.out_size),
        table_(p.input_size <= p.rows) {
    int64_t start = 0;
    for (int layer = 0; layer < p.layers; ++layer) {
      const int64_t n = this->dense(layer) || !table_ ? p.rows : p.input_size;
      if (n > start) start = n;
    }
    if (!this->dense(0)) index_ = arena.template take<int>(p.rows);
    copy_ = arena.template take<S>(p.rows * this->widest_copied_input());
    const int64_t h_size = p.batch * padded(out_), raw_size = p.batch * padded(units_);
    for (S*& h : h_) h = arena.template take<S>(p.directions * h_size);
    raw_ = arena.template take<S>(p.projected ? p.directions * raw_size : 0);
    for (int d = 0; d < p.directions; ++d) {
      start_[d] = arena.template take<T>(start * 4 * units_);
      bias_[d] = arena.template take<T>(4 * units_);
      c_[d] = arena.template take<T>(p.batch * units_);
      hh_[d] = this->take_operand(4 * units_, out_, true);
      if (p.projected) hr_[d] = this->take_operand(out_, units_, false);
    }
  }

  int64_t workspace() const { return arena.used(); }

  void run() {
    this->fill_map();
    if (index_) this->fill_index(index_);
    if (p.projected) this->zero(raw_, p.directions * p.batch * padded(units_) * int64_t(sizeof(S)));
    for (int layer = 0; layer < p.layers; ++layer) {
      prepare(layer);
      for (int64_t s = 0; s < p.steps; ++s) {
        advance(layer, s);
        if (p.projected) project(layer, s);
      }
    }
  }

 private:
  int64_t step_of(int64_t s, int d) const { return d == 0 ? s : p.steps - 1 - s; }
  int64_t next_of(int64_t t, int d) const { return d == 0 ? t + 1 : t - 1; }
  int64_t before_of(int64_t t, int d) const { return d == 0 ? t - 1 : t + 1; }

  void prepare(int layer) {
    const bool dense = this->dense(layer);
    int64_t stride = 0;
    const S* x = dense ? this->input(layer, copy_, &stride) : nullptr;
    for (int d = 0; d < p.directions; ++d) {
      const CellWeights& w = p.weights[layer * p.directions + d];
      this->pack_operand(hh_[d], w.w_hh, 4 * units_, out_, out_, 1, true);
      if (p.projected) this->pack_operand(hr_[d], w.w_hr, out_, units_, units_, 1, false);
      if (w.b_ih)
        this->run_kernel(bias_kernel<S>, dim3(blocks_of(4 * units_, kRowThreads)), kRowThreads, 0,
                         BiasArgs<S>{static_cast<const S*>(w.b_ih), static_cast<const S*>(w.b_hh),
                                     bias_[d], int(4 * units_)});
      if (dense) {
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
    // Both buffers: a sequence may enter at any step (packed input, second direction).
    const S* h0 = part<S>(p.h0, layer, p.directions * p.batch * out_);
    const int64_t n = p.directions * p.batch;
    for (S* h : h_) {
      if (h0)
        this->pack(PackArgs<S, S>{h0, h, nullptr, out_, 1, n, n, padded(out_), int(out_), 0});
      else
        this->zero(h, n * padded(out_) * int64_t(sizeof(S)));
    }
  }

  void advance(int layer, int64_t s) const {
    StepArgs<GatesStep<S>> args{};
    for (int d = 0; d < p.directions; ++d) {
      const int64_t t = step_of(s, d), cell = layer * p.directions + d;
      const int count = args.active[d] = active(t);
      const int64_t h_at = d * p.batch * padded(out_);
      args.operands[d] = {h_[s % 2] + h_at, hh_[d], padded(out_),
                          padded(out_),     count,  int(padded(out_) * sizeof(S))};
      GatesStep<S>& step = args.step[d];
      step.start = start_[d];
      step.index = !this->dense(layer) && table_ ? index_ : nullptr;
      step.bias = p.weights[cell].b_ih ? bias_[d] : nullptr;
      step.first = first[t];
      step.units = int(units_);
      step.entered = active(before_of(t, d));
      step.staying = active(next_of(t, d));
      step.c0 = part<S>(p.c0, cell, p.batch * units_);
      step.c = c_[d];
      step.h = p.projected ? raw_ + d * p.batch * padded(units_) : h_[(s + 1) % 2] + h_at;
      step.h_wide = p.projected ? padded(units_) : padded(out_);
      step.y = p.projected ? nullptr : output(layer, t, d);
      step.y_wide = wide;
      step.gates = part<S>(saved.gates, cell, p.rows * 4 * units_);
      step.cells = part<T>(saved.cells, cell, p.rows * units_);
      step.h_n = part<S>(f_.h_n, cell, p.batch * out_);
      step.c_n = part<S>(f_.c_n, cell, p.batch * units_);
    }
    this->step(plan.gates, this->gate_columns(units_), args);
  }

  void project(int layer, int64_t s) const {
    StepArgs<ProjectStep<S>> args{};
    for (int d = 0; d < p.directions; ++d) {
      const int64_t t = step_of(s, d), cell = layer * p.directions + d;
      const int count = args.active[d] = active(t);
      args.operands[d] = {
          raw_ + d * p.batch * padded(units_), hr_[d], padded(units_), padded(units_), count,
          int(padded(units_) * sizeof(S))};
      args.step[d] = {int(out_),
                      active(next_of(t, d)),
                      h_[(s + 1) % 2] + d * p.batch * padded(out_),
                      padded(out_),
                      wide,
                      output(layer, t, d),
                      part<S>(f_.h_n, cell, p.batch * out_)};
    }
    this->step(plan.project, out_, args);
  }

  S* output(int layer, int64_t t, int d) const {
    return this->layer_output(layer) + first[t] * wide + d * out_;
  }

  const Forward& f_;
  const int64_t units_, out_;
  const bool table_;  // index input: W_ih's columns once, or gathered for every row
  int* index_ = nullptr;
  S *copy_, *h_[2], *raw_, *hh_[2], *hr_[2];
  T *start_[2], *bias_[2], *c_[2];
};

template <class S, bool kTensor>
int64_t stepwise_forward(const Forward& f, const Plan& plan, const Context* context) {
  ForwardPass<S, kTensor> pass(f, plan, context);
  if (context) pass.run();
  return pass.workspace();
}

}  // namespace cuda
}  // namespace fastlstm

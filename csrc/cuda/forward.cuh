// Stepwise forward pass of the stack: host side, one layer after the other.
//
// Per layer: the input's part (input_part.cuh); W_hh packed once; then one launch a step for both
// directions (two with a projection). h goes from step to step through two padded buffers that take
// turns.
#pragma once

#include "input_part.cuh"
#include "norm_forward.cuh"

namespace fastlstm {
namespace cuda {

template <class S, bool kTensor>
class ForwardPass : InputPart<S, kTensor> {
  typedef InputPart<S, kTensor> Base;
  typedef Acc<S> T;
  using Base::active, Base::arena, Base::first, Base::p, Base::padded, Base::plan, Base::saved;
  using Base::units_, Base::start_, Base::wide;

 public:
  ForwardPass(const Forward& f, const Plan& plan, const Context* context)
      : Base(f, plan, context, f.problem.layers), f_(f), out_(p.out_size) {
    const int64_t h_size = p.batch * padded(out_), raw_size = p.batch * padded(units_);
    for (S*& h : h_) h = arena.template take<S>(p.directions * h_size);
    raw_ = arena.template take<S>(p.projected ? p.directions * raw_size : 0);
    for (int d = 0; d < p.directions; ++d) {
      bias_[d] = this->take_bias();
      c_[d] = arena.template take<T>(p.batch * units_);
      hh_[d] = this->take_operand(4 * units_, out_, !p.layer_norm);
      if (p.projected) hr_[d] = this->take_operand(out_, units_, false);
      if (!p.layer_norm) continue;
      z_[d] = arena.template take<T>(p.batch * 4 * units_);
      scratch_[d] = arena.template take<T>(p.batch * 2 * units_);
      normed_[d] = arena.template take<T>(this->tabled(0) ? p.rows * 4 * units_ : 0);
    }
  }

  int64_t workspace() const { return arena.used(); }

  void run() {
    this->begin();
    if (p.projected) this->zero(raw_, p.directions * p.batch * padded(units_) * int64_t(sizeof(S)));
    for (int layer = 0; layer < p.layers; ++layer) {
      prepare(layer);
      for (int64_t s = 0; s < p.steps; ++s) {
        if (p.layer_norm)
          advance_normed(layer, s);
        else
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
    this->multiply_input(layer);
    for (int d = 0; d < p.directions; ++d) {
      const int cell = layer * p.directions + d;
      const CellWeights& w = p.weights[cell];
      this->pack_operand(hh_[d], w.w_hh, 4 * units_, out_, out_, 1, !p.layer_norm);
      if (p.projected) this->pack_operand(hr_[d], w.w_hr, out_, units_, units_, 1, false);
      this->add_biases(cell, bias_[d]);
      if (p.layer_norm) normalise_input(layer, d);
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
      step.index = this->start_index(layer);
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
      step.rules = drawn_rules<T>(p, layer, d);
      step.t = t;
      step.h_before = p.projected ? nullptr : h_[s % 2] + h_at;
    }
    this->step(plan.gates, this->gate_columns(units_), args);
  }

  // ---- layer normalisation ----
  S* saved_of(int64_t cell) const {
    return part<S>(saved.gates, cell, p.rows * saved_per_unit(p.layer_norm) * units_);
  }
  T* pre(int layer, int d) const { return this->tabled(layer) ? normed_[d] : start_[d]; }

  void normalise_input(int layer, int d) const {
    const int64_t cell = layer * p.directions + d;
    const CellWeights& w = p.weights[cell];
    S* saved_rows = saved_of(cell);
    NormRowsArgs<S> args{};
    args.from = start_[d];
    args.index = this->start_index(layer);
    args.to = pre(layer, d);
    args.gain = static_cast<const S*>(w.norm_ih);
    args.bias = w.b_ih ? bias_[d] : nullptr;
    args.saved = saved_rows ? saved_rows + 4 * units_ : nullptr;
    args.saved_wide = kSavedWithNorm * units_;
    args.units = int(units_);
    this->run_kernel(norm_rows_kernel<S>, dim3(unsigned(p.rows)), kRowThreads, kNormShared<T>,
                     args);
  }

  void advance_normed(int layer, int64_t s) const {
    StepArgs<ProductStep<S>> product{};
    NormForwardArgs<S> args{};
    for (int d = 0; d < p.directions; ++d) {
      const int64_t t = step_of(s, d), cell = layer * p.directions + d;
      const int count = product.active[d] = active(t);
      S *h = h_[s % 2] + d * p.batch * padded(out_), *next = h_[(s + 1) % 2] + (h - h_[s % 2]);
      product.operands[d] = {
          h, hh_[d], padded(out_), padded(out_), count, int(padded(out_) * sizeof(S))};
      product.step[d] = {int(4 * units_), z_[d]};
      const CellWeights& w = p.weights[cell];
      NormCell<S>& own = args.cell[d];
      own.active = count;
      own.entered = active(before_of(t, d));
      own.staying = active(next_of(t, d));
      own.units = int(units_);
      own.first = first[t];
      own.t = t;
      own.z = z_[d];
      own.pre = pre(layer, d);
      own.gains = norm_gains<S>(w);
      own.c0 = part<S>(p.c0, cell, p.batch * units_);
      own.h_before = h;
      own.c = c_[d];
      own.scratch = scratch_[d];
      own.h = next;
      own.y = output(layer, t, d);
      own.saved = saved_of(cell);
      own.cells = part<T>(saved.cells, cell, p.rows * units_);
      own.h_n = part<S>(f_.h_n, cell, p.batch * out_);
      own.c_n = part<S>(f_.c_n, cell, p.batch * units_);
      own.h_wide = padded(out_);
      own.y_wide = wide;
      own.rules = drawn_rules<T>(p, layer, d);
    }
    this->step(plan.gates, 4 * units_, product);
    this->run_kernel(norm_forward_kernel<S>, this->row_grid(product.active), kRowThreads,
                     kNormShared<T>, args);
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
  const int64_t out_;
  S *h_[2], *raw_, *hh_[2], *hr_[2];
  T *bias_[2], *c_[2];
  T *z_[2], *scratch_[2], *normed_[2];  // layer normalisation
};

template <class S, bool kTensor>
int64_t stepwise_forward(const Forward& f, const Plan& plan, const Context* context) {
  ForwardPass<S, kTensor> pass(f, plan, context);
  if (context) pass.run();
  return pass.workspace();
}

}  // namespace cuda
}  // namespace fastlstm

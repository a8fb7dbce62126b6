// Stepwise backward pass of the stack: host side, one layer after the other from the last.
//
// Per layer: one launch a step for both directions (two with a projection) that turns the
// gradients of h and c into those of the pre-activations, dgates; then what gradient_part.cuh does.
#pragma once

#include "gradient_part.cuh"
#include "norm_backward.cuh"

namespace fastlstm {
namespace cuda {

template <class S, bool kTensor>
class BackwardPass : GradientPart<S, kTensor> {
  typedef GradientPart<S, kTensor> Base;
  typedef Acc<S> T;
  using Base::active, Base::arena, Base::before_of, Base::depth_, Base::dgates, Base::dh_,
      Base::dh_stays_;
  using Base::f_, Base::first, Base::gates_wide_, Base::out_, Base::p, Base::padded, Base::plan;
  using Base::saved, Base::units_, Base::upper_input_, Base::wide;

 public:
  BackwardPass(const Backward& f, const Plan& plan, const Context* context)
      : Base(f, plan, context) {
    for (int d = 0; d < p.directions; ++d) {
      dc_[d] = arena.template take<T>(p.batch * units_);
      hh_[d] = this->take_operand(out_, 4 * units_, false);
      if (p.projected) hr_[d] = this->take_operand(units_, out_, false);
      if (!p.layer_norm) continue;
      dh_row_[d] = arena.template take<T>(p.batch * units_);
      scratch_[d] = arena.template take<T>(p.batch * 6 * units_);
    }
  }

  int64_t workspace() const { return arena.used(); }

  void run() {
    for (int d = 0; d < p.directions; ++d)
      if (p.projected && padded(out_) != out_)
        this->zero(dh_[d], p.rows * padded(out_) * int64_t(sizeof(S)));
    this->run_layers([&](int layer, int) {
      for (int d = 0; d < p.directions; ++d) {
        const CellWeights& w = p.weights[layer * p.directions + d];
        this->pack_operand(hh_[d], w.w_hh, out_, 4 * units_, 1, out_, false);
        if (p.projected) this->pack_operand(hr_[d], w.w_hr, units_, out_, 1, units_, false);
      }
      for (int64_t s = p.steps - 1; s >= 0; --s) {
        if (p.projected) hidden(layer, s);
        if (p.layer_norm)
          cell_normed(layer, s);
        else
          cell(layer, s);
      }
    });
  }

 private:
  int64_t step_of(int64_t s, int d) const { return d == 0 ? s : p.steps - 1 - s; }
  int64_t after_of(int64_t t, int d) const { return d == 0 ? t + 1 : t - 1; }

  FromAbove<S> from_above(int layer, int64_t t, int d) const {
    const bool top = layer == p.layers - 1;
    const int64_t at = first[t] * wide + d * out_;
    FromAbove<S> above{};
    if (top && f_.grad_output) above.output = static_cast<const S*>(f_.grad_output) + at;
    if (!top) above.upper_input = upper_input_ + at;
    above.h_n = part<S>(f_.grad_h_n, layer * p.directions + d, p.batch * out_);
    above.wide = wide;
    above.after = active(after_of(t, d));
    return above;
  }

  // dgates of the step after, times W_hh.
  Operands<S> recurrent(int layer, int64_t t, int d) const {
    const int64_t after = after_of(t, d);
    const int count = active(after);
    const S* a = this->to_hidden(layer, d) + (count ? first[after] * gates_wide_ : 0);
    return {a, hh_[d], gates_wide_, depth_, count, int(depth_ * sizeof(S))};
  }

  void hidden(int layer, int64_t s) const {
    StepArgs<HiddenGradientStep<S>> args{};
    for (int d = 0; d < p.directions; ++d) {
      const int64_t t = step_of(s, d);
      args.active[d] = active(t);
      args.operands[d] = recurrent(layer, t, d);
      args.step[d] = {int(out_), from_above(layer, t, d), dh_[d] + first[t] * padded(out_),
                      padded(out_)};
    }
    this->step(plan.hidden, out_, args);
  }

  void cell(int layer, int64_t s) const {
    StepArgs<CellStep<S>> args{};
    for (int d = 0; d < p.directions; ++d) {
      const int64_t t = step_of(s, d), before = before_of(t, d), cell = layer * p.directions + d;
      const int count = args.active[d] = active(t);
      if (p.projected)
        args.operands[d] = {
            dh_[d] + first[t] * padded(out_), hr_[d], padded(out_), padded(out_), count,
            int(padded(out_) * sizeof(S))};
      else
        args.operands[d] = recurrent(layer, t, d);
      CellStep<S>& step = args.step[d];
      step.width = int(units_);
      step.projected = p.projected;
      step.above = from_above(layer, t, d);
      step.first = first[t];
      step.before = active(before);
      step.before_first = step.before ? first[before] : 0;
      step.after = active(after_of(t, d));
      step.gates = part<S>(saved.gates, cell, p.rows * 4 * units_);
      step.cells = part<T>(saved.cells, cell, p.rows * units_);
      step.grad_cells = part<T>(f_.grad_cells, cell, p.rows * units_);
      step.c0 = part<S>(p.c0, cell, p.batch * units_);
      step.grad_c_n = part<S>(f_.grad_c_n, cell, p.batch * units_);
      step.dc = dc_[d];
      step.dgates = dgates(layer, d);
      step.dgates_wide = gates_wide_;
      step.grad_c0 = part<S>(f_.grad_c0, cell, p.batch * units_);
      step.rules = drawn_rules<T>(p, layer, d);
      step.t = t;
      step.dh_stays = dh_stays_[d];
    }
    this->step(plan.cell, units_, args);
  }

  void cell_normed(int layer, int64_t s) const {
    StepArgs<HiddenRowStep<S>> product{};
    NormBackwardArgs<S> args{};
    for (int d = 0; d < p.directions; ++d) {
      const int64_t t = step_of(s, d), before = before_of(t, d), cell = layer * p.directions + d;
      product.active[d] = active(t);
      product.operands[d] = recurrent(layer, t, d);
      product.step[d] = {int(units_), from_above(layer, t, d), dh_stays_[d], dh_row_[d]};
      NormCellBackward<S>& own = args.cell[d];
      own.active = active(t);
      own.after = active(after_of(t, d));
      own.before = active(before);
      own.units = int(units_);
      own.first = first[t];
      own.before_first = own.before ? first[before] : 0;
      own.t = t;
      own.dh = dh_row_[d];
      own.gains = norm_gains<S>(p.weights[cell]);
      own.saved = part<S>(saved.gates, cell, p.rows * kSavedWithNorm * units_);
      own.cells = part<T>(saved.cells, cell, p.rows * units_);
      own.grad_cells = part<T>(f_.grad_cells, cell, p.rows * units_);
      own.c0 = part<S>(p.c0, cell, p.batch * units_);
      own.grad_c_n = part<S>(f_.grad_c_n, cell, p.batch * units_);
      own.dc = dc_[d];
      own.dh_stays = dh_stays_[d];
      own.scratch = scratch_[d];
      own.da = dgates(layer, d);
      own.dz_x = this->to_input(layer, d);
      own.dz_h = this->to_hidden(layer, d);
      own.grad_c0 = part<S>(f_.grad_c0, cell, p.batch * units_);
      own.wide = gates_wide_;
      own.terms = this->terms_[d];
      own.rules = drawn_rules<T>(p, layer, d);
    }
    this->step(plan.cell, units_, product);
    this->run_kernel(norm_backward_kernel<S>, this->row_grid(product.active), kRowThreads,
                     kNormShared<T>, args);
  }

  S *hh_[2], *hr_[2];
  T* dc_[2];
  T *dh_row_[2], *scratch_[2];  // layer normalisation
};

template <class S, bool kTensor>
int64_t stepwise_backward(const Backward& f, const Plan& plan, const Context* context) {
  BackwardPass<S, kTensor> pass(f, plan, context);
  if (context) pass.run();
  return pass.workspace();
}

}  // namespace cuda
}  // namespace fastlstm

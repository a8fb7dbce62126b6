// Stepwise backward pass of the stack: host side, one layer after the other from the last.
//
// Per layer: one launch a step for both directions (two with a projection) that turns the
// gradients of h and c into those of the pre-activations, dgates; then what gradient_part.cuh does.
#pragma once

#include "gradient_part.cuh"
#include "norm_backward.cuh"
#include "step_launcher.cuh"

namespace fastlstm {
namespace cuda {

template <class S, bool kTensor>
class BackwardPass {
  typedef Acc<S> T;
  typedef StepLauncher<S, kTensor> Launcher;

 public:
  BackwardPass(const Backward& f, const Plan& plan, const Context* context)
      : f_(f),
        stack_(f.problem, f.saved, plan, context),
        gradients_(f, stack_, Launcher::padded(4 * f.problem.hidden_size),
                   Launcher::padded(f.problem.out_size)),
        launcher_(stack_, max_of(f.problem.hidden_size, f.problem.out_size)),
        p_(stack_.problem),
        units_(p_.hidden_size),
        out_(p_.out_size),
        dh_wide_(Launcher::padded(out_)) {
    Arena& arena = stack_.arena;
    launcher_.take_operands(hh_, out_, 4 * units_, false);
    if (p_.projected) launcher_.take_operands(hr_, units_, out_, false);
    for (int d = 0; d < p_.directions; ++d) {
      dc_[d] = arena.template take<T>(p_.batch * units_);
      if (!p_.layer_norm) continue;
      dh_row_[d] = arena.template take<T>(p_.batch * units_);
      scratch_[d] = arena.template take<T>(p_.batch * 6 * units_);
    }
  }

  int64_t workspace() const { return stack_.arena.used(); }

  void run() {
    for (int d = 0; d < p_.directions; ++d)
      if (p_.projected && dh_wide_ != out_)
        stack_.zero(gradients_.dh(d), p_.rows * dh_wide_ * int64_t(sizeof(S)));
    gradients_.run_layers([&](int layer) {
      launcher_.pack_operands(hh_, layer, &CellWeights::w_hh, out_, 4 * units_, 1, out_, false);
      if (p_.projected)
        launcher_.pack_operands(hr_, layer, &CellWeights::w_hr, units_, out_, 1, units_, false);
      for (int64_t s = p_.steps - 1; s >= 0; --s) {
        if (p_.projected) hidden(layer, s);
        if (p_.layer_norm)
          cell_normed(layer, s);
        else
          cell(layer, s);
      }
    });
  }

 private:
  FromAbove<S> from_above(int layer, int64_t t, int d) const {
    const bool top = layer == p_.layers - 1;
    const int64_t at = stack_.first[t] * stack_.output_width + d * out_;
    FromAbove<S> above{};
    if (top && f_.grad_output) above.output = static_cast<const S*>(f_.grad_output) + at;
    if (!top) above.upper_input = gradients_.upper_input() + at;
    above.h_n = stack_.states(f_.grad_h_n, layer * p_.directions + d, out_);
    above.wide = stack_.output_width;
    above.after = stack_.active(Stack<S>::after(t, d));
    return above;
  }

  // dgates of the step after, times W_hh.
  Operands<S> recurrent(int64_t t, int d) const {
    const int64_t after = Stack<S>::after(t, d);
    const int count = stack_.active(after);
    const S* a =
        gradients_.to_hidden(d) + (count ? stack_.first[after] * gradients_.dgates_wide() : 0);
    return {a,
            hh_[d],
            gradients_.dgates_wide(),
            gradients_.depth(),
            count,
            int(gradients_.depth() * sizeof(S))};
  }

  void hidden(int layer, int64_t s) const {
    StepArgs<HiddenGradientStep<S>> args{};
    for (int d = 0; d < p_.directions; ++d) {
      const int64_t t = stack_.step_of(s, d);
      args.active[d] = stack_.active(t);
      args.operands[d] = recurrent(t, d);
      args.step[d] = {int(out_), from_above(layer, t, d),
                      gradients_.dh(d) + stack_.first[t] * dh_wide_, dh_wide_};
    }
    launcher_.step(stack_.plan.hidden, out_, args);
  }

  void cell(int layer, int64_t s) const {
    StepArgs<CellStep<S>> args{};
    for (int d = 0; d < p_.directions; ++d) {
      const int64_t t = stack_.step_of(s, d), before = Stack<S>::before(t, d),
                    cell = layer * p_.directions + d;
      const int count = args.active[d] = stack_.active(t);
      if (p_.projected)
        args.operands[d] = {gradients_.dh(d) + stack_.first[t] * dh_wide_,
                            hr_[d],
                            dh_wide_,
                            dh_wide_,
                            count,
                            int(dh_wide_ * sizeof(S))};
      else
        args.operands[d] = recurrent(t, d);
      CellStep<S>& step = args.step[d];
      step.width = int(units_);
      step.projected = p_.projected;
      step.above = from_above(layer, t, d);
      step.first = stack_.first[t];
      step.before = stack_.active(before);
      step.before_first = step.before ? stack_.first[before] : 0;
      step.after = stack_.active(Stack<S>::after(t, d));
      step.gates = stack_.gates(cell);
      step.cells = stack_.cells(cell);
      step.grad_cells = part<T>(f_.grad_cells, cell, p_.rows * units_);
      step.c0 = stack_.states(p_.c0, cell, units_);
      step.grad_c_n = stack_.states(f_.grad_c_n, cell, units_);
      step.dc = dc_[d];
      step.dgates = gradients_.dgates(d);
      step.dgates_wide = gradients_.dgates_wide();
      step.grad_c0 = stack_.states(f_.grad_c0, cell, units_);
      step.rules = drawn_rules<T>(p_, layer, d);
      step.t = t;
      step.dh_stays = gradients_.dh_stays(d);
    }
    launcher_.step(stack_.plan.cell, units_, args);
  }

  void cell_normed(int layer, int64_t s) const {
    StepArgs<HiddenRowStep<S>> product{};
    NormBackwardArgs<S> args{};
    for (int d = 0; d < p_.directions; ++d) {
      const int64_t t = stack_.step_of(s, d), before = Stack<S>::before(t, d),
                    cell = layer * p_.directions + d;
      product.active[d] = stack_.active(t);
      product.operands[d] = recurrent(t, d);
      product.step[d] = {int(units_), from_above(layer, t, d), gradients_.dh_stays(d), dh_row_[d]};
      NormCellBackward<S>& own = args.cell[d];
      own.active = stack_.active(t);
      own.after = stack_.active(Stack<S>::after(t, d));
      own.before = stack_.active(before);
      own.units = int(units_);
      own.first = stack_.first[t];
      own.before_first = own.before ? stack_.first[before] : 0;
      own.t = t;
      own.dh = dh_row_[d];
      own.gains = norm_gains<S>(p_.weights[cell]);
      own.saved = stack_.gates(cell);
      own.cells = stack_.cells(cell);
      own.grad_cells = part<T>(f_.grad_cells, cell, p_.rows * units_);
      own.c0 = stack_.states(p_.c0, cell, units_);
      own.grad_c_n = stack_.states(f_.grad_c_n, cell, units_);
      own.dc = dc_[d];
      own.dh_stays = gradients_.dh_stays(d);
      own.scratch = scratch_[d];
      own.da = gradients_.dgates(d);
      own.dz_x = gradients_.to_input(d);
      own.dz_h = gradients_.to_hidden(d);
      own.grad_c0 = stack_.states(f_.grad_c0, cell, units_);
      own.wide = gradients_.dgates_wide();
      own.terms = gradients_.terms(d);
      own.rules = drawn_rules<T>(p_, layer, d);
    }
    launcher_.step(stack_.plan.cell, units_, product);
    stack_.run_kernel(norm_backward_kernel<S>, sequence_grid(product.active, p_.directions),
                      kRowThreads, kNormShared<T>, args);
  }

  const Backward& f_;
  Stack<S> stack_;
  GradientPart<S> gradients_;
  Launcher launcher_;
  const Problem& p_;
  const int64_t units_, out_, dh_wide_;
  S *hh_[2], *hr_[2];
  T* dc_[2];
  T *dh_row_[2], *scratch_[2];  // layer normalisation
};

}  // namespace cuda
}  // namespace fastlstm

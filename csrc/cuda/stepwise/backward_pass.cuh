// The stepwise backward pass on the host, one layer after the other from the last.
//
// For each layer: one launch a step for all directions (two with a projection or with layer
// normalisation), which computes the gradients of the pre-activations, dgates, from those of h and
// c; then the gradients of weights and input (gradient_part.cuh).
#pragma once

#include "../shared/gradient_part.cuh"
#include "backward_steps.cuh"
#include "norm_backward.cuh"
#include "step_launcher.cuh"

namespace fastlstm {
namespace cuda {

template <class S, bool kTensor>
class StepwiseBackwardPass {
  typedef Acc<S> T;
  typedef StepLauncher<S, kTensor> Launcher;

 public:
  StepwiseBackwardPass(const Backward& f, const Plan& plan, const Context* context)
      : f_(f),
        stack_(f.problem, f.saved, plan, context),
        gradients_(f, stack_, Launcher::padded(4 * f.problem.hidden_size),
                   Launcher::padded(f.problem.out_size)),
        launcher_(stack_, max_of(f.problem.hidden_size, f.problem.out_size)),
        p_(stack_.problem),
        units_(p_.hidden_size),
        out_(p_.out_size),
        dh_stride_(Launcher::padded(out_)) {
    Arena& arena = stack_.arena;
    launcher_.take_operands(hh_, out_, 4 * units_, false);
    if (p_.projected) launcher_.take_operands(hr_, units_, out_, false);
    for (int d = 0; d < p_.directions; ++d) {
      dc_[d] = arena.template take<T>(p_.batch * units_);
      if (!p_.layer_norm) continue;
      dh_row_[d] = arena.template take<T>(p_.batch * units_);
      scratch_[d] = arena.template take<T>(p_.batch * kNormBackwardScratch * units_);
    }
  }

  int64_t workspace() const { return stack_.arena.used(); }

  void run() {
    for (int d = 0; d < p_.directions; ++d)
      if (p_.projected && dh_stride_ != out_)
        stack_.zero(gradients_.dh(d), p_.rows * dh_stride_ * int64_t(sizeof(S)));
    gradients_.run_layers([&](int layer, const StepRange&) {
      launcher_.pack_operands(hh_, layer, &LayerWeights::w_hh, out_, 4 * units_, 1, out_, false);
      if (p_.projected)
        launcher_.pack_operands(hr_, layer, &LayerWeights::w_hr, units_, out_, 1, units_, false);
      for (int64_t s = p_.steps - 1; s >= 0; --s) {
        if (p_.projected) hidden_gradient(layer, s);
        if (p_.layer_norm)
          advance_normed(layer, s);
        else
          advance(layer, s);
      }
    });
  }

 private:
  IncomingGradient<S> incoming(int layer, int64_t t, int d) const {
    const bool top = layer == p_.layers - 1;
    const int64_t at = stack_.first[t] * stack_.output_width + d * out_;
    IncomingGradient<S> incoming{};
    if (top && f_.grad_output) incoming.output = static_cast<const S*>(f_.grad_output) + at;
    if (!top) incoming.upper_input = gradients_.upper_input() + at;
    incoming.h_n = stack_.states(f_.grad_h_n, layer * p_.directions + d, out_);
    incoming.stride = stack_.output_width;
    incoming.after = stack_.active(Stack<S>::after(t, d));
    return incoming;
  }

  // The operands of dgates_{t+1} W_hh.
  Operands<S> recurrent(int64_t t, int d) const {
    const int64_t after = Stack<S>::after(t, d);
    const int count = stack_.active(after);
    const S* a =
        gradients_.to_hidden(d) + (count ? stack_.first[after] * gradients_.dgates_stride() : 0);
    return Launcher::operands(a, gradients_.dgates_stride(), count, hh_[d], gradients_.depth());
  }

  void hidden_gradient(int layer, int64_t s) const {
    StepArgs<HiddenGradientStep<S>> args{};
    for (int d = 0; d < p_.directions; ++d) {
      const int64_t t = stack_.step_of(s, d);
      args.active[d] = stack_.active(t);
      args.operands[d] = recurrent(t, d);
      HiddenGradientStep<S>& step = args.step[d];
      step.width = int(out_);
      step.incoming = incoming(layer, t, d);
      step.dh = gradients_.dh(d) + stack_.first[t] * dh_stride_;
      step.dh_stride = dh_stride_;
    }
    launcher_.step(stack_.plan.projection_tile, out_, args);
  }

  void advance(int layer, int64_t s) const {
    StepArgs<CellBackwardStep<S>> args{};
    for (int d = 0; d < p_.directions; ++d) {
      const int64_t t = stack_.step_of(s, d), before = Stack<S>::before(t, d),
                    pseudo_layer = layer * p_.directions + d;
      const int count = args.active[d] = stack_.active(t);
      if (p_.projected)
        args.operands[d] = Launcher::operands(gradients_.dh(d) + stack_.first[t] * dh_stride_,
                                              dh_stride_, count, hr_[d], dh_stride_);
      else
        args.operands[d] = recurrent(t, d);
      CellBackwardStep<S>& step = args.step[d];
      step.width = int(units_);
      step.projected = p_.projected;
      // A caller's hook for saved tensors may have moved them anywhere.
      step.aligned = begins_piece(f_.saved.gates) && begins_piece(f_.saved.cell_states);
      step.incoming = incoming(layer, t, d);
      step.first = stack_.first[t];
      step.before = stack_.active(before);
      step.before_first = step.before ? stack_.first[before] : 0;
      step.after = stack_.active(Stack<S>::after(t, d));
      step.gates = stack_.gates(pseudo_layer);
      step.cell_states = stack_.cell_states(pseudo_layer);
      step.grad_cell_states = part<T>(f_.grad_cell_states, pseudo_layer, p_.rows * units_);
      step.c0 = stack_.states(p_.c0, pseudo_layer, units_);
      step.grad_c_n = stack_.states(f_.grad_c_n, pseudo_layer, units_);
      step.dc = dc_[d];
      step.dgates = gradients_.dgates(d);
      step.dgates_stride = gradients_.dgates_stride();
      step.grad_c0 = stack_.states(f_.grad_c0, pseudo_layer, units_);
      step.rules = drawn_rules<T>(p_, layer, d);
      step.t = t;
      step.dh_zoneout = gradients_.dh_zoneout(d);
    }
    launcher_.step(stack_.plan.cell_tile, units_, args);
  }

  void advance_normed(int layer, int64_t s) const {
    StepArgs<HiddenGradientRowStep<S>> product{};
    NormBackwardArgs<S> args{};
    for (int d = 0; d < p_.directions; ++d) {
      const int64_t t = stack_.step_of(s, d), before = Stack<S>::before(t, d),
                    pseudo_layer = layer * p_.directions + d;
      product.active[d] = stack_.active(t);
      product.operands[d] = recurrent(t, d);
      HiddenGradientRowStep<S>& row_step = product.step[d];
      row_step.width = int(units_);
      row_step.incoming = incoming(layer, t, d);
      row_step.dh_zoneout = gradients_.dh_zoneout(d);
      row_step.to = dh_row_[d];
      NormBackwardStep<S>& step = args.step[d];
      step.active = stack_.active(t);
      step.after = stack_.active(Stack<S>::after(t, d));
      step.before = stack_.active(before);
      step.units = int(units_);
      step.first = stack_.first[t];
      step.before_first = step.before ? stack_.first[before] : 0;
      step.t = t;
      step.dh = dh_row_[d];
      step.gains = norm_gains<S>(p_.weights[pseudo_layer]);
      step.saved = stack_.gates(pseudo_layer);
      step.cell_states = stack_.cell_states(pseudo_layer);
      step.grad_cell_states = part<T>(f_.grad_cell_states, pseudo_layer, p_.rows * units_);
      step.c0 = stack_.states(p_.c0, pseudo_layer, units_);
      step.grad_c_n = stack_.states(f_.grad_c_n, pseudo_layer, units_);
      step.dc = dc_[d];
      step.dh_zoneout = gradients_.dh_zoneout(d);
      step.scratch = scratch_[d];
      step.da = gradients_.dgates(d);
      step.dz_x = gradients_.to_input(d);
      step.dz_h = gradients_.to_hidden(d);
      step.grad_c0 = stack_.states(f_.grad_c0, pseudo_layer, units_);
      step.stride = gradients_.dgates_stride();
      step.terms = gradients_.terms(d);
      step.rules = drawn_rules<T>(p_, layer, d);
    }
    launcher_.step(stack_.plan.cell_tile, units_, product);
    launcher_.run_kernel(norm_backward_kernel<S>, sequence_grid(product.active, p_.directions),
                         kRowThreads, kNormShared<T>, args);
  }

  const Backward& f_;
  Stack<S> stack_;
  GradientPart<S> gradients_;
  Launcher launcher_;
  const Problem& p_;
  const int64_t units_, out_, dh_stride_;
  S *hh_[2], *hr_[2];
  T* dc_[2];
  T *dh_row_[2], *scratch_[2];  // layer normalisation
};

}  // namespace cuda
}  // namespace fastlstm

// The stepwise forward pass on the host, one layer after the other.
//
// For each layer: the input part (input_part.cuh), W_hh packed once, then one launch a step for all
// directions. A projection and layer normalisation add one launch each, kLibraryTile one and the
// products. h goes from step to step through two padded buffers in turn; for wide steps W_hh and h
// are packed in an order of their own.
#pragma once

#include "../shared/input_part.cuh"
#include "forward_steps.cuh"
#include "norm_forward.cuh"
#include "single_step.cuh"
#include "step_launcher.cuh"
#include "wide_launch.cuh"

namespace fastlstm {
namespace cuda {

template <class S, bool kTensor>
class StepwiseForwardPass {
  typedef Acc<S> T;
  typedef StepLauncher<S, kTensor> Launcher;

 public:
  StepwiseForwardPass(const Forward& f, const Plan& plan, const Context* context)
      : f_(f),
        stack_(f.problem, f.saved, plan, context),
        input_(stack_, f.problem.layers),
        launcher_(stack_,
                  max_of(Launcher::gate_columns(f.problem.hidden_size), f.problem.out_size)),
        wide_(stack_),
        p_(stack_.problem),
        units_(p_.hidden_size),
        out_(p_.out_size),
        h_stride_(Launcher::padded(out_)),
        unprojected_stride_(Launcher::padded(units_)) {
    Arena& arena = stack_.arena;
    if (!wide_.used()) {
      for (S*& h : h_) h = arena.template take<S>(p_.directions * p_.batch * h_stride_);
      launcher_.take_operands(hh_, 4 * units_, out_, !p_.layer_norm);
    }
    if (p_.projected) launcher_.take_operands(hr_, out_, units_, false);
    unprojected_ =
        arena.template take<S>(p_.projected ? p_.directions * p_.batch * unprojected_stride_ : 0);
    for (int d = 0; d < p_.directions; ++d) {
      c_[d] = arena.template take<T>(p_.batch * units_);
      if (!p_.layer_norm) continue;
      z_[d] = arena.template take<T>(p_.batch * 4 * units_);
      scratch_[d] = arena.template take<T>(p_.batch * kNormForwardScratch * units_);
      normed_[d] = arena.template take<T>(input_.tabled(0) ? p_.rows * 4 * units_ : 0);
    }
  }

  int64_t workspace() const { return stack_.arena.used(); }

  void run() {
    input_.begin();
    if (p_.projected)
      stack_.zero(unprojected_,
                  p_.directions * p_.batch * unprojected_stride_ * int64_t(sizeof(S)));
    for (int layer = 0; layer < p_.layers; ++layer) {
      prepare(layer);
      for (int64_t s = 0; s < p_.steps; ++s) {
        if (p_.layer_norm)
          advance_normed(layer, s);
        else
          advance(layer, s);
        if (p_.projected) project(layer, s);
      }
    }
  }

 private:
  void prepare(int layer) {
    input_.multiply_input(layer, stack_.all_steps());
    if (wide_.used()) {
      wide_.pack(layer);
      return launcher_.begin_late();
    }
    launcher_.pack_operands(hh_, layer, &LayerWeights::w_hh, 4 * units_, out_, out_, 1,
                            !p_.layer_norm);
    if (p_.projected)
      launcher_.pack_operands(hr_, layer, &LayerWeights::w_hr, out_, units_, units_, 1, false);
    if (p_.layer_norm)
      for (int d = 0; d < p_.directions; ++d) normalise_input(layer, d);
    // Both buffers: a sequence may enter at any step (packed input, second direction).
    const S* h0 = part<S>(p_.h0, layer, p_.directions * p_.batch * out_);
    PackArgs<S, S> args;
    for (int buffer = 0; buffer < 2; ++buffer) {
      args.from[buffer] = h0;
      args.to[buffer] = h_[buffer];
    }
    args.row_stride = out_;
    args.rows = args.to_rows = p_.directions * p_.batch;
    args.to_stride = h_stride_;
    args.depth = int(out_);
    stack_.pack(args);
  }

  void advance(int layer, int64_t s) {
    StepArgs<CellForwardStep<S>> args{};
    for (int d = 0; d < p_.directions; ++d) {
      const int64_t t = stack_.step_of(s, d), pseudo_layer = layer * p_.directions + d;
      const int count = args.active[d] = stack_.active(t);
      const int64_t h_at = d * p_.batch * h_stride_;
      if (!wide_.used())
        args.operands[d] =
            Launcher::operands(h_[s % 2] + h_at, h_stride_, count, hh_[d], h_stride_);
      CellForwardStep<S>& step = args.step[d];
      step.start = input_.start(d);
      step.index = input_.start_index(layer);
      step.bias = input_.bias(pseudo_layer);
      step.first = stack_.first[t];
      step.width = int(units_);
      step.entered = stack_.active(Stack<S>::before(t, d));
      step.staying = stack_.active(Stack<S>::after(t, d));
      step.c0 = stack_.states(p_.c0, pseudo_layer, units_);
      step.c = c_[d];
      if (wide_.used()) {
        step.h = wide_.h(s + 1, d);
        step.h_before = wide_.h(s, d);
      } else if (p_.projected) {
        step.h = unprojected_ + d * p_.batch * unprojected_stride_;
      } else {
        step.h = h_[(s + 1) % 2] + h_at;
        step.h_before = h_[s % 2] + h_at;
      }
      step.h_stride = p_.projected ? unprojected_stride_ : h_stride_;
      step.y = p_.projected ? nullptr : output(layer, t, d);
      step.y_stride = stack_.output_width;
      step.gates = stack_.gates(pseudo_layer);
      step.cell_states = stack_.cell_states(pseudo_layer);
      step.h_n = stack_.states(f_.h_n, pseudo_layer, out_);
      step.c_n = stack_.states(f_.c_n, pseudo_layer, units_);
      step.rules = drawn_rules<T>(p_, layer, d);
      step.t = t;
    }
    if (wide_.used()) return wide_.step(launcher_, args);
    launcher_.step(stack_.plan.cell_tile, Launcher::gate_columns(units_), args);
  }

  // ---- layer normalisation ----
  T* pre(int layer, int d) const { return input_.tabled(layer) ? normed_[d] : input_.start(d); }

  void normalise_input(int layer, int d) const {
    const int64_t pseudo_layer = layer * p_.directions + d;
    const LayerWeights& w = p_.weights[pseudo_layer];
    S* saved_rows = stack_.gates(pseudo_layer);
    NormRowsArgs<S> args{};
    args.from = input_.start(d);
    args.index = input_.start_index(layer);
    args.to = pre(layer, d);
    args.gain = static_cast<const S*>(w.norm_ih);
    args.bias = input_.bias(pseudo_layer);
    args.saved = saved_rows ? saved_rows + kSavedOfInput * units_ : nullptr;
    args.saved_stride = kSavedWithNorm * units_;
    args.units = int(units_);
    stack_.run_kernel(norm_rows_kernel<S>, dim3(unsigned(p_.rows)), kRowThreads, kNormShared<T>,
                      args);
  }

  void advance_normed(int layer, int64_t s) const {
    StepArgs<GateSumsStep<S>> product{};
    NormForwardArgs<S> args{};
    for (int d = 0; d < p_.directions; ++d) {
      const int64_t t = stack_.step_of(s, d), pseudo_layer = layer * p_.directions + d;
      const int count = product.active[d] = stack_.active(t);
      S *h = h_[s % 2] + d * p_.batch * h_stride_, *next = h_[(s + 1) % 2] + (h - h_[s % 2]);
      product.operands[d] = Launcher::operands(h, h_stride_, count, hh_[d], h_stride_);
      product.step[d].width = int(4 * units_);
      product.step[d].to = z_[d];
      const LayerWeights& w = p_.weights[pseudo_layer];
      NormForwardStep<S>& step = args.step[d];
      step.active = count;
      step.entered = stack_.active(Stack<S>::before(t, d));
      step.staying = stack_.active(Stack<S>::after(t, d));
      step.units = int(units_);
      step.first = stack_.first[t];
      step.t = t;
      step.z = z_[d];
      step.pre = pre(layer, d);
      step.gains = norm_gains<S>(w);
      step.c0 = stack_.states(p_.c0, pseudo_layer, units_);
      step.h_before = h;
      step.c = c_[d];
      step.scratch = scratch_[d];
      step.h = next;
      step.y = output(layer, t, d);
      step.saved = stack_.gates(pseudo_layer);
      step.cell_states = stack_.cell_states(pseudo_layer);
      step.h_n = stack_.states(f_.h_n, pseudo_layer, out_);
      step.c_n = stack_.states(f_.c_n, pseudo_layer, units_);
      step.h_stride = h_stride_;
      step.y_stride = stack_.output_width;
      step.rules = drawn_rules<T>(p_, layer, d);
    }
    launcher_.step(stack_.plan.cell_tile, 4 * units_, product);
    launcher_.run_kernel(norm_forward_kernel<S>, sequence_grid(product.active, p_.directions),
                         kRowThreads, kNormShared<T>, args);
  }

  void project(int layer, int64_t s) const {
    StepArgs<ProjectionStep<S>> args{};
    for (int d = 0; d < p_.directions; ++d) {
      const int64_t t = stack_.step_of(s, d), pseudo_layer = layer * p_.directions + d;
      const int count = args.active[d] = stack_.active(t);
      args.operands[d] =
          Launcher::operands(unprojected_ + d * p_.batch * unprojected_stride_, unprojected_stride_,
                             count, hr_[d], unprojected_stride_);
      ProjectionStep<S>& step = args.step[d];
      step.width = int(out_);
      step.staying = stack_.active(Stack<S>::after(t, d));
      step.h = h_[(s + 1) % 2] + d * p_.batch * h_stride_;
      step.h_stride = h_stride_;
      step.y_stride = stack_.output_width;
      step.y = output(layer, t, d);
      step.h_n = stack_.states(f_.h_n, pseudo_layer, out_);
    }
    launcher_.step(stack_.plan.projection_tile, out_, args);
  }

  S* output(int layer, int64_t t, int d) const {
    return stack_.layer_output(layer) + stack_.first[t] * stack_.output_width + d * out_;
  }

  const Forward& f_;
  Stack<S> stack_;
  InputPart<S> input_;
  Launcher launcher_;
  WideLauncher<S, kTensor> wide_;
  const Problem& p_;
  const int64_t units_, out_, h_stride_, unprojected_stride_;
  S *h_[2], *unprojected_, *hh_[2], *hr_[2];
  T* c_[2];
  T *z_[2], *scratch_[2], *normed_[2];  // layer normalisation
};

// The entry point of launch.h.
template <class S, bool kTensor>
int64_t run_stepwise_forward(const Forward& f, const Plan& plan, const Context* context) {
  return plan.single_step ? run_pass<SingleStepPass<S>>(f, plan, context)
                          : run_pass<StepwiseForwardPass<S, kTensor>>(f, plan, context);
}

}  // namespace cuda
}  // namespace fastlstm

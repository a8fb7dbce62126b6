// Stepwise forward pass of the stack: host side, one layer after the other.
//
// Per layer: the input's part (input_part.cuh); W_hh packed once; then one launch a step for both
// directions (two with a projection; where the library multiplies, its products besides). h goes
// from step to step through two padded buffers that take turns.
#pragma once

#include "input_part.cuh"
#include "norm_forward.cuh"
#include "step_launcher.cuh"

namespace fastlstm {
namespace cuda {

template <class S, bool kTensor>
class ForwardPass {
  typedef Acc<S> T;
  typedef StepLauncher<S, kTensor> Launcher;

 public:
  ForwardPass(const Forward& f, const Plan& plan, const Context* context)
      : f_(f),
        stack_(f.problem, f.saved, plan, context),
        input_(stack_, f.problem.layers),
        launcher_(stack_,
                  max_of(Launcher::gate_columns(f.problem.hidden_size), f.problem.out_size)),
        p_(stack_.problem),
        units_(p_.hidden_size),
        out_(p_.out_size),
        h_wide_(Launcher::padded(out_)),
        raw_wide_(Launcher::padded(units_)) {
    Arena& arena = stack_.arena;
    for (S*& h : h_) h = arena.template take<S>(p_.directions * p_.batch * h_wide_);
    launcher_.take_operands(hh_, 4 * units_, out_, !p_.layer_norm);
    if (p_.projected) launcher_.take_operands(hr_, out_, units_, false);
    raw_ = arena.template take<S>(p_.projected ? p_.directions * p_.batch * raw_wide_ : 0);
    for (int d = 0; d < p_.directions; ++d) {
      c_[d] = arena.template take<T>(p_.batch * units_);
      if (!p_.layer_norm) continue;
      z_[d] = arena.template take<T>(p_.batch * 4 * units_);
      scratch_[d] = arena.template take<T>(p_.batch * 2 * units_);
      normed_[d] = arena.template take<T>(input_.tabled(0) ? p_.rows * 4 * units_ : 0);
    }
  }

  int64_t workspace() const { return stack_.arena.used(); }

  void run() {
    input_.begin();
    if (p_.projected) stack_.zero(raw_, p_.directions * p_.batch * raw_wide_ * int64_t(sizeof(S)));
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
    input_.multiply_input(layer);
    launcher_.pack_operands(hh_, layer, &CellWeights::w_hh, 4 * units_, out_, out_, 1,
                            !p_.layer_norm);
    if (p_.projected)
      launcher_.pack_operands(hr_, layer, &CellWeights::w_hr, out_, units_, units_, 1, false);
    if (p_.layer_norm)
      for (int d = 0; d < p_.directions; ++d) normalise_input(layer, d);
    // Both buffers: a sequence may enter at any step (packed input, second direction).
    const S* h0 = part<S>(p_.h0, layer, p_.directions * p_.batch * out_);
    const int64_t n = p_.directions * p_.batch;
    stack_.pack(PackArgs<S, S>{{h0, h0},
                               {h_[0], h_[1]},
                               nullptr,
                               out_,
                               1,
                               n,
                               n,
                               h_wide_,
                               int(out_),
                               kAsStored,
                               kAsStored});
  }

  void advance(int layer, int64_t s) const {
    StepArgs<GatesStep<S>> args{};
    for (int d = 0; d < p_.directions; ++d) {
      const int64_t t = stack_.step_of(s, d), cell = layer * p_.directions + d;
      const int count = args.active[d] = stack_.active(t);
      const int64_t h_at = d * p_.batch * h_wide_;
      args.operands[d] = {h_[s % 2] + h_at, hh_[d], h_wide_,
                          h_wide_,          count,  int(h_wide_ * sizeof(S))};
      GatesStep<S>& step = args.step[d];
      step.start = input_.start(d);
      step.index = input_.start_index(layer);
      step.bias = input_.bias(cell);
      step.first = stack_.first[t];
      step.units = int(units_);
      step.entered = stack_.active(Stack<S>::before(t, d));
      step.staying = stack_.active(Stack<S>::after(t, d));
      step.c0 = stack_.states(p_.c0, cell, units_);
      step.c = c_[d];
      step.h = p_.projected ? raw_ + d * p_.batch * raw_wide_ : h_[(s + 1) % 2] + h_at;
      step.h_wide = p_.projected ? raw_wide_ : h_wide_;
      step.y = p_.projected ? nullptr : output(layer, t, d);
      step.y_wide = stack_.output_width;
      step.gates = stack_.gates(cell);
      step.cells = stack_.cells(cell);
      step.h_n = stack_.states(f_.h_n, cell, out_);
      step.c_n = stack_.states(f_.c_n, cell, units_);
      step.rules = drawn_rules<T>(p_, layer, d);
      step.t = t;
      step.h_before = p_.projected ? nullptr : h_[s % 2] + h_at;
    }
    launcher_.step(stack_.plan.gates, Launcher::gate_columns(units_), args);
  }

  // ---- layer normalisation ----
  T* pre(int layer, int d) const { return input_.tabled(layer) ? normed_[d] : input_.start(d); }

  void normalise_input(int layer, int d) const {
    const int64_t cell = layer * p_.directions + d;
    const CellWeights& w = p_.weights[cell];
    S* saved_rows = stack_.gates(cell);
    NormRowsArgs<S> args{};
    args.from = input_.start(d);
    args.index = input_.start_index(layer);
    args.to = pre(layer, d);
    args.gain = static_cast<const S*>(w.norm_ih);
    args.bias = input_.bias(cell);
    args.saved = saved_rows ? saved_rows + 4 * units_ : nullptr;
    args.saved_wide = kSavedWithNorm * units_;
    args.units = int(units_);
    stack_.run_kernel(norm_rows_kernel<S>, dim3(unsigned(p_.rows)), kRowThreads, kNormShared<T>,
                      args);
  }

  void advance_normed(int layer, int64_t s) const {
    StepArgs<ProductStep<S>> product{};
    NormForwardArgs<S> args{};
    for (int d = 0; d < p_.directions; ++d) {
      const int64_t t = stack_.step_of(s, d), cell = layer * p_.directions + d;
      const int count = product.active[d] = stack_.active(t);
      S *h = h_[s % 2] + d * p_.batch * h_wide_, *next = h_[(s + 1) % 2] + (h - h_[s % 2]);
      product.operands[d] = {h, hh_[d], h_wide_, h_wide_, count, int(h_wide_ * sizeof(S))};
      product.step[d] = {int(4 * units_), z_[d]};
      const CellWeights& w = p_.weights[cell];
      NormCell<S>& own = args.cell[d];
      own.active = count;
      own.entered = stack_.active(Stack<S>::before(t, d));
      own.staying = stack_.active(Stack<S>::after(t, d));
      own.units = int(units_);
      own.first = stack_.first[t];
      own.t = t;
      own.z = z_[d];
      own.pre = pre(layer, d);
      own.gains = norm_gains<S>(w);
      own.c0 = stack_.states(p_.c0, cell, units_);
      own.h_before = h;
      own.c = c_[d];
      own.scratch = scratch_[d];
      own.h = next;
      own.y = output(layer, t, d);
      own.saved = stack_.gates(cell);
      own.cells = stack_.cells(cell);
      own.h_n = stack_.states(f_.h_n, cell, out_);
      own.c_n = stack_.states(f_.c_n, cell, units_);
      own.h_wide = h_wide_;
      own.y_wide = stack_.output_width;
      own.rules = drawn_rules<T>(p_, layer, d);
    }
    launcher_.step(stack_.plan.gates, 4 * units_, product);
    stack_.run_kernel(norm_forward_kernel<S>, sequence_grid(product.active, p_.directions),
                      kRowThreads, kNormShared<T>, args);
  }

  void project(int layer, int64_t s) const {
    StepArgs<ProjectStep<S>> args{};
    for (int d = 0; d < p_.directions; ++d) {
      const int64_t t = stack_.step_of(s, d), cell = layer * p_.directions + d;
      const int count = args.active[d] = stack_.active(t);
      args.operands[d] = {raw_ + d * p_.batch * raw_wide_, hr_[d], raw_wide_, raw_wide_, count,
                          int(raw_wide_ * sizeof(S))};
      args.step[d] = {int(out_),
                      stack_.active(Stack<S>::after(t, d)),
                      h_[(s + 1) % 2] + d * p_.batch * h_wide_,
                      h_wide_,
                      stack_.output_width,
                      output(layer, t, d),
                      stack_.states(f_.h_n, cell, out_)};
    }
    launcher_.step(stack_.plan.project, out_, args);
  }

  S* output(int layer, int64_t t, int d) const {
    return stack_.layer_output(layer) + stack_.first[t] * stack_.output_width + d * out_;
  }

  const Forward& f_;
  Stack<S> stack_;
  InputPart<S> input_;
  Launcher launcher_;
  const Problem& p_;
  const int64_t units_, out_, h_wide_, raw_wide_;
  S *h_[2], *raw_, *hh_[2], *hr_[2];
  T* c_[2];
  T *z_[2], *scratch_[2], *normed_[2];  // layer normalisation
};

}  // namespace cuda
}  // namespace fastlstm

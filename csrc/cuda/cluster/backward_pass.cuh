// The backward pass in clusters on the host, from the last layer on: for each layer one launch for
// all steps, or one for each chunk of steps from the last on (layers.cuh).
#pragma once

#include "../shared/gradient_part.cuh"
#include "../shared/patience.h"
#include "backward.cuh"
#include "shapes.h"

namespace fastlstm {
namespace cuda {

// Operand: of the steps' products; float is full fp32.
template <class S, class Operand = MmaElement<S>>
class ClusterBackwardPass {
  typedef Acc<S> T;

 public:
  ClusterBackwardPass(const Backward& f, const Plan& plan, const Context* context)
      : f_(f),
        stack_(f.problem, f.saved, plan, context),
        gradients_(f, stack_, round_up(4 * f.problem.hidden_size, 16 / int64_t(sizeof(S))), 0),
        p_(stack_.problem),
        units_(p_.hidden_size) {
    for (int layer = 0; stack_.at_once() && layer < p_.layers; ++layer) {
      sums_.push_back(stack_.arena.template take<T>(p_.batch * units_));
      dc_.push_back(stack_.arena.template take<T>(p_.batch * units_));
    }
  }

  int64_t workspace() const { return stack_.arena.used(); }

  void run() {
    gradients_.run_layers([&](int layer, const StepRange& steps) { go_back(layer, steps); });
  }

 private:
  void go_back(int layer, const StepRange& steps) const {
    ClusterBackwardArgs<S> args{};
    args.units = int(units_);
    args.steps = stack_.step_rows(steps);
    args.going_on = steps.end < p_.steps ? stack_.active(steps.end) : 0;
    args.hands_on = steps.begin > 0;
    args.output_stride = stack_.output_width;
    args.dgates_stride = gradients_.dgates_stride();
    args.limit = wait_limit();
    args.bulk = args.pairs = true;
    for (int d = 0; d < p_.directions; ++d) fill(args, args.direction[d], layer, d);
    if (stack_.at_once()) hand_on(args.direction[0], layer, steps);
    if constexpr (std::is_same_v<Operand, float>)
      start_fp32(args);
    else
      start_by_shape(args);
  }

  void start_fp32(ClusterBackwardArgs<S>& args) const {
    const int ctas = stack_.plan.ctas;
    const bool two = fp32_sequences(ctas, stack_.plan.sequences, false) == 16;
    if (ctas == 1)
      return stack_.plan.sequences <= 4 ? start<ClusterBackwardFp32<64, 1, 1, 4>>(args)
                                        : start<ClusterBackwardFp32<64, 1, 1>>(args);
    if (ctas == 2) return start<ClusterBackwardFp32<32, 2, 1>>(args);
    if (ctas == 4)
      return two ? start<ClusterBackwardFp32<32, 4, 2>>(args)
                 : start<ClusterBackwardFp32<32, 4, 1>>(args);
    if (ctas == 8)
      return two ? start<ClusterBackwardFp32<32, 8, 2>>(args)
                 : start<ClusterBackwardFp32<32, 8, 1>>(args);
    start<ClusterBackwardFp32<32, 16, 1>>(args);
  }

  void start_by_shape(ClusterBackwardArgs<S>& args) const {
    const ClusterShape shape =
        backward_shape({stack_.plan.ctas, stack_.plan.units, stack_.plan.sequences}, sizeof(S));
    const bool two = shape.sequences == 16, four = shape.sequences == 4;
    if constexpr (sizeof(S) == 2) {
      if (shape.ctas == 1 && shape.units == 128)
        return four ? start<128, 1, 1, 4>(args) : start<128, 1, 1>(args);
      if (shape.units == 48) return start<48, 16, 1>(args);
      if (shape.ctas == 16) return two ? start<32, 16, 2>(args) : start<32, 16, 1>(args);
    }
    if constexpr (sizeof(S) == 4)
      if (shape.ctas == 16) return start<32, 16, 1>(args);
    if (shape.ctas == 1 && shape.units == 64)
      return four ? start<64, 1, 1, 4>(args) : start<64, 1, 1>(args);
    if (shape.ctas == 1) return start<32, 1, 1>(args);
    if (shape.ctas == 2) return start<32, 2, 1>(args);
    if (shape.ctas == 4) return two ? start<32, 4, 2>(args) : start<32, 4, 1>(args);
    two ? start<32, 8, 2>(args) : start<32, 8, 1>(args);
  }

  template <int kUnits, int kCtas, int kGroups, int kSequences = 8>
  void start(ClusterBackwardArgs<S>& args) const {
    start<ClusterBackwardShape<S, kUnits, kCtas, kGroups, kSequences>>(args);
  }
  template <class Shape>
  void start(ClusterBackwardArgs<S>& args) const {
    args.clusters = int(blocks_of(args.steps.batch, Shape::kSequences * Shape::kGroups));
    launch_clusters(cluster_backward_kernel<Shape>,
                    unsigned(args.clusters * p_.directions * Shape::kCtas), Shape::kCtas,
                    Shape::kThreads, Shape::kSharedBytes, stack_.stream(), args);
  }

  void fill(ClusterBackwardArgs<S>& args, ClusterBackwardDirection<S>& direction, int layer,
            int d) const {
    const int pseudo_layer = layer * p_.directions + d;
    direction.w_hh = static_cast<const S*>(p_.weights[pseudo_layer].w_hh);
    if (layer < p_.layers - 1)
      direction.upper_input = gradients_.upper_input() + d * units_;
    else if (f_.grad_output)
      direction.grad_output = static_cast<const S*>(f_.grad_output) + d * units_;
    direction.grad_h_n = stack_.states(f_.grad_h_n, pseudo_layer, units_);
    direction.grad_c_n = stack_.states(f_.grad_c_n, pseudo_layer, units_);
    direction.c0 = stack_.states(p_.c0, pseudo_layer, units_);
    direction.gates = stack_.gates(pseudo_layer);
    direction.cell_states = stack_.cell_states(pseudo_layer);
    direction.grad_cell_states = part<T>(f_.grad_cell_states, pseudo_layer, p_.rows * units_);
    direction.dgates = gradients_.dgates(d);
    direction.grad_c0 = stack_.states(f_.grad_c0, pseudo_layer, units_);
    direction.dh_zoneout = gradients_.dh_zoneout(d);
    direction.rules = drawn_rules<T>(p_, layer, d);
    direction.direction = d;

    auto aligned = [](const void* memory, uintptr_t bytes) {
      return reinterpret_cast<uintptr_t>(memory) % bytes == 0;
    };
    args.bulk = args.bulk && units_ * int64_t(sizeof(S)) % 16 == 0 &&
                aligned(direction.gates, 16) && aligned(direction.cell_states, 16) &&
                aligned(direction.grad_output, 16) && aligned(direction.grad_cell_states, 16);
    args.pairs = args.pairs && units_ % 2 == 0 && aligned(direction.w_hh, 2 * sizeof(S));
  }

  // What goes from chunk to chunk.
  void hand_on(ClusterBackwardDirection<S>& direction, int layer, const StepRange& steps) const {
    direction.sums = sums_[layer];
    direction.dc = dc_[layer];
    if (steps.begin > 0)
      direction.c_before = direction.cell_states + stack_.first[steps.begin - 1] * units_;
  }

  const Backward& f_;
  Stack<S> stack_;
  GradientPart<S> gradients_;
  const Problem& p_;
  const int64_t units_;
  std::vector<T*> sums_, dc_;  // (B, H) for each layer, between its chunks
};

}  // namespace cuda
}  // namespace fastlstm

// The forward pass in clusters on the host: for each layer the input part, then one launch for all
// steps of all directions, or for each chunk of steps (layers.cuh) a product and a launch. From
// chunk to chunk h goes through h_n and c, in fp32, through memory of its own. Groups of sequences
// beyond those that are resident at once are further clusters of the same grid, the longest first.
#pragma once

#include "../shared/input_part.cuh"
#include "../shared/layers.cuh"
#include "../shared/patience.h"
#include "forward.cuh"
#include "shapes.h"

namespace fastlstm {
namespace cuda {

// Calls f with the ClusterForwardShape that the plan names.
template <class S, int kIndex = 0, class Use>
void with_forward_shape(const Plan& plan, Use&& use) {
  if constexpr (kIndex < kForwardClusterCount) {
    constexpr ForwardCluster kCluster = kForwardClusters[kIndex];
    if constexpr (runs_forward(kCluster, sizeof(S))) {
      if (plan.ctas == kCluster.ctas && plan.units == kCluster.units) {
        // One CTA has no exchange that a second group could hide: it multiplies 16 sequences.
        constexpr int kGroups = kCluster.ctas == 1 ? 1 : 2;
        if constexpr (!streams_weights(kCluster.ctas, kCluster.units, sizeof(S)))
          if (plan.sequences > 8)
            return use(
                ClusterForwardShape<S, kCluster.ctas, kCluster.units, 16 / kGroups, kGroups>());
        if constexpr (runs_four(kCluster.ctas, kCluster.units))
          if (plan.sequences <= 4)
            return use(ClusterForwardShape<S, kCluster.ctas, kCluster.units, 4>());
        return use(ClusterForwardShape<S, kCluster.ctas, kCluster.units, 8>());
      }
    }
    with_forward_shape<S, kIndex + 1>(plan, use);
  }
}

// ... or with the ClusterForwardFp32.
template <int kIndex = 0, class Use>
void with_fp32_forward_shape(const Plan& plan, Use&& use) {
  if constexpr (kIndex < kFp32ClusterCount) {
    constexpr int kCtas = kFp32Clusters[kIndex].ctas, kUnits = kFp32Clusters[kIndex].units;
    if (plan.ctas != kCtas || plan.units != kUnits)
      return with_fp32_forward_shape<kIndex + 1>(plan, use);
    if constexpr (runs_four(kCtas, kUnits))
      if (plan.sequences <= 4) return use(ClusterForwardFp32<kCtas, kUnits, 4>());
    if (plan.sequences <= 8)
      use(ClusterForwardFp32<kCtas, kUnits, 8>());
    else
      use(ClusterForwardFp32<kCtas, kUnits, fp32_sequences(kCtas, 16, true)>());
  }
}

// Operand: of the steps' products; float is full fp32.
template <class S, class Operand = MmaElement<S>>
class ClusterForwardPass {
 public:
  ClusterForwardPass(const Forward& f, const Plan& plan, const Context* context)
      : f_(f),
        stack_(f.problem, f.saved, plan, context),
        input_(stack_, f.problem.layers, {plan.ctas, plan.units}),
        p_(stack_.problem) {
    for (int layer = 0; stack_.at_once() && layer < p_.layers; ++layer)
      c_.push_back(stack_.arena.template take<float>(p_.batch * p_.hidden_size));
  }

  int64_t workspace() const { return stack_.arena.used(); }

  void run() {
    input_.begin();
    for_layers(stack_, Pass::forward, [&](int layer, const StepRange& steps) {
      input_.multiply_input(layer, steps);
      advance(layer, steps);
    });
  }

 private:
  void advance(int layer, const StepRange& steps) const {
    ClusterForwardArgs<S> args{};
    for (int d = 0; d < p_.directions; ++d) args.direction[d] = direction(layer, d, steps);
    args.steps = stack_.step_rows(steps);
    args.index = input_.start_index(layer);
    args.start_row = input_.start_row();
    args.directions = p_.directions;
    args.hidden_size = int(p_.hidden_size);
    args.y_stride = stack_.output_width;
    args.limit = wait_limit();
    auto start = [&](auto shape) {
      typedef decltype(shape) Shape;
      const unsigned ctas = unsigned(p_.directions) *
                            blocks_of(args.steps.batch, Shape::kGroups * Shape::kSequences) *
                            unsigned(Shape::kCtas);
      if (Shape::kCtas == 1)
        launch(cluster_forward_kernel<Shape>, dim3(ctas), Shape::kThreads, Shape::kSharedBytes,
               stack_.stream(), args);
      else
        launch_clusters(cluster_forward_kernel<Shape>, ctas, Shape::kCtas, Shape::kThreads,
                        Shape::kSharedBytes, stack_.stream(), args);
    };
    if constexpr (std::is_same_v<Operand, float>)
      with_fp32_forward_shape(stack_.plan, start);
    else
      with_forward_shape<S>(stack_.plan, start);
  }

  ClusterForwardDirection<S> direction(int layer, int d, const StepRange& steps) const {
    const int64_t pseudo_layer = layer * p_.directions + d, units = p_.hidden_size;
    ClusterForwardDirection<S> result{};
    result.start = input_.start(d);
    result.w_hh = static_cast<const S*>(p_.weights[pseudo_layer].w_hh);
    result.bias = input_.bias(pseudo_layer);
    result.h0 = stack_.states(p_.h0, pseudo_layer, units);
    result.c0 = stack_.states(p_.c0, pseudo_layer, units);
    result.y = stack_.layer_output(layer) + d * units;
    result.h_n = stack_.states(f_.h_n, pseudo_layer, units);
    result.c_n = stack_.states(f_.c_n, pseudo_layer, units);
    result.gates = stack_.gates(pseudo_layer);
    result.cell_states = stack_.cell_states(pseudo_layer);
    result.rules = drawn_rules<float>(p_, layer, d);
    if (steps.begin > 0) {
      result.h0 = result.h_n;
      result.c_before = c_[layer];
    }
    if (steps.end < p_.steps) result.c_after = c_[layer];
    return result;
  }

  const Forward& f_;
  Stack<S> stack_;
  InputPart<S> input_;
  const Problem& p_;
  std::vector<float*> c_;  // (B, H) for each layer, between its chunks
};

}  // namespace cuda
}  // namespace fastlstm

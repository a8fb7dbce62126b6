// The forward pass in clusters on the host, one layer after the other: the input part, then one
// launch for all steps of all directions. Groups of sequences beyond those that are resident at
// once are further clusters of the same grid, the longest first.
#pragma once

#include "../shared/input_part.cuh"
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
        if (plan.sequences <= 8)
          use(ClusterForwardShape<S, kCluster.ctas, kCluster.units, 1>());
        else
          use(ClusterForwardShape<S, kCluster.ctas, kCluster.units, 2>());
        return;
      }
    }
    with_forward_shape<S, kIndex + 1>(plan, use);
  }
}

template <class S>
class ClusterForwardPass {
 public:
  ClusterForwardPass(const Forward& f, const Plan& plan, const Context* context)
      : f_(f),
        stack_(f.problem, f.saved, plan, context),
        input_(stack_, f.problem.layers, {plan.ctas, plan.units}),
        p_(stack_.problem) {}

  int64_t workspace() const { return stack_.arena.used(); }

  void run() const {
    input_.begin();
    for (int layer = 0; layer < p_.layers; ++layer) {
      input_.multiply_input(layer);
      advance(layer);
    }
  }

 private:
  void advance(int layer) const {
    ClusterForwardArgs<S> args{};
    for (int d = 0; d < p_.directions; ++d) args.direction[d] = direction(layer, d);
    args.steps = stack_.map.steps;
    args.index = input_.start_index(layer);
    args.directions = p_.directions;
    args.hidden_size = int(p_.hidden_size);
    args.y_stride = stack_.output_width;
    args.limit = wait_limit();
    with_forward_shape<S>(stack_.plan, [&](auto shape) {
      typedef decltype(shape) Shape;
      const unsigned ctas =
          unsigned(p_.directions) * blocks_of(p_.batch, Shape::kSequences) * unsigned(Shape::kCtas);
      if (Shape::kCtas == 1)
        launch(cluster_forward_kernel<Shape>, dim3(ctas), Shape::kThreads, Shape::kSharedBytes,
               stack_.stream(), args);
      else
        launch_clusters(cluster_forward_kernel<Shape>, ctas, Shape::kCtas, Shape::kThreads,
                        Shape::kSharedBytes, stack_.stream(), args);
    });
  }

  ClusterForwardDirection<S> direction(int layer, int d) const {
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
    return result;
  }

  const Forward& f_;
  Stack<S> stack_;
  InputPart<S> input_;
  const Problem& p_;
};

template <class S>
int64_t cluster_forward_pass(const Forward& f, const Plan& plan, const Context* context) {
  const ClusterForwardPass<S> pass(f, plan, context);
  if (context) pass.run();
  return pass.workspace();
}

}  // namespace cuda
}  // namespace fastlstm

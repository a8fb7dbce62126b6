#include "launch.h"

namespace fastlstm {
namespace cuda {
namespace {

// By type: bf16, f16, tf32, fp32 without tf32.
const Passes* const kStepwise[] = {&kStepwiseBf16, &kStepwiseF16, &kStepwiseTf32, &kStepwiseF32};
const Passes kCluster[] = {{cluster_forward_bf16, cluster_backward_bf16},
                           {cluster_forward_f16, cluster_backward_f16},
                           {cluster_forward_tf32, cluster_backward_tf32},
                           {cluster_forward_f32, cluster_backward_f32}};
const Passes kGrid[] = {{grid_forward_bf16, grid_backward_bf16},
                        {grid_forward_f16, grid_backward_f16},
                        {grid_forward_tf32, grid_backward_tf32},
                        {grid_forward_f32, grid_backward_f32}};

const Passes& passes(const Problem& p, const Plan& plan) {
  if (p.dtype == DType::f64) return kStepwiseF64;
  const int type = p.dtype == DType::bf16  ? 0
                   : p.dtype == DType::f16 ? 1
                   : plan.tensor_cores     ? 2
                                           : 3;
  switch (plan.algorithm) {
    case Algorithm::cluster: return kCluster[type];
    case Algorithm::grid: return kGrid[type];
    default: return *kStepwise[type];
  }
}

}  // namespace

int64_t forward_workspace(const Forward& f, const Plan& plan) {
  return passes(f.problem, plan).forward(f, plan, nullptr);
}
void forward(const Forward& f, const Plan& plan, const Context& context) {
  passes(f.problem, plan).forward(f, plan, &context);
}
int64_t backward_workspace(const Backward& f, const Plan& plan) {
  return passes(f.problem, plan).backward(f, plan, nullptr);
}
void backward(const Backward& f, const Plan& plan, const Context& context) {
  passes(f.problem, plan).backward(f, plan, &context);
}

}  // namespace cuda
}  // namespace fastlstm

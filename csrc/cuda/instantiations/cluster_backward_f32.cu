#include "../cluster/backward_pass.cuh"

namespace fastlstm {
namespace cuda {

int64_t cluster_backward_f32(const Backward& f, const Plan& plan, const Context* context) {
  return run_pass<ClusterBackwardPass<float, float>>(f, plan, context);
}

}  // namespace cuda
}  // namespace fastlstm

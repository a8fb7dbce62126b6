#include "../cluster/backward_pass.cuh"

namespace fastlstm {
namespace cuda {

int64_t cluster_backward_bf16(const Backward& f, const Plan& plan, const Context* context) {
  return run_pass<ClusterBackwardPass<Bf16>>(f, plan, context);
}

}  // namespace cuda
}  // namespace fastlstm

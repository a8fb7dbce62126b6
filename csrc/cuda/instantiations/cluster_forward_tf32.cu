#include "../cluster/forward_pass.cuh"

namespace fastlstm {
namespace cuda {

int64_t cluster_forward_tf32(const Forward& f, const Plan& plan, const Context* context) {
  return run_pass<ClusterForwardPass<float>>(f, plan, context);
}

}  // namespace cuda
}  // namespace fastlstm

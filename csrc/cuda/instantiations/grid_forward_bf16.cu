#include "../grid/forward_pass.cuh"

namespace fastlstm {
namespace cuda {

int64_t grid_forward_bf16(const Forward& f, const Plan& plan, const Context* context) {
  return run_pass<GridForwardPass<Bf16>>(f, plan, context);
}

}  // namespace cuda
}  // namespace fastlstm

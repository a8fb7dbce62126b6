#include "../grid/forward_pass.cuh"

namespace fastlstm {
namespace cuda {

int64_t grid_forward_f32(const Forward& f, const Plan& plan, const Context* context) {
  return run_pass<GridForwardPass<float, float>>(f, plan, context);
}

}  // namespace cuda
}  // namespace fastlstm

#include "../grid/backward_pass.cuh"

namespace fastlstm {
namespace cuda {

int64_t grid_backward_f32(const Backward& f, const Plan& plan, const Context* context) {
  return run_pass<GridBackwardPass<float, float>>(f, plan, context);
}

}  // namespace cuda
}  // namespace fastlstm

#include "../stepwise/backward_pass.cuh"
#include "../stepwise/forward_pass.cuh"

namespace fastlstm {
namespace cuda {

const Passes kStepwiseF32 = {run_stepwise_forward<float, false>,
                             run_pass<StepwiseBackwardPass<float, false>, Backward>};

}  // namespace cuda
}  // namespace fastlstm

#include "../stepwise/backward_pass.cuh"
#include "../stepwise/forward_pass.cuh"

namespace fastlstm {
namespace cuda {

const Passes kStepwiseF16 = {run_stepwise_forward<F16, true>,
                             run_pass<StepwiseBackwardPass<F16, true>, Backward>};

}  // namespace cuda
}  // namespace fastlstm

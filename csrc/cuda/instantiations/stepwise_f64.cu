#include "../stepwise/backward_pass.cuh"
#include "../stepwise/forward_pass.cuh"

namespace fastlstm {
namespace cuda {

const Passes kStepwiseF64 = {run_stepwise_forward<double, false>,
                             run_pass<StepwiseBackwardPass<double, false>, Backward>};

}  // namespace cuda
}  // namespace fastlstm

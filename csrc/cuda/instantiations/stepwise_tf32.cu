#include "../stepwise/backward_pass.cuh"
#include "../stepwise/forward_pass.cuh"

namespace fastlstm {
namespace cuda {

const Passes kStepwiseTf32 = {run_stepwise_forward<float, true>,
                              run_pass<StepwiseBackwardPass<float, true>, Backward>};

}  // namespace cuda
}  // namespace fastlstm

#include "../stepwise/backward_pass.cuh"
#include "../stepwise/forward_pass.cuh"

namespace fastlstm {
namespace cuda {

const Passes kStepwiseBf16 = {run_stepwise_forward<Bf16, true>,
                              run_pass<StepwiseBackwardPass<Bf16, true>, Backward>};

}  // namespace cuda
}  // namespace fastlstm

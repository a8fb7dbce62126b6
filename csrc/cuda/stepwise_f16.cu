#include "backward.cuh"
#include "forward.cuh"

namespace fastlstm {
namespace cuda {

const Passes kStepwiseF16 = {run_pass<ForwardPass<F16, true>, Forward>,
                             run_pass<BackwardPass<F16, true>, Backward>};

}  // namespace cuda
}  // namespace fastlstm

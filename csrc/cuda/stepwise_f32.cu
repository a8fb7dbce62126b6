#include "backward.cuh"
#include "forward.cuh"

namespace fastlstm {
namespace cuda {

const Passes kStepwiseF32 = {run_pass<ForwardPass<float, false>, Forward>,
                             run_pass<BackwardPass<float, false>, Backward>};

}  // namespace cuda
}  // namespace fastlstm

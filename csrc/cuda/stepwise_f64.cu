#include "backward.cuh"
#include "forward.cuh"

namespace fastlstm {
namespace cuda {

const Passes kStepwiseF64 = {run_pass<ForwardPass<double, false>, Forward>,
                             run_pass<BackwardPass<double, false>, Backward>};

}  // namespace cuda
}  // namespace fastlstm

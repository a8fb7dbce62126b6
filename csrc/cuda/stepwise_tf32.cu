#include "backward.cuh"
#include "forward.cuh"

namespace fastlstm {
namespace cuda {

const Passes kStepwiseTf32 = {run_pass<ForwardPass<float, true>, Forward>,
                              run_pass<BackwardPass<float, true>, Backward>};

}  // namespace cuda
}  // namespace fastlstm

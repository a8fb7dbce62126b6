#include "backward.cuh"
#include "forward.cuh"

namespace fastlstm {
namespace cuda {

const Passes kStepwiseBf16 = {run_pass<ForwardPass<Bf16, true>, Forward>,
                              run_pass<BackwardPass<Bf16, true>, Backward>};

}  // namespace cuda
}  // namespace fastlstm

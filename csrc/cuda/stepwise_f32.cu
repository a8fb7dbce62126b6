#include "backward.cuh"
#include "forward.cuh"

namespace fastlstm {
namespace cuda {

const Passes kStepwiseF32 = {stepwise_forward<float, false>, stepwise_backward<float, false>};

}  // namespace cuda
}  // namespace fastlstm

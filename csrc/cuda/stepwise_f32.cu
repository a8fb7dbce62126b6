#include "backward.cuh"
#include "forward.cuh"

namespace fastlstm {
namespace cuda {

const Stepwise kStepwiseF32 = {stepwise_forward<float, false>, stepwise_backward<float, false>};

}  // namespace cuda
}  // namespace fastlstm

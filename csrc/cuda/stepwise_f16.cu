#include "backward.cuh"
#include "forward.cuh"

namespace fastlstm {
namespace cuda {

const Passes kStepwiseF16 = {stepwise_forward<F16, true>, stepwise_backward<F16, true>};

}  // namespace cuda
}  // namespace fastlstm

#include "backward.cuh"
#include "forward.cuh"

namespace fastlstm {
namespace cuda {

const Stepwise kStepwiseF16 = {stepwise_forward<F16, true>, stepwise_backward<F16, true>};

}  // namespace cuda
}  // namespace fastlstm

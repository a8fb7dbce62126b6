#include "backward.cuh"
#include "forward.cuh"

namespace fastlstm {
namespace cuda {

const Passes kStepwiseBf16 = {stepwise_forward<Bf16, true>, stepwise_backward<Bf16, true>};

}  // namespace cuda
}  // namespace fastlstm

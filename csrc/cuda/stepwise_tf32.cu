#include "backward.cuh"
#include "forward.cuh"

namespace fastlstm {
namespace cuda {

const Passes kStepwiseTf32 = {stepwise_forward<float, true>, stepwise_backward<float, true>};

}  // namespace cuda
}  // namespace fastlstm

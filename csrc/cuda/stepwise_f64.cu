#include "backward.cuh"
#include "forward.cuh"

namespace fastlstm {
namespace cuda {

const Passes kStepwiseF64 = {stepwise_forward<double, false>, stepwise_backward<double, false>};

}  // namespace cuda
}  // namespace fastlstm

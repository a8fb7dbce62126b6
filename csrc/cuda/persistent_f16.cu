#include "persistent_backward_host.cuh"
#include "persistent_host.cuh"

namespace fastlstm {
namespace cuda {

const Passes kPersistentF16 = {persistent_forward_pass<F16>, persistent_backward_pass<F16>};

}  // namespace cuda
}  // namespace fastlstm

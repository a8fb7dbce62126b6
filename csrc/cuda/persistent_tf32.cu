#include "persistent_backward_host.cuh"
#include "persistent_host.cuh"

namespace fastlstm {
namespace cuda {

const Passes kPersistentTf32 = {persistent_forward_pass<float>, persistent_backward_pass<float>};

}  // namespace cuda
}  // namespace fastlstm

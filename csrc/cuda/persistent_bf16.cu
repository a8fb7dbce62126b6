#include "persistent_backward_host.cuh"
#include "persistent_host.cuh"

namespace fastlstm {
namespace cuda {

const Passes kPersistentBf16 = {persistent_forward_pass<Bf16>, persistent_backward_pass<Bf16>};

}  // namespace cuda
}  // namespace fastlstm

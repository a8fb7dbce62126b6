#include "../generate/host.cuh"

namespace fastlstm {
namespace cuda {

void generate_f16(const Generate& g, const GeneratePlan& plan, void* stream, void* workspace) {
  generate_text<F16>(g, plan, stream, workspace);
}

}  // namespace cuda
}  // namespace fastlstm

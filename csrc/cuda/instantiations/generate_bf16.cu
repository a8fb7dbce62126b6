#include "../generate/host.cuh"

namespace fastlstm {
namespace cuda {

void generate_bf16(const Generate& g, const GeneratePlan& plan, void* stream, void* workspace) {
  generate_text<Bf16>(g, plan, stream, workspace);
}

}  // namespace cuda
}  // namespace fastlstm

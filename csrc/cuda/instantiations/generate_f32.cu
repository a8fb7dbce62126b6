#include "../generate/host.cuh"

namespace fastlstm {
namespace cuda {

void generate_f32(const Generate& g, const GeneratePlan& plan, void* stream, void* workspace) {
  generate_text<float>(g, plan, stream, workspace);
}

}  // namespace cuda
}  // namespace fastlstm

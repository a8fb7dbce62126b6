#include "generate_launch.h"

#include <stdexcept>

namespace fastlstm {
namespace cuda {

GenerateModel generate_model(const Generate& g) {
  const int bytes = g.storage == Storage::f32 ? 4 : 2;
  return {bytes, g.hidden_size, g.layers, g.vocabulary, g.batch};
}

int64_t generate_workspace(const GeneratePlan& plan) {
  return plan.active * plan.layout.exchange_bytes;
}

void generate(const Generate& g, const GeneratePlan& plan, void* stream, void* workspace) {
  if (g.projected || g.cell.zoneout_h > 0)
    throw std::invalid_argument(
        "fastlstm: text is not drawn on a GPU with projections or zoneout of h");
  switch (g.storage) {
    case Storage::bf16:
    case Storage::int8: return generate_bf16(g, plan, stream, workspace);
    case Storage::f16: return generate_f16(g, plan, stream, workspace);
    case Storage::f32: return generate_f32(g, plan, stream, workspace);
    default: throw std::invalid_argument("fastlstm: text is not drawn on a GPU in float64");
  }
}

}  // namespace cuda
}  // namespace fastlstm

// What the op layer calls to draw text on a GPU: whether a model fits, and the launch.
#pragma once

#include "generate.h"
#include "generate_plan.h"

namespace fastlstm {
namespace cuda {

GenerateModel generate_model(const Generate& g);

// The workspace that a plan's launches take, in bytes.
int64_t generate_workspace(const GeneratePlan& plan);

// Everything that `g` points at is on the GPU, but for the seed and what g.weights itself is. The
// weights are not packed into words: one column an element.
void generate(const Generate& g, const GeneratePlan& plan, void* stream, void* workspace);

// By the type of weights and states on chip.
void generate_bf16(const Generate& g, const GeneratePlan& plan, void* stream, void* workspace);
void generate_f16(const Generate& g, const GeneratePlan& plan, void* stream, void* workspace);
void generate_f32(const Generate& g, const GeneratePlan& plan, void* stream, void* workspace);

}  // namespace cuda
}  // namespace fastlstm

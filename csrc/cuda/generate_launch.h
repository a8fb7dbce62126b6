// What the operators call to draw text on a GPU: the plan's input, the workspace and the launch.
#pragma once

#include "generate.h"
#include "generate_plan.h"

namespace fastlstm {
namespace cuda {

GenerateModel generate_model(const Generate& g);

// The bytes of workspace for a plan's launches.
int64_t generate_workspace(const GeneratePlan& plan);

// All that `g` points at is on the GPU, but for the seed and the array g.weights. Weights have one
// column to an element.
void generate(const Generate& g, const GeneratePlan& plan, void* stream, void* workspace);

// By the type of weights and states on chip.
void generate_bf16(const Generate& g, const GeneratePlan& plan, void* stream, void* workspace);
void generate_f16(const Generate& g, const GeneratePlan& plan, void* stream, void* workspace);
void generate_f32(const Generate& g, const GeneratePlan& plan, void* stream, void* workspace);

}  // namespace cuda
}  // namespace fastlstm

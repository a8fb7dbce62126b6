// One draw from the distribution that logits describe.
#pragma once

#include "../generate.h"

namespace fastlstm {

// The token that row b draws in step `step` of the call. Overwrites its logits (vocabulary of
// them); order is scratch of as many elements. NaN among the logits: some token.
// fastlstm/generation/draw.py does the same in torch, for models that do not run here.
int64_t draw(const Generate& g, double* logits, int64_t* order, int64_t step, int64_t b);

}  // namespace fastlstm

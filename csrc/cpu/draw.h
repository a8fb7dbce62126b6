// A draw from the distribution that logits describe.
#pragma once

#include "../generate.h"

namespace fastlstm {

// The token that row b draws in step `step` of the call. Overwrites the row's logits, (vocabulary);
// `order` is scratch of the same size. With NaN among the logits it may be any token.
// fastlstm/generation/draw.py does the same in torch, for models that do not run here.
int64_t draw(const Generate& g, double* logits, int64_t* order, int64_t step, int64_t b);

}  // namespace fastlstm

// The uniform number that decides a draw, the same on every device. A seed names a stream of them;
// draw `number` in row b takes one. fastlstm/generation/draw.py does the same.
#pragma once

#include "dropout.h"

namespace fastlstm {

// Greater than 0 and less than 1.
FASTLSTM_INLINE double draw_number(int64_t seed, int64_t number, int64_t b) {
  return (dropout_row(dropout_key(seed, 0, 0), number, b) + 0.5) * 0x1p-32;
}

}  // namespace fastlstm

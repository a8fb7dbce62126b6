// The noise that decides a draw, the same on every device. Of a row's tokens the one with the
// largest logit / temperature + G is drawn, G = -log(-log u), with a uniform number u of its own
// for every token (the Gumbel-max trick: Gumbel, 1954; Yellott, 1977). That is a draw from the
// softmax. G depends on counters alone, so a kernel can have it before the logits arrive.
//
// u = (k + 1/2) / 2^52: above 0 and below 1, exact in double, and so is 1 - u. The low 20 bits of k
// are those of the row: they matter where the upper ones are all 0 or all 1, which no two tokens of
// a row are at once. fastlstm/generation/draw.py does the same.
#pragma once

#include "dropout.h"

namespace fastlstm {

// Two words for a seed, then for a draw in a row: one alone would soon repeat.
struct DrawKeys {
  uint32_t upper, low;
};
struct DrawRow {
  uint32_t upper, low;
};

FASTLSTM_INLINE DrawKeys draw_keys(int64_t seed) {
  return {dropout_key(seed, 0, 0), dropout_key(seed, 0, 0, Drop::update)};
}

// Draw `number` of the stream that the seed names, in row b.
FASTLSTM_INLINE DrawRow draw_row(const DrawKeys& keys, int64_t number, int64_t b) {
  return {dropout_row(keys.upper, number, b), dropout_row(keys.low, number, b)};
}

// The upper 32 bits of a token's k, and the lower 20.
FASTLSTM_INLINE uint32_t draw_upper_bits(const DrawRow& row, int64_t token) {
  return mix32((static_cast<uint32_t>(token) * 0x9e3779b9U ^ row.upper) + row.low);
}
FASTLSTM_INLINE uint32_t draw_low_bits(const DrawRow& row) { return row.low >> 12; }

}  // namespace fastlstm

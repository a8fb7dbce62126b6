// Counter-based dropout: whether an element survives is a pure function of the seed and of the
// element's place, so forward and backward, and every backend, agree without storing a mask.
// mix32 is "lowbias32" of Chris Wellons' hash prospector. fastlstm/dropout.py does the same.
#pragma once

#include <cstdint>

#include "cell.h"

namespace fastlstm {

FASTLSTM_INLINE uint32_t mix32(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352dU;
  x ^= x >> 15;
  x *= 0x846ca68bU;
  return x ^ (x >> 16);
}

// What is dropped. Each has its own stream of random bits.
enum class Drop : uint32_t { output, update, zone_c, zone_h };

// One key per (seed, layer, direction) and stream, then one per row (t, b).
FASTLSTM_INLINE uint32_t dropout_key(int64_t seed, int layer, int direction,
                                     Drop stream = Drop::output) {
  const uint64_t s = static_cast<uint64_t>(seed);
  const uint32_t key = mix32(static_cast<uint32_t>(s) ^ mix32(static_cast<uint32_t>(s >> 32)));
  const uint32_t stream_bits = static_cast<uint32_t>(stream) << 24;
  return mix32(key ^ (stream_bits + static_cast<uint32_t>(2 * layer + direction)));
}

FASTLSTM_INLINE uint32_t dropout_row(uint32_t key, int64_t t, int64_t b) {
  return mix32(mix32(key ^ static_cast<uint32_t>(t)) ^ static_cast<uint32_t>(b));
}

// Of 2^32; needs 33 bits for probability 1.
FASTLSTM_INLINE uint64_t dropout_threshold(double probability) {
  return static_cast<uint64_t>(probability * 4294967296.0);
}
// What a kept element is multiplied by.
FASTLSTM_INLINE double dropout_scale(double probability) {
  return probability >= 1 ? 0 : 1 / (1 - probability);
}
FASTLSTM_INLINE bool dropout_keeps(uint32_t row, int64_t unit, uint64_t threshold) {
  return mix32(row ^ static_cast<uint32_t>(unit) * 0x9e3779b9U) >= threshold;
}

}  // namespace fastlstm

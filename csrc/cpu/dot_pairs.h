// AVX-512-BF16's one instruction that no vector extension has a name for.
#pragma once

#include <immintrin.h>

namespace fastlstm {
namespace {

// In every lane: sum + a.even * b.even + a.odd * b.odd, of bfloat16 pairs; b in all lanes.
inline __attribute__((always_inline)) __m512 dot_pairs(__m512 sum, __m512i a, int32_t b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)_mm512_set1_epi32(b));
}

}  // namespace
}  // namespace fastlstm

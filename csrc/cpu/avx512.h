// Instructions of AVX-512 that GCC's vector extension does not express.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace fastlstm {
namespace {

// These use masks of all lanes, because GCC 12 warns about its own forms without a mask.

// 1 / x within 2^-14 of it.
inline __attribute__((always_inline)) __m512 estimate_reciprocal(__m512 x) {
  return _mm512_maskz_rcp14_ps(__mmask16(-1), x);
}

// The second operand where one of them is NaN.
inline __attribute__((always_inline)) __m512 larger_or_second(__m512 a, __m512 b) {
  return _mm512_maskz_max_ps(__mmask16(-1), a, b);
}
inline __attribute__((always_inline)) __m512 smaller_or_second(__m512 a, __m512 b) {
  return _mm512_maskz_min_ps(__mmask16(-1), a, b);
}

// Bytes as 16-bit integers.
inline __attribute__((always_inline)) __m512i widened(__m256i bytes) {
  return _mm512_maskz_cvtepi8_epi16(__mmask32(-1), bytes);
}
// In every lane: a.low * b.low + a.high * b.high, of pairs of 16-bit integers.
inline __attribute__((always_inline)) __m512i multiplied_pairs(__m512i a, __m512i b) {
  return _mm512_maskz_madd_epi16(__mmask16(-1), a, b);
}

#ifdef __AVX512BF16__
// To bfloat16, to the nearest and of two to the even one.
inline __attribute__((always_inline)) __m256i bfloat16_bits(__m512 x) {
  return (__m256i)_mm512_cvtneps_pbh(x);
}

// In every lane: sum + a.even * b.even + a.odd * b.odd, of bfloat16 pairs. b is the same in all
// lanes.
inline __attribute__((always_inline)) __m512 dot_pairs(__m512 sum, __m512i a, int32_t b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)_mm512_set1_epi32(b));
}
#endif

}  // namespace
}  // namespace fastlstm

// 16-bit floating point on the host, rounding to nearest even as the GPU's conversions do.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt.h"

namespace simt {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

SIMT_UNSEEN inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
SIMT_UNSEEN inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Drops the low `count` bits, rounding to nearest, ties to even.
inline uint32_t drop_bits(uint32_t bits, int count) {
  const uint32_t last = bits >> count & 1;
  return (bits + (1u << (count - 1)) - 1 + last) >> count;
}

inline float to_float(Bf16 x) { return as_float(uint32_t(x.bits) << 16); }
inline Bf16 round_to_bf16(float x) {
  if (std::isnan(x)) return {0x7fff};
  return {uint16_t(drop_bits(as_bits(x), 16))};
}

inline float to_float(F16 x) {
  const uint32_t sign = uint32_t(x.bits >> 15) << 31, exponent = x.bits >> 10 & 31,
                 fraction = x.bits & 1023;
  if (exponent == 31) return as_float(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) return (sign ? -1.f : 1.f) * std::ldexp(float(fraction), -24);
  return as_float(sign | (exponent + 112) << 23 | fraction << 13);
}
inline F16 round_to_f16(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size >= as_bits(65520.f)) return {uint16_t(sign | 0x7c00)};
  if (size < as_bits(6.103515625e-5f))  // subnormal: a multiple of 2^-24
    return {uint16_t(sign | uint32_t(std::nearbyint(std::ldexp(as_float(size), 24))))};
  return {uint16_t(sign | drop_bits(size - (112u << 23), 13))};
}

// Elements of the 32-bit registers of tensor-core operands.
struct Bf16Pair {
  SIMT_UNSEEN static float get(uint32_t bits, int e) {
    return as_float(e ? bits & 0xffff0000u : bits << 16);
  }
};
struct F16Pair {
  SIMT_UNSEEN static float get(uint32_t bits, int e) {
    return to_float(F16{uint16_t(bits >> 16 * e)});
  }
};
struct Tf32 {  // to nearest, ties away from zero: cvt.rna
  SIMT_UNSEEN static float get(uint32_t bits, int) {
    if (std::isnan(as_float(bits))) return as_float(0x7fffffffu);
    return as_float((bits + 0x1000u) & 0xffffe000u);
  }
};
struct RoundedTf32 {  // the tensor cores ignore the low bits
  SIMT_UNSEEN static float get(uint32_t bits, int) { return as_float(bits & 0xffffe000u); }
};

}  // namespace simt

// SIMD vectors and the activations on them, for one instruction set.
//
// A vector is GCC/Clang's vector extension of VEC_BYTES, so one source serves SSE2, AVX2, AVX-512
// and NEON: the flags of the build decide what it becomes. Everything lives in an anonymous
// namespace: were any of it shared, the linker could pick the AVX-512 copy for every processor.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../cell.h"
#include "../dropout.h"
#ifdef __AVX512BF16__
#include "dot_pairs.h"
#endif

#ifndef FASTLSTM_VEC_BYTES
#error "FASTLSTM_VEC_BYTES is set by the file that includes this one"
#endif

namespace fastlstm {
namespace {

typedef float VecF __attribute__((vector_size(FASTLSTM_VEC_BYTES)));
typedef int32_t VecFi __attribute__((vector_size(FASTLSTM_VEC_BYTES)));
typedef double VecD __attribute__((vector_size(FASTLSTM_VEC_BYTES)));
typedef int64_t VecDi __attribute__((vector_size(FASTLSTM_VEC_BYTES)));

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef VecF V;
  typedef VecFi I;
};
template <>
struct VecOf<double> {
  typedef VecD V;
  typedef VecDi I;
};
template <>
struct VecOf<int32_t> {
  typedef VecFi V;
};
template <class T>
using Vec = typename VecOf<T>::V;
template <class T>
constexpr int kWidth = FASTLSTM_VEC_BYTES / int(sizeof(T));

// Storage types that are computed in float. Rounding is to nearest even, as torch rounds.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The type that a storage type is computed and accumulated in.
template <class S>
struct AccOf {
  typedef float T;
};
template <>
struct AccOf<double> {
  typedef double T;
};
template <class S>
using Acc = typename AccOf<S>::T;

template <class To, class From>
FASTLSTM_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between sizes");
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

FASTLSTM_INLINE float to_acc(float x) { return x; }
FASTLSTM_INLINE double to_acc(double x) { return x; }
FASTLSTM_INLINE float to_acc(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
// Multiplying by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals;
// infinities and NaN keep an all-ones exponent instead.
FASTLSTM_INLINE float to_acc(Half x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const float normal = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = magnitude | 0x7f800000U;
  const uint32_t bits = magnitude >= 0x0f800000U ? special : bit_cast<uint32_t>(normal);
  return bit_cast<float>(bits | uint32_t(x.bits & 0x8000) << 16);
}

FASTLSTM_INLINE void from_acc(float x, float& y) { y = x; }
FASTLSTM_INLINE void from_acc(double x, double& y) { y = x; }
FASTLSTM_INLINE void from_acc(float x, BFloat16& y) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  y.bits = uint16_t((u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : rounded);
}
// Subnormal halves round in a float addition whose last bit is 2^-24; normal ones in integers.
FASTLSTM_INLINE void from_acc(float x, Half& y) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t magnitude = u & 0x7fffffff;
  const uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  const uint32_t normal = (magnitude - 0x38000000U + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  uint32_t bits = magnitude < 0x38800000U ? subnormal : normal;
  bits = magnitude >= 0x477ff000U ? 0x7c00 : bits;  // rounds past the largest half
  bits = magnitude > 0x7f800000U ? 0x7e00 : bits;   // NaN
  y.bits = uint16_t(bits | (u >> 16 & 0x8000));
}

template <class T>
FASTLSTM_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
FASTLSTM_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// A whole vector of converted elements. The loops are what the compiler vectorises.
template <class S>
FASTLSTM_INLINE Vec<Acc<S>> load_as(const S* p) {
  typedef Acc<S> T;
  T lanes[kWidth<T>];
  for (int j = 0; j < kWidth<T>; ++j) lanes[j] = to_acc(p[j]);
  return load(lanes);
}
template <>
FASTLSTM_INLINE VecF load_as<float>(const float* p) {
  return load(p);
}
template <>
FASTLSTM_INLINE VecD load_as<double>(const double* p) {
  return load(p);
}

template <class S>
FASTLSTM_INLINE void store_as(S* p, Vec<Acc<S>> v) {
  typedef Acc<S> T;
  T lanes[kWidth<T>];
  store(lanes, v);
  for (int j = 0; j < kWidth<T>; ++j) from_acc(lanes[j], p[j]);
}
template <>
FASTLSTM_INLINE void store_as<float>(float* p, VecF v) {
  store(p, v);
}
template <>
FASTLSTM_INLINE void store_as<double>(double* p, VecD v) {
  store(p, v);
}

// The first n elements of such a vector; lanes past n load as zero and are not stored.
template <class S>
FASTLSTM_INLINE Vec<Acc<S>> load_part(const S* p, int n) {
  typedef Acc<S> T;
  if (n >= kWidth<T>) return load_as(p);
  T lanes[kWidth<T>] = {};
  for (int j = 0; j < n; ++j) lanes[j] = to_acc(p[j]);
  return load(lanes);
}

template <class S>
FASTLSTM_INLINE void store_part(S* p, Vec<Acc<S>> v, int n) {
  typedef Acc<S> T;
  if (n >= kWidth<T>) return store_as<S>(p, v);
  T lanes[kWidth<T>];
  store(lanes, v);
  for (int j = 0; j < n; ++j) from_acc(lanes[j], p[j]);
}

// v rounded to the storage type and back.
template <class S>
FASTLSTM_INLINE Vec<Acc<S>> round_to(Vec<Acc<S>> v) {
  S lanes[kWidth<Acc<S>>];
  store_as<S>(lanes, v);
  return load_as(lanes);
}

// n elements converted from one type to another.
template <class To, class From>
FASTLSTM_INLINE void convert(To* to, const From* from, int64_t n) {
  for (int64_t j = 0; j < n; ++j) from_acc(to_acc(from[j]), to[j]);
}

// What the matrix products multiply: elements of the accumulation type, or, where the processor
// has an instruction for it, pairs of bfloat16 that are neighbours in K.
template <class S>
struct OperandOf {
  typedef Acc<S> E;
};
#if FASTLSTM_BF16_PAIRS
template <>
struct OperandOf<BFloat16> {
  typedef BFloat16 E;
};
#endif
template <class S>
using Operand = typename OperandOf<S>::E;

// A lane's operand: a Word holds kPair<E> neighbours of K.
template <class E>
struct WordOf {
  typedef E W;
};
template <>
struct WordOf<BFloat16> {
  typedef int32_t W;
};
template <class E>
using Word = typename WordOf<E>::W;
template <class E>
constexpr int kPair = int(sizeof(Word<E>) / sizeof(E));

template <class E>
FASTLSTM_INLINE Word<E> load_word(const E* p) {
  Word<E> w;
  __builtin_memcpy(&w, p, sizeof w);
  return w;
}

template <class E>
FASTLSTM_INLINE Vec<Word<E>> load_words(const E* p) {
  Vec<Word<E>> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// sum + a * b, b the same in every lane.
FASTLSTM_INLINE VecF multiply_add(VecF sum, VecF a, float b) { return sum + a * b; }
FASTLSTM_INLINE VecD multiply_add(VecD sum, VecD a, double b) { return sum + a * b; }
FASTLSTM_INLINE VecF multiply_add(VecF sum, VecFi a, int32_t b) {
#ifdef __AVX512BF16__
  return bit_cast<VecF>(dot_pairs(bit_cast<__m512>(sum), bit_cast<__m512i>(a), b));
#else  // the same sums from other instructions
  const VecFi x = VecFi{} + b, high = VecFi{} + int32_t(0xffff0000U);
  sum += bit_cast<VecF>(a << 16) * bit_cast<VecF>(x << 16);
  return sum + bit_cast<VecF>(a & high) * bit_cast<VecF>(x & high);
#endif
}

// exp, sigmoid and tanh on vectors. Coefficients and range reduction are those of Cephes
// (Moshier, 1989: expf, tanhf, exp, tanh). Error against exact values over the whole range, held
// by tests/test_native.py: float 3e-7 relative for tanh, 2e-7 absolute for sigmoid; double
// 1e-15. NaN gives NaN: the clamps below compare false on it and let it through.
template <class T>
struct Math;

template <>
struct Math<float> {
  static FASTLSTM_INLINE VecF one() { return VecF{} + 1.0f; }

  static FASTLSTM_INLINE VecF exp(VecF x) {
    x = x < -87.0f ? VecF{} - 87.0f : x;
    x = x > 88.0f ? VecF{} + 88.0f : x;
    const VecF shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to integer
    const VecF n = shifted - 12582912.0f;
    const VecF r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    VecF p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    // The integer sits in the low bits. A product, unlike an addition to p's bits, keeps NaN.
    return p * bit_cast<VecF>((bit_cast<VecFi>(shifted) << 23) + (127 << 23));
  }

  static FASTLSTM_INLINE VecF sigmoid(VecF x) { return 1.0f / (1.0f + exp(-x)); }

  static FASTLSTM_INLINE VecF tanh(VecF x) {
    const VecF z = x * x;
    VecF p = z * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * z + -5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z + -3.33332819422e-1f;
    const VecF small = p * z * x + x;
    const VecF magnitude = x < 0.0f ? -x : x;
    const VecF large = 1.0f - 2.0f / (exp(magnitude + magnitude) + 1.0f);
    return magnitude < 0.625f ? small : (x < 0.0f ? -large : large);
  }
};

template <>
struct Math<double> {
  static FASTLSTM_INLINE VecD one() { return VecD{} + 1.0; }

  static FASTLSTM_INLINE VecD exp(VecD x) {
    x = x < -708.0 ? VecD{} - 708.0 : x;
    x = x > 709.0 ? VecD{} + 709.0 : x;
    const VecD shifted = x * 1.4426950408889634073599 + 6755399441055744.0;  // 1.5 * 2^52
    const VecD n = shifted - 6755399441055744.0;
    const VecD r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
    const VecD z = r * r;
    VecD p = z * 1.26177193074810590878e-4 + 3.02994407707441961300e-2;
    p = (p * z + 9.99999999999999999910e-1) * r;
    VecD q = z * 3.00198505138664455042e-6 + 2.52448340349684104192e-3;
    q = q * z + 2.27265548208155028766e-1;
    q = q * z + 2.00000000000000000009e0;
    const VecD y = 1.0 + 2.0 * (p / (q - p));
    return y * bit_cast<VecD>((bit_cast<VecDi>(shifted) << 52) + (int64_t(1023) << 52));
  }

  static FASTLSTM_INLINE VecD sigmoid(VecD x) { return 1.0 / (1.0 + exp(-x)); }

  static FASTLSTM_INLINE VecD tanh(VecD x) {
    const VecD z = x * x;
    VecD p = z * -9.64399179425052238628e-1 + -9.92877231001918586564e1;
    p = p * z + -1.61468768441708447952e3;
    VecD q = z + 1.12811678491632931402e2;
    q = q * z + 2.23548839060100448583e3;
    q = q * z + 4.84406305325125486048e3;
    const VecD small = x * z * (p / q) + x;
    const VecD magnitude = x < 0.0 ? -x : x;
    const VecD large = 1.0 - 2.0 / (exp(magnitude + magnitude) + 1.0);
    return magnitude < 0.625 ? small : (x < 0.0 ? -large : large);
  }
};

}  // namespace
}  // namespace fastlstm

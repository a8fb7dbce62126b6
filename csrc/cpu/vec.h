// SIMD vectors of one instruction set: storage types, loads and stores that convert them.
//
// A vector is GCC's and Clang's vector extension of FASTLSTM_VEC_BYTES, so one source serves SSE2,
// AVX2, AVX-512 and NEON, as the build's flags decide. Everything is in an anonymous namespace:
// otherwise the linker could keep the AVX-512 copy of a function for every processor.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../cell.h"
#ifdef __AVX512F__
#include "avx512.h"
#endif

#ifndef FASTLSTM_VEC_BYTES
#error "FASTLSTM_VEC_BYTES is set by the file that includes this one"
#endif

namespace fastlstm {
namespace {

typedef float VecF __attribute__((vector_size(FASTLSTM_VEC_BYTES)));
typedef int32_t VecFi __attribute__((vector_size(FASTLSTM_VEC_BYTES)));
typedef uint32_t VecFu __attribute__((vector_size(FASTLSTM_VEC_BYTES)));
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

// Storage types that are computed in float. Rounding is to nearest even, as in torch.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// The accumulation type: what elements of a storage type are computed in.
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

// The integer of a float's size, or a vector of them, that holds a half type's bits in its low
// half.
template <class F>
struct BitsOf;
template <>
struct BitsOf<float> {
  typedef uint32_t U;
};
template <>
struct BitsOf<VecF> {
  typedef VecFu U;
};
template <class F>
using Bits = typename BitsOf<F>::U;

template <class F>
FASTLSTM_INLINE F value_of(Bits<F> bits, BFloat16) {
  return bit_cast<F>(bits << 16);
}
template <class F>
FASTLSTM_INLINE Bits<F> bits_of(F x, BFloat16) {
  const Bits<F> u = bit_cast<Bits<F>>(x);
  const Bits<F> rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return (u & 0x7fffffff) > 0x7f800000U ? (u >> 16) | 0x40 : rounded;
}
// Multiplying by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals;
// infinities and NaN keep an all-ones exponent instead.
template <class F>
FASTLSTM_INLINE F value_of(Bits<F> half, Half) {
  typedef Bits<F> U;
  const U magnitude = (half & 0x7fff) << 13;
  const U normal = bit_cast<U>(bit_cast<F>(magnitude) * 0x1p112f);
  const U bits = magnitude >= 0x0f800000U ? magnitude | 0x7f800000U : normal;
  return bit_cast<F>(bits | (half & 0x8000) << 16);
}
// A subnormal half is rounded by a float addition whose last bit is 2^-24, a normal one by integer
// arithmetic.
template <class F>
FASTLSTM_INLINE Bits<F> bits_of(F x, Half) {
  typedef Bits<F> U;
  const U u = bit_cast<U>(x), magnitude = u & 0x7fffffff;
  const U subnormal = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  const U normal = (magnitude - 0x38000000U + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  U bits = magnitude < 0x38800000U ? subnormal : normal;
  bits = magnitude >= 0x477ff000U ? U{} + 0x7c00 : bits;  // rounds past the largest half
  bits = magnitude > 0x7f800000U ? U{} + 0x7e00 : bits;   // NaN
  return bits | (u >> 16 & 0x8000);
}

FASTLSTM_INLINE float to_acc(float x) { return x; }
FASTLSTM_INLINE double to_acc(double x) { return x; }
template <class S>
FASTLSTM_INLINE float to_acc(S x) {
  return value_of<float>(x.bits, S{});
}

FASTLSTM_INLINE void from_acc(float x, float& y) { y = x; }
FASTLSTM_INLINE void from_acc(double x, double& y) { y = x; }
template <class S>
FASTLSTM_INLINE void from_acc(float x, S& y) {
  y.bits = uint16_t(bits_of(x, S{}));
}

template <class T>
FASTLSTM_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// Prefetches n elements, one cache line at a time.
template <class E>
FASTLSTM_INLINE void prefetch(const E* p, int64_t n) {
  for (int64_t j = 0; j < n; j += 64 / int64_t(sizeof(E))) __builtin_prefetch(p + j);
}

template <class T>
FASTLSTM_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// The half-type elements that a vector of floats converts to.
typedef uint16_t HalfBits __attribute__((vector_size(FASTLSTM_VEC_BYTES / 2)));

template <class S>
FASTLSTM_INLINE HalfBits half_bits(VecF v, S) {
  return __builtin_convertvector(bits_of(v, S{}), HalfBits);
}
#ifdef __AVX512BF16__
// Subnormals, below 1.2e-38, become zero, as they count in the products of these processors.
FASTLSTM_INLINE HalfBits half_bits(VecF v, BFloat16) {
  return bit_cast<HalfBits>(bfloat16_bits(bit_cast<__m512>(v)));
}
#endif

// A whole vector, converted from or to the storage type.
template <class S>
FASTLSTM_INLINE Vec<Acc<S>> load_as(const S* p) {
  if constexpr (kSame<S, Acc<S>>) {
    return load(p);
  } else {
    HalfBits bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return value_of<VecF>(__builtin_convertvector(bits, VecFu), S{});
  }
}

template <class S>
FASTLSTM_INLINE void store_as(S* p, Vec<Acc<S>> v) {
  if constexpr (kSame<S, Acc<S>>) {
    store(p, v);
  } else {
    const HalfBits bits = half_bits(v, S{});
    __builtin_memcpy(p, &bits, sizeof bits);
  }
}

// The first n lanes of a vector: the others load as zero and are not stored.
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
  if constexpr (kSame<S, Acc<S>>)
    return v;
  else
    return value_of<VecF>(bits_of(v, S{}), S{});
}

// n elements converted from one type to another.
template <class To, class From>
FASTLSTM_INLINE void convert(To* to, const From* from, int64_t n) {
  if constexpr (kSame<To, From>)
    memcpy(to, from, size_t(n) * sizeof(To));
  else
    for (int64_t j = 0; j < n; ++j) from_acc(to_acc(from[j]), to[j]);
}

}  // namespace
}  // namespace fastlstm

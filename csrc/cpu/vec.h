// SIMD vectors for one instruction set: half types, words of what is multiplied, transposition.
//
// A vector is GCC/Clang's vector extension of VEC_BYTES, so one source serves SSE2, AVX2, AVX-512
// and NEON: the flags of the build decide what it becomes. Everything lives in an anonymous
// namespace: were any of it shared, the linker could pick the AVX-512 copy for every processor.
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

// Storage types that are computed in float. Rounding is to nearest even, as torch rounds.
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

// A half type's bits stand low in a word, of a float or of each lane of a vector of them.
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
// Subnormal halves round in a float addition whose last bit is 2^-24; normal ones in integers.
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

template <class E>
FASTLSTM_INLINE void fetch_line_by_line(const E* p, int64_t n) {
  for (int64_t j = 0; j < n; j += 64 / int64_t(sizeof(E))) __builtin_prefetch(p + j);
}

template <class T>
FASTLSTM_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// A whole vector of converted elements.
typedef uint16_t Narrow __attribute__((vector_size(FASTLSTM_VEC_BYTES / 2)));

template <class S>
FASTLSTM_INLINE Vec<Acc<S>> load_as(const S* p) {
  if constexpr (kSame<S, Acc<S>>) {
    return load(p);
  } else {
    Narrow bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return value_of<VecF>(__builtin_convertvector(bits, VecFu), S{});
  }
}

template <class S>
FASTLSTM_INLINE void store_as(S* p, Vec<Acc<S>> v) {
  if constexpr (kSame<S, Acc<S>>) {
    store(p, v);
  } else {
    const Narrow bits = __builtin_convertvector(bits_of(v, S{}), Narrow);
    __builtin_memcpy(p, &bits, sizeof bits);
  }
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

// Depths are rounded up to so many elements of K: what one instruction sums.
#if FASTLSTM_AMX
template <class E>
constexpr int kDeep = 32;
#else
template <class E>
constexpr int kDeep = kPair<E>;
#endif

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

// The lanes of a and b in turn, from their first or their second half.
template <class V>
FASTLSTM_INLINE V interleaved(V a, V b, bool second) {
  typedef decltype(a < b) Lanes;
  constexpr int N = int(sizeof(V) / sizeof(a[0]));
#ifdef __clang__
  V out;
  for (int j = 0; j < N; ++j) out[j] = (j % 2 ? b : a)[j / 2 + second * N / 2];
  return out;
#else
  Lanes from;
  for (int j = 0; j < N; ++j) from[j] = j / 2 + second * N / 2 + j % 2 * N;
  return __builtin_shuffle(a, b, from);
#endif
}

// Transposes a square of lanes. Interleaving a vector with the one half the square further on turns
// the bits of an element's place (row, then lane) round by one; log2(N) turns exchange the two.
template <class V, int N>
FASTLSTM_INLINE void transpose(V (&rows)[N]) {
  static_assert(N == sizeof(V) / sizeof(rows[0][0]), "a square");
#pragma GCC unroll 4
  for (int turn = 1; turn < N; turn *= 2) {
    V turned[N];
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) turned[j] = interleaved(rows[j / 2], rows[j / 2 + N / 2], j % 2);
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) rows[j] = turned[j];
  }
}

// A vector of words, each an element of a and of b.
FASTLSTM_INLINE VecFu paired(const BFloat16* a, const BFloat16* b) {
  Narrow low, high;
  __builtin_memcpy(&low, a, sizeof low);
  __builtin_memcpy(&high, b, sizeof high);
  return __builtin_convertvector(low, VecFu) | __builtin_convertvector(high, VecFu) << 16;
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

}  // namespace
}  // namespace fastlstm

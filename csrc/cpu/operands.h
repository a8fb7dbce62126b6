// Operands of the matrix products: what a lane of a vector holds, and how operands are loaded,
// interleaved, transposed and multiplied.
#pragma once

#include "vec.h"

namespace fastlstm {
namespace {

// An operand is an element of the accumulation type or, where the processor has an instruction for
// it, a bfloat16 that is multiplied together with its neighbour in K.
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

// A lane of a vector is a Word: kPair<E> operands that are neighbours in K.
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

// How many elements of K one instruction sums. Depths are rounded up to a multiple.
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

// The same from elements of a storage type.
template <class E, class S>
FASTLSTM_INLINE Vec<Word<E>> load_converted(const S* p) {
  if constexpr (kSame<E, S>)
    return load_words(p);
  else
    return load_as(p);
}

// Alternates runs of kRun lanes of a and b. Of every kGroup lanes it takes the first half of both
// vectors, or the second.
template <int kRun, int kGroup, class V>
FASTLSTM_INLINE V interleaved(V a, V b, bool second) {
  constexpr int N = int(sizeof(V) / sizeof(a[0]));
  const auto lane_of = [=](int j) {
    const int in_group = j % kGroup, run = in_group / kRun;
    return j - in_group + second * kGroup / 2 + run / 2 * kRun + in_group % kRun;
  };
#ifdef __clang__
  V out;
  for (int j = 0; j < N; ++j) out[j] = (j / kRun % 2 ? b : a)[lane_of(j)];
  return out;
#else
  decltype(a < b) from;
  for (int j = 0; j < N; ++j) from[j] = lane_of(j) + j / kRun % 2 * N;
  return __builtin_shuffle(a, b, from);
#endif
}

// Transposes squares of kRows runs of kRun lanes, one in every kRows * kRun lanes of the rows
// `step` apart. Number a run by the bits of its row, then of its place. Interleaving each row with
// the one kRows / 2 further on rotates these bits by one; log2(kRows) rotations exchange the two.
template <int kRows, int kRun, class V>
FASTLSTM_INLINE void transpose_runs(V* rows, int step) {
#pragma GCC unroll 4
  for (int rotation = 1; rotation < kRows; rotation *= 2) {
    V rotated[kRows];
#pragma GCC unroll 16
    for (int j = 0; j < kRows; ++j)
      rotated[j] = interleaved<kRun, kRows * kRun>(rows[j / 2 * step],
                                                   rows[(j / 2 + kRows / 2) * step], j % 2);
#pragma GCC unroll 16
    for (int j = 0; j < kRows; ++j) rows[j * step] = rotated[j];
  }
}

// Transposes a square of lanes: first within groups of 16 bytes, where a shuffle is one
// instruction, then the groups.
template <class V, int N>
FASTLSTM_INLINE void transpose(V (&rows)[N]) {
  static_assert(N == sizeof(V) / sizeof(rows[0][0]), "a square");
  constexpr int kGroup = 16 / int(sizeof(rows[0][0]));
#pragma GCC unroll 16
  for (int j = 0; j < N; j += kGroup) transpose_runs<kGroup, 1>(rows + j, 1);
#pragma GCC unroll 16
  for (int j = 0; j < kGroup; ++j) transpose_runs<N / kGroup, kGroup>(rows + j, kGroup);
}

// A vector of words: word j holds a[j] in its low half and b[j] in its high half.
FASTLSTM_INLINE VecFu paired(const BFloat16* a, const BFloat16* b) {
  HalfBits low, high;
  __builtin_memcpy(&low, a, sizeof low);
  __builtin_memcpy(&high, b, sizeof high);
  return __builtin_convertvector(low, VecFu) | __builtin_convertvector(high, VecFu) << 16;
}

// sum + a * b, where b is the same in every lane.
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

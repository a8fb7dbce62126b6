// The product of drawing text: one panel of packed weights with a few rows, for every storage type
// (../generate.h has the layouts).
#pragma once

#include "../generate.h"
#include "generate_rows.h"
#include "operands.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastlstm {
namespace {

// How many rows of the batch share a pass over a panel: with four vectors of columns, their sums
// fill the registers. A single row takes eight vectors, enough sums to hide the latency of the
// FMAs.
constexpr int kPassRows = FASTLSTM_VEC_BYTES == 64 ? 6 : 3;

// How a storage type is read. expand() turns a vector of words into vectors of columns: vector
// number `part` of kPerWord, kGenerateColumns / kPerWord columns apart.
template <class T_>
struct Plain {
  typedef T_ T;
  typedef T_ Word;
  typedef PlainRows<T> Rows;
  static constexpr int kPerWord = 1;
  static FASTLSTM_INLINE Vec<T> expand(Vec<T> words, int) { return words; }
};

struct PairsBf16 {
  typedef float T;
  typedef int32_t Word;
  typedef PlainRows<T> Rows;
  static constexpr int kPerWord = 2;
  static FASTLSTM_INLINE VecF expand(VecFi words, int part) {
    return bit_cast<VecF>(part == 0 ? words << 16 : words & int32_t(0xffff0000U));
  }
};

struct PairsInt8 {
  typedef float T;
  typedef int16_t Word;
  typedef IntegerRows Rows;
  static constexpr int kPerWord = 2;
};

// Bytes as 16-bit integers: a vector of pairs.
FASTLSTM_INLINE VecFi load_pairs(const int16_t* bytes) {
#if defined(__AVX512BW__) && FASTLSTM_VEC_BYTES == 64
  return bit_cast<VecFi>(widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes))));
#elif defined(__AVX2__) && FASTLSTM_VEC_BYTES == 32
  return bit_cast<VecFi>(
      _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
#else
  typedef int8_t Bytes __attribute__((vector_size(FASTLSTM_VEC_BYTES / 2)));
  typedef int16_t Shorts __attribute__((vector_size(FASTLSTM_VEC_BYTES)));
  Bytes loaded;
  __builtin_memcpy(&loaded, bytes, sizeof loaded);
  return bit_cast<VecFi>(__builtin_convertvector(loaded, Shorts));
#endif
}

// In every lane: sum + a.low * b.low + a.high * b.high, of pairs of 16-bit integers. b is the same
// in all lanes.
FASTLSTM_INLINE VecFi multiply_add_pairs(VecFi sum, VecFi a, int32_t b) {
  const VecFi x = VecFi{} + b;
#if defined(__AVX512BW__) && FASTLSTM_VEC_BYTES == 64
  return sum + bit_cast<VecFi>(multiplied_pairs(bit_cast<__m512i>(a), bit_cast<__m512i>(x)));
#elif defined(__AVX2__) && FASTLSTM_VEC_BYTES == 32
  return sum + bit_cast<VecFi>(_mm256_madd_epi16(bit_cast<__m256i>(a), bit_cast<__m256i>(x)));
#elif defined(__SSE2__) && FASTLSTM_VEC_BYTES == 16
  return sum + bit_cast<VecFi>(_mm_madd_epi16(bit_cast<__m128i>(a), bit_cast<__m128i>(x)));
#else
  return sum + (a << 16 >> 16) * (x << 16 >> 16) + (a >> 16) * (x >> 16);
#endif
}

// Packed words are prefetched so far ahead, because the hardware prefetcher stops at the end of a
// page, which comes every 32 to 64 k. Elements of float or double are consumed more slowly: there a
// prefetch costs more than it gains.
constexpr int64_t kPrefetchBytes = 4096;
template <class Word>
FASTLSTM_INLINE void prefetch_words(const Word* words, int64_t n) {
  prefetch(words + kPrefetchBytes / int64_t(sizeof(Word)), n);
}

// sums[m] += W x[m], for the columns of one panel and the M rows of x from `row` on.
template <class Store, int M, class T>
void add_product(T (*sums)[kGenerateColumns], const PackedMatrix& w, int64_t panel,
                 const PlainRows<T>& x, int64_t row) {
  constexpr int kParts = Store::kPerWord, kWords = kGenerateColumns / kParts;
  constexpr int kVectors = kWords / kWidth<T>, kMaxGroup = (M == 1 ? 8 : 4) / kParts;
  constexpr int kGroup = kVectors < kMaxGroup ? kVectors : kMaxGroup;  // vectors at once
  const typename Store::Word* words =
      static_cast<const typename Store::Word*>(w.data) + panel * w.depth * kWords;
  const T* rows[M];
  for (int m = 0; m < M; ++m) rows[m] = x.row(row + m);
  for (int first = 0; first < kVectors; first += kGroup) {
    Vec<T> acc[M][kGroup][kParts] = {};
    for (int64_t k = 0; k < w.depth; ++k) {
      const typename Store::Word* at = words + k * kWords;
      if constexpr (kParts > 1) prefetch_words(at, kWords);
#pragma GCC unroll 8
      for (int v = 0; v < kGroup; ++v) {
        const auto group = load(at + (first + v) * kWidth<T>);
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
          const Vec<T> columns = Store::expand(group, part);
#pragma GCC unroll 6
          for (int m = 0; m < M; ++m) acc[m][v][part] += columns * rows[m][k];
        }
      }
    }
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < kGroup; ++v)
        for (int part = 0; part < kParts; ++part) {
          T* const sum = sums[m] + part * kWords + (first + v) * kWidth<T>;
          store(sum, load(sum) + acc[m][v][part]);
        }
  }
}

// The same in integers. A sum of so many products stays within 32 bits.
constexpr int64_t kIntegerDepth = 512;
static_assert(127 * 32767 * kIntegerDepth <= INT32_MAX, "all products at their largest");
template <class Store, int M>
void add_product(float (*sums)[kGenerateColumns], const PackedMatrix& w, int64_t panel,
                 const IntegerRows& x, int64_t row) {
  constexpr int N = kWidth<float>, kVectors = kGenerateColumns / N, kMaxGroup = M == 1 ? 8 : 4;
  constexpr int kGroup = kVectors < kMaxGroup ? kVectors : kMaxGroup;  // vectors at once
  const int16_t* words =
      static_cast<const int16_t*>(w.data) + panel * ceil_div(w.depth, 2) * kGenerateColumns;
  const float* scale = static_cast<const float*>(w.scale) + panel * kGenerateColumns;
  for (int64_t k0 = 0; k0 < w.depth; k0 += kIntegerDepth)
    for (int first = 0; first < kVectors; first += kGroup) {
      VecFi acc[M][kGroup] = {};
      for (int64_t k = k0; k < min_of(w.depth, k0 + kIntegerDepth); k += 2) {
        const int16_t* at = words + k / 2 * kGenerateColumns;
        prefetch_words(at, kGenerateColumns);
#pragma GCC unroll 8
        for (int v = 0; v < kGroup; ++v) {
          const VecFi pairs = load_pairs(at + (first + v) * N);
#pragma GCC unroll 6
          for (int m = 0; m < M; ++m)
            acc[m][v] = multiply_add_pairs(acc[m][v], pairs, x.pair(row + m, k));
        }
      }
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < kGroup; ++v) {
          const int64_t column = (first + v) * N;
          const VecF sum = __builtin_convertvector(acc[m][v], VecF) * x.scale(row + m);
          store(sums[m] + column, load(sums[m] + column) + sum * load(scale + column));
        }
    }
}

}  // namespace
}  // namespace fastlstm

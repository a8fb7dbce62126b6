// The product of drawing text: one panel of packed weights with a few rows, for every storage type
// (../generate.h has the layouts).
#pragma once

#include "../generate.h"
#include "operands.h"

namespace fastlstm {
namespace {

// How many rows of the batch share a pass over a panel: with four vectors of columns, their sums
// fill the registers. A single row takes eight vectors, enough sums to hide the latency of the
// FMAs.
constexpr int kPassRows = FASTLSTM_VEC_BYTES == 64 ? 6 : 3;

// How a storage type is read. expand() turns a vector of words into vectors of columns: vector
// number `part` of kPerWord, kGenerateColumns / kPerWord columns apart. finish() corrects the sums
// of all parts.
template <class T_>
struct Plain {
  typedef T_ T;
  typedef T_ Word;
  static constexpr int kPerWord = 1;
  static FASTLSTM_INLINE Vec<T> expand(Vec<T> words, int) { return words; }
  static FASTLSTM_INLINE void finish(Vec<T>*) {}
};

struct PairsBf16 {
  typedef float T;
  typedef int32_t Word;
  static constexpr int kPerWord = 2;
  static FASTLSTM_INLINE VecF expand(VecFi words, int part) {
    return bit_cast<VecF>(part == 0 ? words << 16 : words & int32_t(0xffff0000U));
  }
  static FASTLSTM_INLINE void finish(VecF*) {}
};

// A word holds q[0] + q[1] * 2^8 + q[2] * 2^16 + q[3] * 2^24. Shifted so that q[part] is on top, it
// is 2^24 * q[part] and a rest from the lower parts: 2^-8 of what expand() gives for the part
// below. The loop adds up these numbers with their rests, and finish() subtracts the sums of the
// rests once. So the loop needs only a shift and a conversion for each column.
struct FoursInt8 {
  typedef float T;
  typedef int32_t Word;
  static constexpr int kPerWord = 4;
  static FASTLSTM_INLINE VecF expand(VecFi words, int part) {
    return __builtin_convertvector(words << (24 - 8 * part), VecF);
  }
  static FASTLSTM_INLINE void finish(VecF* sums) {
    for (int part = 3; part > 0; --part) sums[part] -= sums[part - 1] * 0x1p-8f;
    for (int part = 0; part < 4; ++part) sums[part] *= 0x1p-24f;
  }
};

// Packed words are prefetched so far ahead, because the hardware prefetcher stops at the end of a
// page, which comes every 32 to 64 k. Elements of float or double are consumed more slowly: there a
// prefetch costs more than it gains.
constexpr int64_t kPrefetchBytes = 4096;

// sums[m] += W x[m], for the columns of one panel and M rows of x, ldx apart.
template <class Store, int M>
void add_product(typename Store::T (*sums)[kGenerateColumns], const PackedMatrix& w, int64_t panel,
                 const typename Store::T* x, int64_t ldx) {
  typedef typename Store::T T;
  constexpr int kParts = Store::kPerWord, kWords = kGenerateColumns / kParts;
  constexpr int kVectors = kWords / kWidth<T>, kMaxGroup = (M == 1 ? 8 : 4) / kParts;
  constexpr int kGroup = kVectors < kMaxGroup ? kVectors : kMaxGroup;  // vectors at once
  const typename Store::Word* words =
      static_cast<const typename Store::Word*>(w.data) + panel * w.depth * kWords;
  const T* scale = static_cast<const T*>(w.scale);
  for (int first = 0; first < kVectors; first += kGroup) {
    Vec<T> acc[M][kGroup][kParts] = {};
    for (int64_t k = 0; k < w.depth; ++k) {
      const typename Store::Word* row = words + k * kWords;
      if constexpr (kParts > 1)
        for (int64_t byte = 0; byte < int64_t(kWords * sizeof *row); byte += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(row) + kPrefetchBytes + byte);
#pragma GCC unroll 8
      for (int v = 0; v < kGroup; ++v) {
        const auto group = load(row + (first + v) * kWidth<T>);
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
          const Vec<T> columns = Store::expand(group, part);
#pragma GCC unroll 6
          for (int m = 0; m < M; ++m) acc[m][v][part] += columns * x[m * ldx + k];
        }
      }
    }
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < kGroup; ++v) {
        Store::finish(acc[m][v]);
        for (int part = 0; part < kParts; ++part) {
          const int64_t column = part * kWords + (first + v) * kWidth<T>;
          Vec<T> sum = acc[m][v][part];
          if (scale) sum *= load(scale + panel * kGenerateColumns + column);
          store(sums[m] + column, load(sums[m] + column) + sum);
        }
      }
  }
}

}  // namespace
}  // namespace fastlstm

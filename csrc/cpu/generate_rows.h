// How a product that draws text reads its rows of x: as they are or, for int8 weights, in 16 bits.
// A member of the team reads all rows before it multiplies its share of a matrix with them.
#pragma once

#include "blocks.h"
#include "runtime.h"
#include "vec.h"

namespace fastlstm {
namespace {

template <class T>
class PlainRows {
 public:
  PlainRows(int64_t /*rows*/, int64_t /*depth*/) {}  // the most of both
  void read(const T* x, int64_t stride, int64_t /*rows*/, int64_t /*depth*/) {
    x_ = x;
    stride_ = stride;
  }
  const T* row(int64_t m) const { return x_ + m * stride_; }

 private:
  const T* x_ = nullptr;
  int64_t stride_ = 0;
};

// Rows of x in 16 bits: x[k] is scale * q[k] within scale / 2, with |q| <= 32767. A row's scale
// follows its largest element. It is NaN where the row has a NaN; an infinite element counts as the
// largest float.
class IntegerRows {
 public:
  IntegerRows(int64_t rows, int64_t depth)
      : stride_(round_up(depth, 16)), q_(rows * stride_), scale_(rows) {}

  void read(const float* x, int64_t stride, int64_t rows, int64_t depth) {
    for (int64_t m = 0; m < rows; ++m)
      scale_[m] = read_row(q_.get() + m * stride_, x + m * stride, depth);
  }
  // q[k] in the low half, q[k + 1] in the high half.
  int32_t pair(int64_t m, int64_t k) const {
    int32_t word;
    __builtin_memcpy(&word, q_.get() + m * stride_ + k, sizeof word);
    return word;
  }
  float scale(int64_t m) const { return scale_[m]; }

 private:
  static constexpr float kMost = 32767;
  typedef int16_t Narrow __attribute__((vector_size(FASTLSTM_VEC_BYTES / 2)));

  static float read_row(int16_t* q, const float* x, int64_t depth) {
    constexpr int N = kWidth<float>;
    const VecF most = VecF{} + kMost;
    auto part = [=](int64_t k) { return load_part(x + k, int(min_of(N, depth - k))); };
    VecF sizes = VecF{} + 1e-30f, no_numbers = {};
    for (int64_t k = 0; k < depth; k += N) {
      const VecF v = part(k), size = v < 0 ? -v : v;
      sizes = size > sizes ? size : sizes;
      no_numbers = v != v ? v : no_numbers;
    }
    float largest = 0, no_number = 0;
    for (int lane = 0; lane < N; ++lane) {
      largest = sizes[lane] > largest ? sizes[lane] : largest;
      no_number += no_numbers[lane];
    }
    if (largest > __FLT_MAX__) largest = __FLT_MAX__;
    const float inverse = kMost / largest;
    for (int64_t k = 0; k < round_up(depth, 16); k += N) {
      VecF v = k < depth ? part(k) * inverse : VecF{};
      v = v > most ? most : v;
      v = v < -most ? -most : v;
      // The addition rounds to an integer, which is then in the low bits.
      const Narrow narrow = __builtin_convertvector(bit_cast<VecFi>(v + 0x1.8p23f), Narrow);
      __builtin_memcpy(q + k, &narrow, sizeof narrow);
    }
    return largest / kMost + no_number;
  }

  const int64_t stride_;
  Buffer<int16_t> q_;
  Buffer<float> scale_;
};

}  // namespace
}  // namespace fastlstm

// Draws a token for a row, by a team of lanes of a warp: the largest logit, to which the noise
// (csrc/draw.h) was added where every token may be drawn. Otherwise the logits are filtered first,
// as in csrc/cpu/draw.cpp, whose comments explain it, and the noise of the kept ones is added then.
//
// All teams of a warp take the same path: a team without a row draws, too, and its result is not
// used.
#pragma once

#include "../shared/numeric.cuh"
#include "draw.h"

namespace fastlstm {
namespace cuda {

struct DrawChoice {
  double temperature, top_p;
  float inverse;  // of the temperature
  float noise;    // its factor in the logits that are sent: the temperature, 0 where they are bare
  bool filters;   // top_k or top_p, not greedy
  int top_k, vocabulary;
  DrawKeys keys;
  int64_t offset;
};

// The noise of a token, in float: it is added to a logit that has no more digits. Of u and 1 - u,
// whose bits are each other's complement, the smaller is exact enough at either end.
__device__ __forceinline__ float gumbel(const DrawRow& row, int token) {
  const uint32_t bits = draw_upper_bits(row, token);
  const uint32_t flip = bits >> 31 ? ~0u : 0;
  const float low = float(draw_low_bits({0, row.low ^ flip})) + 0.5f;
  const float x = fmaf(float(bits ^ flip), 0x1p-32f, low * 0x1p-52f);
  return -logf(flip ? -log1pf(-x) : -logf(x));
}

// The largest of the numbers that the lanes of a team have seen, and its token: the lowest of equal
// ones. NaN and -inf are never it; where there is nothing else, token 0 is.
template <int kLanes, class T>
struct TeamBest {
  static constexpr int kNone = 0x7fffffff;
  T value = T(-INFINITY);
  int token = kNone;

  // A lane sees its tokens in ascending order.
  __device__ __forceinline__ void see(T x, int j) {
    if (x > value) value = x, token = j;
  }

  __device__ __forceinline__ void unite() {
    if constexpr (kLanes == 32 && sizeof(T) == 4) {
      // Integers in the order of the floats; the addition makes one zero of two.
      const uint32_t bits = bits_of(value + 0.0f);
      const uint32_t place = bits >> 31 ? ~bits : bits | 0x80000000U;
      const uint32_t most = largest_of_warp(place);
      token = int(smallest_of_warp(uint32_t(place == most ? token : kNone)));
      value = float_of(most >> 31 ? most & 0x7fffffffU : ~most);
    } else {
#pragma unroll
      for (int d = kLanes / 2; d > 0; d /= 2) {
        const T other = __shfl_xor_sync(~0u, value, d);
        const int at = __shfl_xor_sync(~0u, token, d);
        if (other > value || (other == value && at < token)) value = other, token = at;
      }
    }
    if (token == kNone) token = 0;
  }
};

// Scratch in shared memory for a row's draw: each array has an element for every token.
template <class T>
struct DrawRoom {
  T *values, *ordered;
  int* ranks;
};

__device__ __forceinline__ float exp_of(float x) { return exp2_fast(x * 1.4426950408889634f); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float cooled(float x, const DrawChoice& choice) {
  return x * choice.inverse;
}
__device__ __forceinline__ double cooled(double x, const DrawChoice& choice) {
  return x / choice.temperature;
}

// A draw among the tokens that top_k and top_p keep. Lane l has the tokens l * n to l * n + n - 1,
// and sums run over the lanes in order.
template <int kLanes, class T>
class FilteredDraw {
 public:
  __device__ __forceinline__ FilteredDraw(const DrawChoice& choice, const DrawRoom<T>& room)
      : choice_(choice), room_(room), lane_(int(threadIdx.x) % kLanes) {
    const int each = (choice.vocabulary + kLanes - 1) / kLanes;
    begin_ = min_of(lane_ * each, choice.vocabulary);
    end_ = min_of(begin_ + each, choice.vocabulary);
  }

  // The token, by the logits in room.values, which are overwritten.
  __device__ __forceinline__ int token(const DrawRow& row) {
    TeamBest<kLanes, T> best, drawn;
    for (int j = begin_; j < end_; ++j) best.see(room_.values[j], j);
    best.unite();
    bool ordered = true;
    for (int j = begin_; j < end_; ++j) {
      const T value = cooled(room_.values[j] - best.value, choice_);
      ordered = ordered && value <= 0;
      room_.values[j] = value;
    }
    __syncwarp();
    const int count = tokens_kept();
    for (int j = begin_; j < end_; ++j)
      if (room_.ranks[j] < count) drawn.see(room_.values[j] + gumbel(row, j), j);
    drawn.unite();
    return any(!ordered) ? best.token : drawn.token;  // NaN
  }

 private:
  // Whether any of the team's lanes votes so.
  __device__ __forceinline__ bool any(bool vote) const {
    const unsigned all = __ballot_sync(~0u, vote);
    return kLanes == 32
               ? all != 0
               : (all >> (threadIdx.x % 32 / kLanes * kLanes) & ((1u << kLanes % 32) - 1)) != 0;
  }
  __device__ __forceinline__ T sum_to_lane(T x) const {
#pragma unroll
    for (int d = 1; d < kLanes; d *= 2) {
      const T before = __shfl_sync(~0u, x, int(threadIdx.x) - (lane_ >= d ? d : 0));
      if (lane_ >= d) x += before;
    }
    return x;
  }
  __device__ __forceinline__ T last_of(T x) const {
    return __shfl_sync(~0u, x, int(threadIdx.x) | (kLanes - 1));
  }

  // Ranks the tokens (equal values by index), and returns how many of the likeliest are kept.
  __device__ __forceinline__ int tokens_kept() {
    const int n = choice_.vocabulary;
    for (int j = begin_; j < end_; ++j) {
      const T partial = room_.values[j];
      int rank = 0;
      for (int i = 0; i < n; ++i) {
        const T other = room_.values[i];
        rank += other > partial || (other == partial && i < j);
      }
      room_.ranks[j] = rank;
      room_.ordered[rank] = exp_of(partial);
    }
    __syncwarp();
    const int most = choice_.top_k > 0 && choice_.top_k < n ? choice_.top_k : n;
    if (choice_.top_p >= 1) return most;
    const int end = min_of(end_, most);
    T partial = 0;
    for (int j = begin_; j < end; ++j) partial += room_.ordered[j];
    const T sum = sum_to_lane(partial), bound = T(choice_.top_p) * last_of(sum);
    T before = sum - partial;
    int nucleus = 0;
    for (int j = begin_; j < end; ++j) {
      nucleus += j == 0 || before < bound;
      before += room_.ordered[j];
    }
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2) nucleus += __shfl_xor_sync(~0u, nucleus, d);
    return nucleus;
  }

  const DrawChoice& choice_;
  const DrawRoom<T>& room_;
  const int lane_;
  int begin_, end_;
};

}  // namespace cuda
}  // namespace fastlstm

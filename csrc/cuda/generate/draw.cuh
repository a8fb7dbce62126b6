// Draws a token for a row, by a team of lanes of a warp. The computation is that of
// csrc/cpu/draw.cpp, whose comments explain it.
//
// Lane l has the tokens l * n to l * n + n - 1, and sums run over the lanes in order. All teams of
// a warp take the same path: a team without a row draws, too, and its result is not used.
#pragma once

#include "../shared/numeric.cuh"
#include "draw.h"

namespace fastlstm {
namespace cuda {

struct DrawChoice {
  double temperature, top_p;
  float inverse;  // of the temperature
  int top_k, vocabulary;
  int64_t seed, offset;
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

template <int kLanes, class T>
class TeamDraw {
 public:
  __device__ __forceinline__ TeamDraw(const DrawChoice& choice, const DrawRoom<T>& room)
      : choice_(choice), room_(room), lane_(int(threadIdx.x) % kLanes) {
    const int each = (choice.vocabulary + kLanes - 1) / kLanes;
    begin_ = min_of(lane_ * each, choice.vocabulary);
    end_ = min_of(begin_ + each, choice.vocabulary);
  }

  // The token for a uniform number from 0 to 1, by the logits in room.values, which are
  // overwritten.
  __device__ __forceinline__ int token(T number) {
    T largest = T(-INFINITY);
    int best = choice_.vocabulary;
    for (int j = begin_; j < end_; ++j) {
      const T value = room_.values[j];
      if (value > largest) largest = value, best = j;
    }
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2) {
      const T other = __shfl_xor_sync(~0u, largest, d);
      const int at = __shfl_xor_sync(~0u, best, d);
      if (other > largest || (other == largest && at < best)) largest = other, best = at;
    }
    if (best == choice_.vocabulary) best = 0;
    if (choice_.temperature == 0) return best;

    const bool filters = choice_.top_k > 0 || choice_.top_p < 1;
    bool ordered = true;
    T partial = 0;
    for (int j = begin_; j < end_; ++j) {
      const T value = cooled(room_.values[j] - largest, choice_);
      ordered = ordered && value <= 0;
      const T p = exp_of(value);
      room_.values[j] = filters ? value : p;
      partial += p;
    }
    if (filters) {
      __syncwarp();
      const int count = tokens_kept();
      partial = 0;
      for (int j = begin_; j < end_; ++j) {
        const T p = room_.ranks[j] < count ? exp_of(room_.values[j]) : T(0);
        room_.values[j] = p;
        partial += p;
      }
    }
    // The first token whose cumulative sum exceeds the mark; where rounding leaves none, the last
    // token with a probability above 0.
    const T sum = sum_to_lane(partial);
    const T mark = number * last_of(sum);
    int drawn = best;
    T cumulative = sum - partial;
    for (int j = end_ - 1; j >= begin_; --j)
      if (room_.values[j] > 0) {
        drawn = j;
        break;
      }
    for (int j = begin_; j < end_; ++j) {
      cumulative += room_.values[j];
      if (cumulative > mark && room_.values[j] > 0) {
        drawn = j;
        break;
      }
    }
    const unsigned above = votes(sum > mark && partial > 0), likely = votes(partial > 0);
    const int winner = above ? __ffs(int(above)) - 1 : 31 - __clz(int(likely | 1));
    const int token = __shfl_sync(~0u, drawn, int(threadIdx.x) % 32 / kLanes * kLanes + winner);
    return votes(!ordered) ? best : token;  // NaN
  }

 private:
  // The votes of the team's lanes, one bit each.
  __device__ __forceinline__ unsigned votes(bool vote) const {
    const unsigned all = __ballot_sync(~0u, vote);
    return kLanes == 32 ? all
                        : all >> (threadIdx.x % 32 / kLanes * kLanes) & ((1u << kLanes % 32) - 1);
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

  // Ranks the tokens (equal values by index), and returns choice many of the likeliest are kept.
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

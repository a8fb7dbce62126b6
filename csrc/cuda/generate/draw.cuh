// A draw by a team of lanes of a warp, one team a row: what csrc/cpu/draw.cpp does, whose comments
// say why. Lane l looks after tokens l * n to l * n + n - 1, and sums run over lanes in order. The
// teams of a warp take the same path: where one has nothing to choose, it chooses all the same.
#pragma once

#include "../numeric.cuh"
#include "draw.h"

namespace fastlstm {
namespace cuda {

struct DrawChoice {
  double temperature, top_p;
  float inverse;  // of the temperature
  int top_k, vocabulary;
  int64_t seed, offset;
};

// Room for a row's draw in shared memory: a number for every token each.
template <class T>
struct DrawRoom {
  T *values, *ordered;
  int* ranks;
};

__device__ __forceinline__ float exp_of(float x) { return exp2_fast(x * 1.4426950408889634f); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float cooled(float x, const DrawChoice& how) { return x * how.inverse; }
__device__ __forceinline__ double cooled(double x, const DrawChoice& how) {
  return x / how.temperature;
}

template <int kLanes, class T>
class TeamDraw {
 public:
  __device__ __forceinline__ TeamDraw(const DrawChoice& how, const DrawRoom<T>& room)
      : how_(how), room_(room), lane_(int(threadIdx.x) % kLanes) {
    const int each = (how.vocabulary + kLanes - 1) / kLanes;
    begin_ = min_of(lane_ * each, how.vocabulary);
    end_ = min_of(begin_ + each, how.vocabulary);
  }

  // The token that a number from 0 to 1 picks by the logits in room.values, which are overwritten.
  __device__ __forceinline__ int token(T number) {
    T largest = T(-INFINITY);
    int best = how_.vocabulary;
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
    if (best == how_.vocabulary) best = 0;
    if (how_.temperature == 0) return best;

    const bool filters = how_.top_k > 0 || how_.top_p < 1;
    bool ordered = true;
    T mine = 0;
    for (int j = begin_; j < end_; ++j) {
      const T value = cooled(room_.values[j] - largest, how_);
      ordered = ordered && value <= 0;
      const T p = exp_of(value);
      room_.values[j] = filters ? value : p;
      mine += p;
    }
    if (filters) {
      __syncwarp();
      const int kept = tokens_kept();
      mine = 0;
      for (int j = begin_; j < end_; ++j) {
        const T p = room_.ranks[j] < kept ? exp_of(room_.values[j]) : T(0);
        room_.values[j] = p;
        mine += p;
      }
    }
    // The first token that rises above the mark; where rounding hides it, the last that can be.
    const T sum = sum_to_lane(mine);
    const T mark = number * last_of(sum);
    int drawn = best;
    T heap = sum - mine;
    for (int j = end_ - 1; j >= begin_; --j)
      if (room_.values[j] > 0) {
        drawn = j;
        break;
      }
    for (int j = begin_; j < end_; ++j) {
      heap += room_.values[j];
      if (heap > mark && room_.values[j] > 0) {
        drawn = j;
        break;
      }
    }
    const unsigned above = votes(sum > mark && mine > 0), likely = votes(mine > 0);
    const int winner = above ? __ffs(int(above)) - 1 : 31 - __clz(int(likely | 1));
    const int token = __shfl_sync(~0u, drawn, int(threadIdx.x) % 32 / kLanes * kLanes + winner);
    return votes(!ordered) ? best : token;  // NaN
  }

 private:
  // A bit for every lane of the team.
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

  // Sets ranks, equal values by index, and returns how many of the likeliest stay.
  __device__ __forceinline__ int tokens_kept() {
    const int n = how_.vocabulary;
    for (int j = begin_; j < end_; ++j) {
      const T mine = room_.values[j];
      int rank = 0;
      for (int i = 0; i < n; ++i) {
        const T other = room_.values[i];
        rank += other > mine || (other == mine && i < j);
      }
      room_.ranks[j] = rank;
      room_.ordered[rank] = exp_of(mine);
    }
    __syncwarp();
    const int most = how_.top_k > 0 && how_.top_k < n ? how_.top_k : n;
    if (how_.top_p >= 1) return most;
    const int end = min_of(end_, most);
    T mine = 0;
    for (int j = begin_; j < end; ++j) mine += room_.ordered[j];
    const T sum = sum_to_lane(mine), bound = T(how_.top_p) * last_of(sum);
    T before = sum - mine;
    int nucleus = 0;
    for (int j = begin_; j < end; ++j) {
      nucleus += j == 0 || before < bound;
      before += room_.ordered[j];
    }
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2) nucleus += __shfl_xor_sync(~0u, nucleus, d);
    return nucleus;
  }

  const DrawChoice& how_;
  const DrawRoom<T>& room_;
  const int lane_;
  int begin_, end_;
};

}  // namespace cuda
}  // namespace fastlstm

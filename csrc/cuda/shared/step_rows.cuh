// Which rows a time step has: of all sequences, and of a group of neighbouring sequences.
//
// Packed sequences are sorted, longest first: step t has rows for the first so many of them. A
// group therefore has as many steps as its first sequence, and its rows in a step are neighbours.
//
// A launch may run a range of the steps alone. Its steps are counted from the first of these; rows
// stay those of the whole call.
#pragma once

#include "device.cuh"

namespace fastlstm {
namespace cuda {

// Rows of a group's sequences in one step.
struct GroupRows {
  int64_t first;
  int count;  // sequences of the group that the step has
};

struct StepRows {
  // The first row of each of the call's steps, and of what would follow; null: every step has all
  // sequences.
  const int* first;
  int count, batch;  // steps; sequences of the first step
  int begin = 0;     // where these steps begin among the call's

  __device__ __forceinline__ int64_t first_row(int t) const {
    return first ? first[begin + t] : int64_t(begin + t) * batch;
  }
  __device__ __forceinline__ int sequences(int t) const {
    return first ? first[begin + t + 1] - first[begin + t] : batch;
  }

  // Of up to `most` sequences from `from` on, in step t.
  __device__ __forceinline__ GroupRows group(int t, int from, int most) const {
    int64_t row = int64_t(begin + t) * batch;
    int active = batch;
    if (first) {
      row = first[begin + t];
      active = int(first[begin + t + 1] - row);
    }
    const int left = min_of(active - from, most);
    return {row + from, left > 0 ? left : 0};
  }

  // Steps of sequence b; 0 where there is no such sequence.
  __device__ __forceinline__ int length_of(int b) const {
    if (b >= batch) return 0;
    if (first == nullptr) return count;
    int below = 0, from = count;  // b is in all steps before `below`, and in none from `from` on
    while (below < from) {
      const int middle = (below + from) / 2;
      if (b < sequences(middle))
        below = middle + 1;
      else
        from = middle;
    }
    return below;
  }
};

}  // namespace cuda
}  // namespace fastlstm

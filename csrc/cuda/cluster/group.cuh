// A cluster's share of the batch: a group of neighbouring sequences, and where their rows are.
//
// Packed sequences are sorted, longest first: a group has as many steps as its first sequence.
#pragma once

#include "../rows.cuh"

namespace fastlstm {
namespace cuda {

// Steps of sequence b: those whose batch exceeds it; none where there is no such sequence.
__device__ __forceinline__ int sequence_steps(const RowMap& map, int b) {
  if (b >= map.batch) return 0;
  if (map.first == nullptr) return map.steps;
  int held = 0, beyond = map.steps;  // b is in the steps below `held`, in none from `beyond` on
  while (held < beyond) {
    const int middle = (held + beyond) / 2;
    if (b < map.first[middle + 1] - map.first[middle])
      held = middle + 1;
    else
      beyond = middle;
  }
  return held;
}

// Rows of a group's sequences in one step: neighbours.
struct GroupRows {
  int64_t first;
  int count;  // sequences that are in the step
};

// Of up to `most` sequences from `begin` on, in step t.
__device__ __forceinline__ GroupRows group_rows(const RowMap& map, int t, int begin, int most) {
  int64_t first = int64_t(t) * map.batch;
  int active = map.batch;
  if (map.first) {
    first = map.first[t];
    active = int(map.first[t + 1] - first);
  }
  const int count = min_of(active - begin, most);
  return {first + begin, count > 0 ? count : 0};
}

}  // namespace cuda
}  // namespace fastlstm

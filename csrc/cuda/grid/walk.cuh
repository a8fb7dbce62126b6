// The steps of a group of sequences, in the order in which a direction of a layer takes them.
#pragma once

#include "../numeric.cuh"

namespace fastlstm {
namespace cuda {

// Packed sequences are sorted, longest first: a step has the first so many. The group's steps are
// those of its first sequence. Backwards in time, shorter sequences enter late.
struct GroupWalk {
  const int* starts;  // each step's first row (steps + 1); null: batch * step
  int steps, batch, first, sequences, direction;
  int length;  // steps of the group

  __device__ __forceinline__ GroupWalk(const int* starts_, int steps_, int batch_, int first_,
                                       int sequences_, int direction_)
      : starts(starts_),
        steps(steps_),
        batch(batch_),
        first(first_),
        sequences(sequences_),
        direction(direction_),
        length(steps_) {
    if (starts == nullptr) return;
    int least = 0;  // steps below it have the first sequence
    while (least < length) {
      const int middle = (least + length) / 2;
      if (size(middle) > first)
        least = middle + 1;
      else
        length = middle;
    }
  }

  // Step number s of the walk.
  __device__ __forceinline__ int at(int s) const { return direction == 0 ? s : length - 1 - s; }
  // The row of the group's first sequence, in a step that has it.
  __device__ __forceinline__ int64_t row(int t) const {
    return (starts ? int64_t(starts[t]) : int64_t(t) * batch) + first;
  }
  // How many of the group's sequences step t has; none outside the steps.
  __device__ __forceinline__ int count(int t) const {
    if (t < 0 || t >= steps) return 0;
    const int n = size(t) - first;
    return n < 0 ? 0 : min_of(n, sequences);
  }

 private:
  __device__ __forceinline__ int size(int t) const {
    return starts ? starts[t + 1] - starts[t] : batch;
  }
};

// What the CTA's threads know of the steps around the one that runs: one thread finds it out, some
// steps ahead, so that nobody else waits for a table in global memory.
class GroupSteps {
 public:
  static constexpr int kAhead = 5;
  static constexpr int kBytes = 8 * 16;

  __device__ __forceinline__ explicit GroupSteps(unsigned char* shared)
      : steps_(reinterpret_cast<Step*>(shared)) {}

  // Step `s` of the walk, by one thread, behind the barrier of step s - kAhead. Eight steps are
  // kept: the one that this takes the place of was last read before that barrier.
  __device__ __forceinline__ void find(const GroupWalk& walk, int s) const {
    const int t = walk.at(s), active = s < walk.length ? walk.count(t) : 0;
    steps_[s & 7] = {active > 0 ? walk.row(t) : 0, active};
  }
  __device__ __forceinline__ void begin(const GroupWalk& walk) const {
    steps_[7] = {0, 0};
    for (int s = 0; s < kAhead; ++s) find(walk, s);
  }

  // The row of the group's first sequence in step s, and how many of its sequences take part. Of
  // the steps from s - 1 to s + kAhead - 1 while step s runs.
  __device__ __forceinline__ int64_t row(int s) const { return steps_[s & 7].row; }
  __device__ __forceinline__ int active(int s) const { return steps_[s & 7].active; }

 private:
  struct alignas(16) Step {
    int64_t row;
    int active;
  };
  Step* steps_;
};

}  // namespace cuda
}  // namespace fastlstm

// The steps of a group of sequences, in the order in which one direction of a layer takes them.
#pragma once

#include "../shared/step_rows.cuh"
#include "shapes.h"

namespace fastlstm {
namespace cuda {

// Backwards in time, shorter sequences of a group enter late.
struct GroupWalk {
  const StepRows steps;
  const int first, sequences, direction;  // the group's first sequence; how many it has at most
  const int length;                       // steps of the group: those of its first sequence

  __device__ __forceinline__ GroupWalk(const StepRows& steps_, int first_, int sequences_,
                                       int direction_)
      : steps(steps_),
        first(first_),
        sequences(sequences_),
        direction(direction_),
        length(steps_.length_of(first_)) {}

  // The time step of the walk's step s.
  __device__ __forceinline__ int time(int s) const { return direction == 0 ? s : length - 1 - s; }
  // The group's rows in it; none beyond the last step.
  __device__ __forceinline__ GroupRows rows(int s) const {
    // Not StepRows::group(), with which the backward kernel needs a register more than there are.
    const int t = time(s);
    int active = 0;
    if (s < length) {
      const int left = steps.sequences(t) - first;
      active = left < 0 ? 0 : min_of(left, sequences);
    }
    return {active > 0 ? steps.first_row(t) + first : 0, active};
  }
};

// The rows of the steps around the one that runs, in shared memory. One thread looks them up some
// steps ahead, so that no other thread waits for a table in global memory.
class GroupSteps {
 public:
  static constexpr int kAhead = 5, kSlots = 8;

  __device__ __forceinline__ explicit GroupSteps(unsigned char* shared)
      : slots_(reinterpret_cast<Slot*>(shared)) {}

  // Step s of the walk, by one thread, behind the barrier of step s - kAhead. The slot that it
  // overwrites is that of step s - kSlots, which was last read before that barrier.
  __device__ __forceinline__ void look_up(const GroupWalk& walk, int s) const {
    slots_[s & (kSlots - 1)].rows = walk.rows(s);
  }
  __device__ __forceinline__ void begin(const GroupWalk& walk) const {
    slots_[kSlots - 1].rows = {0, 0};  // step -1
    for (int s = 0; s < kAhead; ++s) look_up(walk, s);
  }

  // The row of the group's first sequence in step s, and how many of its sequences take part. While
  // step s0 runs, s may be s0 - 1 to s0 + kAhead - 1.
  __device__ __forceinline__ int64_t row(int s) const { return slot(s).rows.first; }
  __device__ __forceinline__ int active(int s) const { return slot(s).rows.count; }

 private:
  struct alignas(16) Slot {
    GroupRows rows;
  };
  static_assert(kSlots * sizeof(Slot) == kGridStepsBytes, "the layouts of shared memory hold it");
  __device__ __forceinline__ const Slot& slot(int s) const { return slots_[s & (kSlots - 1)]; }

  Slot* slots_;
};

}  // namespace cuda
}  // namespace fastlstm

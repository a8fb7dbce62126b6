// Threads that run a sequence of steps together.
//
// A parallel region may start fewer threads than requested, or run their work one after the other
// in a single thread. So a team never waits for a thread that has not arrived: the first thread
// begins alone, a later one becomes a member at the next step, and one that arrives after the last
// step returns at once. Within a step each member begins with its own part of the work, the same
// one in every step, whose data stays in its core's cache; then it takes work from slower members,
// of its nearest neighbours alone: it would read a cache line of every member otherwise.
#pragma once

#include <sched.h>
#include <stdint.h>

namespace fastlstm {
namespace {

class Team {
 public:
  static constexpr int kMaxMembers = 64;

  explicit Team(int64_t steps) { begin(steps); }

  // Starts a new sequence of steps. No thread may be in run().
  void begin(int64_t steps) {
    steps_ = steps;
    step_ = 0;
    size_ = admitted_ = 1;
    arrived_ = 0;
  }

  // Calls body(step, member) in every member for every step that the member takes part in. All must
  // make the same calls of share() and barrier(), with a barrier() between two share(). At the end
  // of a step is a barrier, in which one member calls between(step) while the others wait.
  template <class F, class Between>
  void run(F&& body, Between&& between) {
    const int member = __atomic_fetch_add(&arrived_, 1, __ATOMIC_ACQ_REL);
    wait([&] { return member < __atomic_load_n(&admitted_, __ATOMIC_ACQUIRE); });
    while (step_ < steps_) {
      body(step_, member);
      barrier([&] {
        between(step_);
        ++step_;
        size_ = step_ < steps_ ? __atomic_load_n(&arrived_, __ATOMIC_ACQUIRE) : kFinished;
      });
      // Not inside the barrier: a new member could take its end for the end of the next one.
      if (member == 0) __atomic_store_n(&admitted_, size_, __ATOMIC_RELEASE);
    }
  }

  // Waits until all members have arrived.
  void barrier() {
    barrier([] {});
  }

  // Calls f(j) for every j in [0, n), divided among the members.
  template <class F>
  void share(int member, int64_t n, F&& f) {
    if (size_ == 1) {
      for (int64_t j = 0; j < n; ++j) f(j);
      return;
    }
    for (int j = 0; j < size_ && j < kHelped; ++j) {
      const int owner = (member + j) % size_;
      const int64_t begin = n * owner / size_, count = n * (owner + 1) / size_ - begin;
      int64_t* taken = &parts_[owner].taken;
      while (__atomic_load_n(taken, __ATOMIC_RELAXED) < count) {
        const int64_t next = __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED);
        if (next < count) f(begin + next);
      }
    }
  }

  // Calls f(begin, end) for ranges that together are [0, n): one range for a single member, a few
  // ranges for each of several.
  template <class F>
  void share_ranges(int member, int64_t n, F&& f) {
    const int64_t ranges = size_ == 1 || n == 0 ? 1 : n < 4 * size_ ? n : 4 * size_;
    share(member, ranges, [&](int64_t j) { f(n * j / ranges, n * (j + 1) / ranges); });
  }

 private:
  static constexpr int kFinished = INT32_MAX;  // admits every thread that still arrives
  static constexpr int kSpins = 2000;
  static constexpr int kHelped = 8;  // members whose work one takes, itself included

  // The last member to arrive calls `between`. It resets the counters before it releases the
  // others, so a member that is already at the next barrier is counted there.
  template <class F>
  void barrier(F&& between) {
    if (size_ == 1) return between();
    const uint32_t generation = __atomic_load_n(&generation_, __ATOMIC_ACQUIRE);
    const int size = size_;
    if (__atomic_add_fetch(&waiting_, 1, __ATOMIC_ACQ_REL) == size) {
      __atomic_store_n(&waiting_, 0, __ATOMIC_RELAXED);
      for (int j = 0; j < size; ++j) __atomic_store_n(&parts_[j].taken, 0, __ATOMIC_RELAXED);
      between();
      __atomic_store_n(&generation_, generation + 1, __ATOMIC_RELEASE);
    } else {
      wait([&] { return __atomic_load_n(&generation_, __ATOMIC_ACQUIRE) != generation; });
    }
  }

  template <class Done>
  static void wait(Done&& done) {
    for (int spins = 0; !done(); ++spins) {
      if (spins > kSpins) {
        sched_yield();  // there may be more threads than cores
      } else {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
    }
  }

  struct alignas(64) Part {
    int64_t taken;  // how many j of a member's part of share() have been taken
  };

  int64_t steps_ = 0, step_ = 0;
  int size_ = 1;                         // members of this step
  alignas(64) int arrived_ = 0;          // threads that called run()
  alignas(64) int admitted_ = 1;         // threads that may be members, in the order of arrival
  alignas(64) int waiting_ = 0;          // members in the barrier
  alignas(64) uint32_t generation_ = 0;  // how many barriers have ended
  Part parts_[kMaxMembers] = {};
};

}  // namespace
}  // namespace fastlstm

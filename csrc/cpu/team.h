// Threads that work through a sequence of steps together: as many as come, when they come.
//
// A parallel region may run fewer workers than asked, or one after the other in a single thread,
// so nobody here waits for a thread that has not arrived. The first one to join begins alone;
// whoever joins later is counted in from the next step on; who comes after the end goes home.
// Within a step each member starts on a part of its own, the same ones every time, so that they
// stay in its core's cache, and then helps those that are slower.
#pragma once

#include <sched.h>
#include <stdint.h>

namespace fastlstm {
namespace {

class Team {
 public:
  static constexpr int kMost = 64;  // members

  explicit Team(int64_t steps) { begin(steps); }

  // A new sequence of steps, once everybody has gone home from the last.
  void begin(int64_t steps) {
    steps_ = steps;
    step_ = 0;
    size_ = admitted_ = 1;
    arrived_ = 0;
  }

  // Calls body(step, member) in every member for every step that the member takes part in. Each
  // must come to the same calls of share() and meet(), with one meet() between two share(). Once
  // all have come to the step's end, one calls between(step) while the others wait.
  template <class F, class Between>
  void work(F&& body, Between&& between) {
    const int member = __atomic_fetch_add(&arrived_, 1, __ATOMIC_ACQ_REL);
    wait([&] { return member < __atomic_load_n(&admitted_, __ATOMIC_ACQUIRE); });
    while (step_ < steps_) {
      body(step_, member);
      meet([&] {
        between(step_);
        ++step_;
        size_ = step_ < steps_ ? __atomic_load_n(&arrived_, __ATOMIC_ACQUIRE) : kOver;
      });
      // Only now: a newcomer let in during the meeting could take its end for that of the next.
      if (member == 0) __atomic_store_n(&admitted_, size_, __ATOMIC_RELEASE);
    }
  }

  // Waits until all members have come here.
  void meet() {
    meet([] {});
  }

  // f(j) for every j in [0, n), divided among the members.
  template <class F>
  void share(int member, int64_t n, F&& f) {
    if (size_ == 1) {
      for (int64_t j = 0; j < n; ++j) f(j);
      return;
    }
    for (int other = 0; other < size_; ++other) {
      const int owner = (member + other) % size_;
      const int64_t begin = n * owner / size_, count = n * (owner + 1) / size_ - begin;
      int64_t* taken = &parts_[owner].taken;
      while (__atomic_load_n(taken, __ATOMIC_RELAXED) < count) {
        const int64_t j = __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED);
        if (j < count) f(begin + j);
      }
    }
  }

  // f(begin, end) for ranges that make up [0, n): the whole for one member alone, a few for each
  // of several.
  template <class F>
  void share_ranges(int member, int64_t n, F&& f) {
    const int64_t ranges = size_ == 1 || n == 0 ? 1 : n < 4 * size_ ? n : 4 * size_;
    share(member, ranges, [&](int64_t j) { f(n * j / ranges, n * (j + 1) / ranges); });
  }

 private:
  static constexpr int kOver = INT32_MAX;
  static constexpr int kSpins = 2000;

  // The last to come calls `between` while the others wait. It resets the counters before it
  // lets anyone go on, so a member who is already at the next meeting cannot be miscounted.
  template <class F>
  void meet(F&& between) {
    if (size_ == 1) return between();
    const uint32_t round = __atomic_load_n(&round_, __ATOMIC_ACQUIRE);
    const int size = size_;
    if (__atomic_add_fetch(&waiting_, 1, __ATOMIC_ACQ_REL) == size) {
      __atomic_store_n(&waiting_, 0, __ATOMIC_RELAXED);
      for (int j = 0; j < size; ++j) __atomic_store_n(&parts_[j].taken, 0, __ATOMIC_RELAXED);
      between();
      __atomic_store_n(&round_, round + 1, __ATOMIC_RELEASE);
    } else {
      wait([&] { return __atomic_load_n(&round_, __ATOMIC_ACQUIRE) != round; });
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
    int64_t taken;
  };

  int64_t steps_ = 0, step_ = 0;
  int size_ = 1;
  alignas(64) int arrived_ = 0;
  alignas(64) int admitted_ = 1;
  alignas(64) int waiting_ = 0;
  alignas(64) uint32_t round_ = 0;
  Part parts_[kMost] = {};
};

}  // namespace
}  // namespace fastlstm

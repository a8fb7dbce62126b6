// Threads that run a sequence of steps together.
//
// A parallel region may start fewer threads than requested, or run their work one after the other
// in a single thread. So a team never depends on a thread that has not arrived: the first thread
// waits a moment for the others, a later one becomes a member at the next step, and one that
// arrives after the last step returns at once.
//
// Members meet at the end of every share(). What a cache line costs to go from one core to another
// (20 ns within a complex of cores, 270 ns between two) is most of a small step, so a member writes
// to lines of its own alone, and what all read changes rarely. They meet in rounds: in round r
// member m waits for member m - 2^r, so that after log2(size) rounds each has heard of all
// (a dissemination barrier: Hensgen, Finkel, Manber, "Two algorithms for barrier synchronization",
// 1988). With two members that is one line each way, at the same time.
//
// Each member begins with its own part of the work, the same one in every step, whose data stays in
// its core's cache. A member that has waited for long takes work from slower ones, of its nearest
// neighbours alone: it would read a cache line of every member otherwise.
#pragma once

#include <sched.h>
#include <stdint.h>

namespace fastlstm {
namespace {

class Team {
 public:
  static constexpr int kMaxMembers = 64;

  // A thread's place in the team. Its owner alone reads and writes it.
  class Member {
    friend class Team;
    int number = 0, size = 1;  // size: of the team in this step
    int64_t meetings = 0;      // how often the members have met
  };

  Team(int64_t steps, int64_t expected) { begin(steps, expected); }

  // Starts a new sequence of steps, for which so many threads are expected. No thread may be in
  // run().
  void begin(int64_t steps, int64_t expected) {
    steps_ = steps;
    expected_ = int(expected);
    first_step_ = 0;
    arrived_ = 0;
    admitted_ = 0;
  }

  // Calls body(step, member) in every member for every step that the member takes part in. All make
  // the same calls of share().
  template <class F>
  void run(F&& body) {
    Member member;
    member.number = __atomic_fetch_add(&arrived_, 1, __ATOMIC_ACQ_REL);
    if (member.number == 0)
      gather();
    else
      wait([&] { return member.number < __atomic_load_n(&admitted_, __ATOMIC_ACQUIRE); }, [] {});
    member.meetings = first_meetings_;
    for (int64_t step = first_step_; step < steps_; ++step) {
      member.size = size_[step % 2];
      // Of the next step. The others read it after they have met in this one.
      int* const next = &size_[(step + 1) % 2];
      if (member.number == 0) {
        const int arrived = __atomic_load_n(&arrived_, __ATOMIC_ACQUIRE);
        if (*next != arrived) *next = arrived;
      }
      const int64_t before = member.meetings;
      body(step, member);
      if (member.size > 1 && member.meetings == before) meet(member, [] {});
      if (member.number == 0 && *next != member.size && step + 1 < steps_)
        admit(step + 1, member.meetings, *next);
    }
    if (member.number == 0) admit(steps_, member.meetings, kFinished);
  }

  // Calls f(j) for every j in [0, n), divided among the members, and returns when all are done.
  template <class F>
  void share(Member& member, int64_t n, F&& f) {
    if (member.size == 1) {
      for (int64_t j = 0; j < n; ++j) f(j);
      return;
    }
    // Runs one more piece of an owner's part, if there is one.
    const auto run_piece = [&, meeting = member.meetings](int owner) {
      const int64_t begin = n * owner / member.size, end = n * (owner + 1) / member.size;
      const int64_t piece = take(parts_[owner].taken, meeting, end - begin);
      if (piece >= 0) f(begin + piece);
      return piece >= 0;
    };
    Part& part = parts_[member.number];
    int64_t pieces = n * (member.number + 1) / member.size - n * member.number / member.size;
    while (pieces > 0 && run_piece(member.number)) --pieces;
    if (pieces > 0) {  // others took them
      part.lost += pieces;
      wait([&] { return __atomic_load_n(&part.helped, __ATOMIC_ACQUIRE) == part.lost; });
    }
    meet(member, [&] {
      for (int j = 1; j < member.size && j < kHelped; ++j) {
        const int owner = (member.number + j) % member.size;
        while (run_piece(owner)) __atomic_fetch_add(&parts_[owner].helped, 1, __ATOMIC_RELEASE);
      }
    });
  }

  // The same for ranges f(begin, end) that together are [0, n): one range for a single member, a
  // few ranges for each of several.
  template <class F>
  void share_ranges(Member& member, int64_t n, F&& f) {
    const int64_t few = 4 * int64_t(member.size);
    const int64_t ranges = member.size == 1 || n == 0 ? 1 : n < few ? n : few;
    share(member, ranges, [&](int64_t j) { f(n * j / ranges, n * (j + 1) / ranges); });
  }

 private:
  static constexpr int kFinished = INT32_MAX;  // admits every thread that still arrives
  static constexpr int kRounds = 6;            // 2^kRounds = kMaxMembers
  static constexpr int kHelped = 8;            // members whose work one takes, itself included
  // How often a thread looks for what it waits for (a pause is 10 to 45 ns): before it begins
  // without those that have not arrived, before it helps others, before it gives its core away.
  static constexpr int kGatherSpins = 200, kPatience = 100, kSpins = 2000;

  struct Part {
    // What a member writes when it meets the others: for each round, in which meeting it is there.
    alignas(64) int64_t reached[kRounds];
    // Pieces of the member's part that were taken: the meeting at their end, and their number.
    alignas(64) uint64_t taken;
    // In all meetings: pieces that others have done, and pieces that the member found taken.
    int64_t helped, lost;
  };

  // The first thread waits a moment for the others.
  void gather() {
    auto arrived = [&] { return __atomic_load_n(&arrived_, __ATOMIC_ACQUIRE); };
    for (int spins = 0; spins < kGatherSpins && arrived() < expected_; ++spins) pause();
    size_[0] = arrived();
    admit(0, first_meetings_, size_[0]);
  }

  void admit(int64_t first_step, int64_t first_meetings, int size) {
    first_step_ = first_step;
    first_meetings_ = first_meetings;
    __atomic_store_n(&admitted_, size, __ATOMIC_RELEASE);
  }

  // The next of `count` pieces that are done before a meeting, or -1. A thread may still look for
  // pieces of a meeting that all others have left.
  static int64_t take(uint64_t& taken, int64_t meeting, int64_t count) {
    uint64_t word = __atomic_load_n(&taken, __ATOMIC_RELAXED);
    const uint64_t none = uint64_t(meeting) << 32;
    do {
      const int64_t next = word < none ? 0 : int64_t(word - none);
      if (next >= count) return -1;
      const uint64_t with_next = none + uint64_t(next) + 1;
      if (__atomic_compare_exchange_n(&taken, &word, with_next, true, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED))
        return next;
    } while (true);
  }

  // Waits until all members are here. help: what to do if that takes long.
  template <class Help>
  void meet(Member& member, Help&& help) {
    const int64_t meeting = ++member.meetings;
    for (int round = 0, reach = 1; reach < member.size; ++round, reach *= 2) {
      const int other = (member.number + member.size - reach) % member.size;
      __atomic_store_n(&parts_[member.number].reached[round], meeting, __ATOMIC_RELEASE);
      wait(
          [&] {
            return __atomic_load_n(&parts_[other].reached[round], __ATOMIC_ACQUIRE) >= meeting;
          },
          help);
    }
  }

  template <class Done>
  static void wait(Done&& done) {
    wait(done, [] {});
  }
  template <class Done, class Help>
  static void wait(Done&& done, Help&& help) {
    for (int spins = 0; !done(); ++spins) {
      if (spins == kPatience) help();
      if (spins > kSpins)
        sched_yield();  // there may be more threads than cores
      else
        pause();
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  // Written before the steps, or when a thread joins.
  int64_t steps_ = 0;
  int expected_ = 1;
  int size_[2] = {1, 1};    // members of even steps, and of odd ones
  int64_t first_step_ = 0;  // of who is admitted next, and how often the members have met then
  int64_t first_meetings_ = 0;
  alignas(64) int arrived_ = 0;   // threads that called run()
  alignas(64) int admitted_ = 0;  // threads that may be members, in the order of arrival
  Part parts_[kMaxMembers] = {};
};

}  // namespace
}  // namespace fastlstm

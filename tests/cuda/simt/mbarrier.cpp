// mbarriers: arrivals and bytes of phases, and the threads that wait for a phase's end.
#include <algorithm>
#include <map>
#include <unordered_map>

#include "copies.h"
#include "exchange_state.h"
#include "race.h"
#include "scheduler.h"

namespace simt {

namespace {

constexpr unsigned long long kMark = 0x6d62617272696572;  // the contents of an mbarrier's memory
constexpr long kMost = (1 << 20) - 1;  // the most arrivals, and bytes, of a phase

struct Counter {
  const Block* block;
  uint32_t offset;
  unsigned arrivals, missing;  // of each phase; of the current phase, those that have not come
  long bytes = 0;              // announced, not arrived; below 0: arrived, not announced
  uint32_t phase = 0;          // the current one
  unsigned initialiser;
  std::map<unsigned, uint32_t> from_peers;  // by thread of another CTA: its last arrival's time
  bool published = false;
  std::vector<Thread*> waiting;
  // For the race checker. Copies that phase p counts end at the actor's time p + 1.
  unsigned actor = 0;
  uint32_t last_copies = 0;  // that time, for the last copies started
  race::Joined joined;       // the arrivals and starts of copies in the current phase
  race::Shared before;       // what happened before the end of the previous phase
  std::vector<std::pair<unsigned, uint32_t>> waits;  // for that end: thread and time
};

std::unordered_map<const void*, Counter> counters;
// By block: the copies that read its shared memory, each as its mbarrier and the actor's time.
std::map<const Block*, std::map<const void*, uint32_t>> copies_from;

std::string name_of(const Counter& c) {
  return "the mbarrier at shared+" + std::to_string(c.offset) + " of block " +
         std::to_string(c.block->rank);
}

Counter& find(const void* at, const void* code) {
  const auto it = counters.find(at);
  if (it == counters.end()) fail("an mbarrier is used that was not initialised");
  Counter& c = it->second;
  if (*static_cast<const unsigned long long*>(at) != kMark) fail(name_of(c) + " was overwritten");
  if (!c.published) fail(name_of(c) + " is used before publish_mbarriers");
  race::access_packet(uintptr_t(at), sizeof kMark, false, code);  // after its initialisation
  return c;
}

// An arrival, or the start of a copy, by the running thread. It may count in no phase but this one.
void join(Counter& c, const char* what) {
  if (!race::knows(c.actor, c.phase))
    fail(std::string(what) + " for phase " + std::to_string(c.phase) + " of " + name_of(c) +
         " may come in the phase before");
  race::join(c.joined);
}

void end_phase_if_complete(Counter& c) {
  if (c.missing > 0) return;
  if (c.bytes < 0) stop("more bytes arrive at " + name_of(c) + " than were announced");
  if (c.bytes > 0) return;
  ++c.phase;
  c.missing = c.arrivals;
  c.before = race::end_phase(c.joined, c.actor, c.phase);
  for (const auto& w : c.waits)
    if (c.before && (*c.before)[w.first] < w.second)
      stop("phase " + std::to_string(c.phase - 1) + " of " + name_of(c) + " may end before " +
           race::name_of(w.first) + " has seen the end of the phase before");
  c.waits.clear();
  for (Thread* thread : c.waiting) wake(thread);
  c.waiting.clear();
}

void see_end(Counter& c) {
  race::learn(c.before);
  if (c.before) c.waits.push_back({self->id, race::now()});
}

void check_wait(const Counter& c, unsigned parity) {
  if (c.block != self->block) fail("a wait for another CTA's mbarrier");
  if (parity > 1) fail("a wait for parity " + std::to_string(parity));
}

}  // namespace

void forget_mbarriers() {
  counters.clear();
  copies_from.clear();
}

std::string mbarrier_report(const void* at) {
  const Counter& c = counters.at(at);
  return name_of(c) + ", phase " + std::to_string(c.phase) + " lacks " + std::to_string(c.missing) +
         " arrivals and " + std::to_string(c.bytes) + " bytes";
}

void mbarrier_init(void* at, unsigned arrivals) {
  const uint32_t offset = offset_in_shared(at);
  if (offset % 8 != 0 || offset + 8 > self->block->shared_bytes)
    fail("an mbarrier at shared+" + std::to_string(offset));
  if (arrivals < 1 || arrivals > kMost)
    fail("an mbarrier of " + std::to_string(arrivals) + " arrivals");
  if (counters.count(at)) fail(name_of(counters.at(at)) + " is initialised twice");
  Counter c{};
  c.block = self->block;
  c.offset = offset;
  c.arrivals = c.missing = arrivals;
  c.initialiser = self->id;
  if (race::active()) c.actor = race::new_actor("the copies that " + name_of(c) + " counts");
  race::access(uintptr_t(at), sizeof kMark, true, __builtin_return_address(0));
  counters.emplace(at, c);
  *static_cast<unsigned long long*>(at) = kMark;
}

void mbarrier_publish() {
  for (auto& c : counters)
    if (c.second.initialiser == self->id) c.second.published = true;
}

namespace {

void arrive(Counter& c, unsigned bytes) {
  if (c.missing == 0)
    fail("more arrivals at " + name_of(c) + " than the " + std::to_string(c.arrivals) +
         " of a phase");
  join(c, "an arrival");
  --c.missing;
  c.bytes += bytes;
  if (c.bytes > kMost) fail("more bytes announced to " + name_of(c) + " than it can count");
  end_phase_if_complete(c);
}

}  // namespace

void mbarrier_arrive(void* at, unsigned bytes) {
  Counter& c = find(at, __builtin_return_address(0));
  if (c.block != self->block) fail("an arrival at another CTA's mbarrier");
  arrive(c, bytes);
}

void mbarrier_arrive_at(unsigned rank, uint32_t offset) {
  const void* code = __builtin_return_address(0);
  Counter& c = find(in_shared(peer(rank), offset, 8, "an arrival"), code);
  if (c.block != self->block) c.from_peers[self->id] = race::now();
  arrive(c, 0);
}

void mbarrier_count(const void* at, unsigned bytes, uint32_t phase) {
  Counter& c = counters.at(at);
  if (c.phase != phase)
    stop("bytes that were sent in phase " + std::to_string(phase) + " of " + name_of(c) +
         " arrive in phase " + std::to_string(c.phase));
  c.bytes -= bytes;
  if (c.bytes < -kMost) stop("more bytes arrive at " + name_of(c) + " than it can count");
  end_phase_if_complete(c);
}

race::Act mbarrier_copies(const void* at, const Block* source, bool bulk, const void* code) {
  Counter& c = find(at, code);
  join(c, "a copy");
  c.last_copies = c.phase + 1;
  if (source) copies_from[source][at] = c.last_copies;
  return {c.actor, c.last_copies, bulk};
}

void check_copies_at_exit() {
  if (counters.empty()) return;  // clocks of all threads for each CTA are much in a large grid
  const Block* block = self->block;
  race::barrier(threads_of(*block));
  for (const auto& entry : counters) {
    const Counter& c = entry.second;
    if (c.block != block) continue;
    if (c.bytes < 0)
      fail("at the exit of a CTA, more bytes have come to " + name_of(c) + " than were announced");
    if (!race::knows(c.actor, c.last_copies))
      fail("a CTA may exit before copies have come to " + name_of(c));
    for (const auto& arrival : c.from_peers)
      if (!race::knows(arrival.first, arrival.second))
        fail("a CTA may exit before arrivals have come to " + name_of(c));
  }
  for (const auto& entry : copies_from[block]) {
    const Counter& c = counters.at(entry.first);
    if (!race::knows(c.actor, entry.second))
      fail("a CTA may exit before copies have left it for " + name_of(c));
  }
}

bool mbarrier_try_wait(const void* at, unsigned parity, const char* file, int line) {
  Counter& c = find(at, __builtin_return_address(0));
  check_wait(c, parity);
  if ((c.phase & 1) == parity) {
    self->mbarrier = at;
    yield("try_wait", line, file);
    self->mbarrier = nullptr;
    if ((c.phase & 1) == parity) return false;
  }
  see_end(c);
  return true;
}

void mbarrier_wait(const void* at, unsigned parity, const char* file, int line) {
  Counter& c = find(at, __builtin_return_address(0));
  check_wait(c, parity);
  if ((c.phase & 1) == parity) {
    const uint32_t awaited = c.phase;
    self->where = "wait";
    self->file = file;
    self->line = line;
    self->mbarrier = at;
    c.waiting.push_back(self);
    sleep();
    self->mbarrier = nullptr;
    if (c.phase != awaited + 1)
      fail("a thread that waits for phase " + std::to_string(awaited) + " of " + name_of(c) +
           " missed its end: phase " + std::to_string(c.phase) + " runs");
  }
  see_end(c);
}

}  // namespace simt

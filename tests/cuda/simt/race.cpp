#include "race.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <unordered_map>

#include "scheduler.h"

namespace simt {
namespace race {
namespace {

// A thread's vector clock: its time, and in `base` those of the other threads that it knows.
// Threads that passed a barrier share one base, which makes barriers cheap.
struct Clock {
  Shared base;
  uint32_t time = 1;
};

struct Shadow {
  uint32_t writer = 0, write_time = 0, reader = 0, read_time = 0;
  const void *write_code = nullptr, *read_code = nullptr;
  bool packet = false;  // written as such
  struct Reader {
    uint32_t who, time;
    const void* code;
  };
  std::vector<Reader> readers;  // further ones, by number
};

constexpr size_t kReports = 8, kGrain = 2;
constexpr size_t kChunk = 1024;  // shadows allocated together, at the first access to one of them

struct Region {
  uintptr_t begin, end;
  std::string name;
  std::vector<std::unique_ptr<Shadow[]>> chunks;

  size_t shadows() const { return (end - begin + kGrain - 1) / kGrain; }
  Shadow& shadow(size_t j) {
    auto& chunk = chunks[j / kChunk];
    if (!chunk) chunk.reset(new Shadow[kChunk]);
    return chunk[j % kChunk];
  }
};

bool on = false;
unsigned thread_count;
long races;
std::string first_report;
std::set<std::pair<const void*, const void*>> reported;
std::vector<Clock> clocks;
std::vector<std::string> actors;            // their names; they are numbered after the threads
std::vector<std::vector<uint32_t>> fences;  // by thread: when it fenced for bulk copies
struct {
  Shared base, from, sum;
} learned;  // the last result, for threads that share a base
std::vector<Times> released,
    acquired;  // by fences: what later stores publish, what loads have seen
std::unordered_map<const void*, Times> published;  // by address
std::map<uintptr_t, Region> regions;
Region* last = nullptr;

uint32_t known(unsigned by, unsigned of) {
  if (of == by) return clocks[by].time;
  const Times& base = *clocks[by].base;
  return of < base.size() ? base[of] : 0;
}

Times times_of(unsigned thread) {
  Times t = *clocks[thread].base;
  t[thread] = clocks[thread].time;
  return t;
}

void merge(Times& into, const Times& from) {
  if (from.empty()) return;
  if (into.empty()) {
    into = from;
    return;
  }
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t j = 0; j < from.size(); ++j) into[j] = std::max(into[j], from[j]);
}

void learn_times(unsigned thread, const Times& from) {
  if (from.empty()) return;
  Times t = times_of(thread);
  merge(t, from);
  clocks[thread].base = std::make_shared<const Times>(std::move(t));
}

std::string source_line(const void* code) {
  Dl_info info;
  if (!dladdr(code, &info)) return "?";
  const long offset = static_cast<const char*>(code) - 1 - static_cast<char*>(info.dli_fbase);
  char command[512], line[512];
  snprintf(command, sizeof command, "addr2line -i -e %s %lx 2>/dev/null", info.dli_fname, offset);
  std::string place = "?";
  if (FILE* pipe = popen(command, "r")) {
    while (fgets(line, sizeof line, pipe)) {
      if (std::strstr(line, "/dialect.h:") || std::strstr(line, "/exchange.h:")) continue;
      if (place == "?") place = std::string(line, std::strcspn(line, " \n"));
    }
    pclose(pipe);
  }
  const size_t slash = place.rfind('/');
  return slash == std::string::npos ? place : place.substr(slash + 1);
}

void report(const Region& region, size_t index, const char* what, unsigned other,
            const void* other_code, const void* code) {
  ++races;
  if (reported.size() >= kReports || !reported.insert({other_code, code}).second) return;
  if (first_report.empty())
    first_report = std::string(what) + " on " + region.name + "+" + std::to_string(index * kGrain) +
                   ": " + name_of(other) + " at " + source_line(other_code) + ", then " +
                   name_of(self->id) + " at " + source_line(code);
}

Region* region_of(uintptr_t address) {
  if (last && address >= last->begin && address < last->end) return last;
  auto it = regions.upper_bound(address);
  if (it == regions.begin()) return nullptr;
  --it;
  return address < it->second.end ? last = &it->second : nullptr;
}

struct Access {
  unsigned who;  // the running thread, or an actor in its name
  uint32_t time;
  bool packet, bulk;
  const void* code;
};

bool unseen(uint32_t who, uint32_t time) {
  return time && who != self->id && known(self->id, who) < time;
}

void write_shadow(Shadow& x, const Region& region, size_t at, const Access& a) {
  if (unseen(x.writer, x.write_time) && !(a.packet && x.packet))
    report(region, at, "write after write", x.writer, x.write_code, a.code);
  if (unseen(x.reader, x.read_time))
    report(region, at, "write after read", x.reader, x.read_code, a.code);
  for (const auto& r : x.readers)
    if (unseen(r.who, r.time)) {
      report(region, at, "write after read", r.who, r.code, a.code);
      break;
    }
  x.writer = a.who;
  x.write_time = a.time;
  x.write_code = a.code;
  x.packet = a.packet;
  x.read_time = 0;
  x.readers.clear();
}

// Whether the thread that stored has fenced afterwards, and the running thread knows of the fence.
bool fenced(const Shadow& x) {
  if (x.write_time == 0 || x.writer >= thread_count) return true;
  const auto& times = fences[x.writer];
  const auto fence = std::lower_bound(times.begin(), times.end(), x.write_time);
  return fence != times.end() && *fence < known(self->id, x.writer);
}

void read_shadow(Shadow& x, const Region& region, size_t at, const Access& a) {
  if (unseen(x.writer, x.write_time) && !(a.packet && x.packet))
    report(region, at, "read after write", x.writer, x.write_code, a.code);
  else if (a.bulk && !fenced(x))
    report(region, at, "bulk copy of a store without fence_async_copies", x.writer, x.write_code,
           a.code);
  if (a.packet) return;
  if (x.read_time == 0 || x.reader == a.who || !unseen(x.reader, x.read_time)) {
    x.reader = a.who;
    x.read_time = a.time;
    x.read_code = a.code;
    return;
  }
  // Of data that every thread reads there are hundreds.
  const auto at_or_after = [](const Shadow::Reader& r, uint32_t who) { return r.who < who; };
  const auto r = std::lower_bound(x.readers.begin(), x.readers.end(), a.who, at_or_after);
  if (r != x.readers.end() && r->who == a.who)
    r->time = a.time;
  else
    x.readers.insert(r, {a.who, a.time, a.code});
}

void touch(uintptr_t address, size_t bytes, bool write, const Access& a) {
  Region* region = region_of(address);
  if (region == nullptr || region->chunks.empty()) return;
  const size_t begin = (address - region->begin) / kGrain;
  const size_t end = (address - region->begin + bytes + kGrain - 1) / kGrain;
  for (size_t j = begin; j < std::min(end, region->shadows()); ++j)
    (write ? write_shadow : read_shadow)(region->shadow(j), *region, j, a);
}

}  // namespace

void begin(unsigned threads) {
  thread_count = threads;
  clocks.assign(threads, {std::make_shared<const Times>(threads, 0u), 1});
  fences.assign(threads, {});
  actors.clear();
  learned = {};
  released.assign(threads, {});
  acquired.assign(threads, {});
  published.clear();
  races = 0;
  first_report.clear();
  reported.clear();
  for (auto& r : regions) r.second.chunks.resize((r.second.shadows() + kChunk - 1) / kChunk);
  on = true;
}

void end() {
  on = false;
  clocks.clear();
  learned = {};
  released.clear();
  acquired.clear();
  published.clear();
  for (auto& r : regions) r.second.chunks.clear();
}

bool active() { return on; }
long count() { return races; }
std::string first() { return first_report; }

std::string name_of(unsigned thread) {
  if (thread >= thread_count) return actors[thread - thread_count];
  return name_of_thread(thread);
}

Shared all_of(const std::vector<unsigned>& ids) {
  if (!on) return nullptr;
  Times sum = *clocks[ids[0]].base;
  std::set<const Times*> merged = {clocks[ids[0]].base.get()};
  for (unsigned id : ids)
    if (merged.insert(clocks[id].base.get()).second) merge(sum, *clocks[id].base);
  for (unsigned id : ids) sum[id] = std::max(sum[id], clocks[id].time);
  return std::make_shared<const Times>(std::move(sum));
}

void barrier(const std::vector<unsigned>& ids) {
  if (!on || ids.empty()) return;
  const Shared base = all_of(ids);
  for (unsigned id : ids) {
    clocks[id].base = base;
    ++clocks[id].time;
  }
}

void access(uintptr_t address, size_t bytes, bool write, const void* code) {
  if (!on || self == nullptr || region_of(address) == nullptr) return;
  preempt();
  touch(address, bytes, write, {self->id, clocks[self->id].time, false, false, code});
}

void access_packet(uintptr_t address, size_t bytes, bool write, const void* code) {
  if (on) touch(address, bytes, write, {self->id, clocks[self->id].time, true, false, code});
}

unsigned new_actor(const std::string& name) {
  actors.push_back(name);
  return thread_count + unsigned(actors.size()) - 1;
}

void access_by(const Act& act, uintptr_t address, size_t bytes, bool write, const void* code) {
  if (on) touch(address, bytes, write, {act.actor, act.time, false, act.bulk, code});
}

void fence_async_copies() {
  if (on) fences[self->id].push_back(clocks[self->id].time++);
}

void fence_async_copies(const std::vector<unsigned>& ids) {
  if (on)
    for (unsigned id : ids) fences[id].push_back(clocks[id].time++);
}

bool knows(unsigned actor, uint32_t time) { return !on || known(self->id, actor) >= time; }

void learn_actor(unsigned actor, uint32_t time) {
  if (!on) return;
  Times t = *clocks[self->id].base;
  if (t.size() <= actor) t.resize(actor + 1);
  t[actor] = std::max(t[actor], time);
  clocks[self->id].base = std::make_shared<const Times>(std::move(t));
}

void join(Joined& joined) {
  if (!on) return;
  Clock& me = clocks[self->id];
  if (std::find(joined.bases.begin(), joined.bases.end(), me.base) == joined.bases.end())
    joined.bases.push_back(me.base);
  joined.times.push_back({self->id, me.time++});
}

Shared end_phase(Joined& joined, unsigned actor, uint32_t time) {
  if (!on) return nullptr;
  Times sum(std::max(thread_count, actor + 1));
  for (const Shared& base : joined.bases) merge(sum, *base);
  for (const auto& t : joined.times) sum[t.first] = std::max(sum[t.first], t.second);
  sum[actor] = time;
  joined = {};
  return std::make_shared<const Times>(std::move(sum));
}

void learn(const Shared& from) {
  if (!on || !from) return;
  Shared& base = clocks[self->id].base;
  if (learned.base != base || learned.from != from) {
    Times sum = *base;
    merge(sum, *from);
    learned = {base, from, std::make_shared<const Times>(std::move(sum))};
  }
  base = learned.sum;
}

uint32_t now() { return on ? clocks[self->id].time : 0; }

}  // namespace race

using race::acquired;
using race::clocks;
using race::on;
using race::published;
using race::released;

void track(const void* memory, size_t bytes, const char* name) {
  race::last = nullptr;
  const uintptr_t begin = uintptr_t(memory);
  race::regions[begin] = {begin, begin + bytes, name, {}};
}

void untrack(const void* memory) {
  race::last = nullptr;
  race::regions.erase(uintptr_t(memory));
}

void release(const void* address) {
  if (!on) return;
  race::merge(published[address], race::times_of(self->id));
  ++clocks[self->id].time;
}

void acquire(const void* address) {
  if (on) race::learn_times(self->id, published[address]);
}

void fence() {
  if (!on) return;
  race::learn_times(self->id, acquired[self->id]);
  released[self->id] = race::times_of(self->id);
  ++clocks[self->id].time;
}

void relaxed_store(const void* address, bool read_modify_write) {
  if (!on) return;
  if (!read_modify_write) published[address].clear();
  race::merge(published[address], released[self->id]);
}

void relaxed_load(const void* address) {
  if (on) race::merge(acquired[self->id], published[address]);
}

}  // namespace simt

// A GPU faults where an access of n bytes is not at a multiple of n. g++ reports 16 bytes in one
// for types that are aligned to 8, too, which a GPU loads in two.
static void check_alignment(const void* address, unsigned bytes) {
  const unsigned least = bytes < 8 ? bytes : 8;
  if (simt::race::on && simt::self != nullptr && uintptr_t(address) % least != 0)
    simt::fail("an access of " + std::to_string(bytes) + " bytes at an address that " +
               std::to_string(least) + " do not divide");
}

#define SIMT_HOOK(address, bytes, write) \
  simt::race::access(uintptr_t(address), bytes, write, __builtin_return_address(0))
#define SIMT_ALIGNED_HOOK(address, bytes, write) \
  (check_alignment(address, bytes), SIMT_HOOK(address, bytes, write))
#define SIMT_HOOKS(n)                                                \
  void __tsan_read##n(void* a) { SIMT_ALIGNED_HOOK(a, n, false); }   \
  void __tsan_write##n(void* a) { SIMT_ALIGNED_HOOK(a, n, true); }   \
  void __tsan_unaligned_read##n(void* a) { SIMT_HOOK(a, n, false); } \
  void __tsan_unaligned_write##n(void* a) { SIMT_HOOK(a, n, true); } \
  void __tsan_volatile_read##n(void*) {}                             \
  void __tsan_volatile_write##n(void*) {}

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
void __tsan_read_range(void* a, unsigned long n) { SIMT_HOOK(a, n, false); }
void __tsan_write_range(void* a, unsigned long n) { SIMT_HOOK(a, n, true); }
}

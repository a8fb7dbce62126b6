// Happens-before race checker: one vector clock per thread, one shadow cell per two bytes.
//
// Kernels compiled with -fsanitize=thread call __tsan_readN / __tsan_writeN at every access; those
// hooks are defined here, in the place of the sanitizer's own runtime.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace simt {

void preempt();  // a point where the scheduler may switch

namespace race {

typedef std::vector<uint32_t> Times;  // of every thread and actor
typedef std::shared_ptr<const Times> Shared;

void begin(unsigned threads);
void end();
bool active();
long count();
std::string first();

// Everything that any of these threads did happens before all that any of them will do.
void meet(const std::vector<unsigned>& threads);
void access(uintptr_t address, size_t bytes, bool write, const void* code);
// Words that are sent and polled: not among themselves, but with ordinary accesses they race.
void access_packet(uintptr_t address, size_t bytes, bool write, const void* code);

// Asynchronous copies are made by actors, which have a time as threads have. A copy knows what the
// thread knew that started it; who knows the actor's time knows that the copy has ended.
unsigned new_actor(const std::string& name);
struct Act {
  unsigned actor;
  uint32_t time;
  bool bulk;  // reads only what was written before a fence_async_copies
};
void access_by(const Act& act, uintptr_t address, size_t bytes, bool write, const void* code);
void fence_async_copies();
bool knows(unsigned actor, uint32_t time);  // the running thread; true without the checker
void learn_actor(unsigned actor, uint32_t time);

// What several threads did before a phase of an mbarrier ended.
struct Joined {
  std::vector<Shared> bases;
  std::vector<std::pair<unsigned, uint32_t>> times;
};
void join(Joined& joined);  // the running thread
Shared end_phase(Joined& joined, unsigned actor, uint32_t time);
void learn(const Shared& from);
uint32_t now();  // of the running thread
std::string name_of(unsigned thread);

}  // namespace race
}  // namespace simt

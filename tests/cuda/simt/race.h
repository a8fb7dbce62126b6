// A happens-before race checker: a vector clock for each thread, a shadow for every two bytes.
//
// Kernels compiled with -fsanitize=thread call __tsan_readN / __tsan_writeN at every access. Those
// hooks are defined here, instead of the sanitizer's runtime.
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

// What any of these threads did happens before what any of them will do.
void barrier(const std::vector<unsigned>& threads);
void access(uintptr_t address, size_t bytes, bool write, const void* code);
// Words that are sent and polled: they race with ordinary accesses, but not with each other.
void access_packet(uintptr_t address, size_t bytes, bool write, const void* code);

// Actors make asynchronous copies, and have a time as threads do. A copy happens after what the
// thread that started it knew. A thread that knows the actor's time knows that the copy has ended.
unsigned new_actor(const std::string& name);
struct Act {
  unsigned actor;
  uint32_t time;
  bool bulk;  // reads only what was written before a fence_async_copies
};
void access_by(const Act& act, uintptr_t address, size_t bytes, bool write, const void* code);
void fence_async_copies();
void fence_async_copies(const std::vector<unsigned>& threads);  // of an ended grid
// Whether the running thread knows of that time of an actor or thread; true without the checker.
bool knows(unsigned actor, uint32_t time);
void learn_actor(unsigned actor, uint32_t time);

// What happened before the end of an mbarrier's phase: the arrivals of several threads.
struct Joined {
  std::vector<Shared> bases;
  std::vector<std::pair<unsigned, uint32_t>> times;
};
void join(Joined& joined);  // the running thread
Shared end_phase(Joined& joined, unsigned actor, uint32_t time);
void learn(const Shared& from);
Shared all_of(const std::vector<unsigned>& threads);  // what any of them did
uint32_t now();                                       // of the running thread
std::string name_of(unsigned thread);

}  // namespace race
}  // namespace simt

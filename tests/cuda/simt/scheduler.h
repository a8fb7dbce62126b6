// What the scheduler offers to the emulator's other parts.
#pragma once

#include "race.h"
#include "simt.h"

namespace simt {

// A grid of the session, while it runs.
struct RunningGrid {
  const Grid* of = nullptr;
  unsigned number = 0, first_block = 0;
  unsigned live = 0;         // threads
  unsigned untriggered = 0;  // blocks that have not called start_dependents(), and run
  RunningGrid *primary = nullptr, *dependent = nullptr;
  bool ended = false, waited = false;  // waited: one of its threads, for its primary
  std::vector<Thread*> waiting;        // for its end
  std::vector<Block*> held;            // its blocks that begin when the primary has ended
  race::Shared end;                    // what happened before its end
};

void sleep();  // the running thread waits until it is woken
void wake(Thread* thread);
void progress();  // something changed that polling threads may wait for
uint64_t draw();  // from the seeded generator
Order order();
[[noreturn]] void stop(const std::string& message);  // as fail, where no thread is at fault
Block& peer(unsigned rank);                          // in the running thread's cluster
std::vector<unsigned> threads_of(const Block& block);
unsigned thread_count();  // of the session
std::string name_of(const Block& block);
std::string name_of_thread(unsigned id);
Block& block_of(const RunningGrid& grid, unsigned rank);
void begin(Block& block);  // its threads may run

// Of early grids (early.cpp): the running thread's block, or grid, ends.
void end_block();
void end_grid();

}  // namespace simt

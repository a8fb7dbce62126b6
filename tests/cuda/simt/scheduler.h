// What the scheduler offers to the emulator's other parts.
#pragma once

#include "simt.h"

namespace simt {

void sleep();  // the running thread waits until it is woken
void wake(Thread* thread);
void progress();  // something changed that polling threads may wait for
uint64_t draw();  // from the seeded generator
Order order();
[[noreturn]] void stop(const std::string& message);  // as fail, where no thread is at fault
Block& peer(unsigned rank);                          // in the running thread's cluster
std::vector<unsigned> threads_of(const Block& block);

}  // namespace simt

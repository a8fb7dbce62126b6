// Which of the threads that can run is the next to run.
#pragma once

#include <deque>
#include <map>
#include <unordered_map>

#include "simt.h"

namespace simt {

class Turns {
 public:
  void start(Order order);
  void add(Thread* thread);
  Thread* take();  // null: there is none

 private:
  bool is_slow(const Thread& thread);

  Order order_ = Order::fifo;
  std::deque<Thread*> ready_;
  std::map<unsigned, std::deque<Thread*>> by_block_;  // for the orders that go by blocks
  // For `uneven`: the warps and blocks that are slow, and until which turn.
  std::unordered_map<const void*, uint64_t> slow_until_;
  uint64_t turn_ = 0;
};

}  // namespace simt

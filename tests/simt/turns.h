// Whose turn it is, among the threads that can run.
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
  // For `uneven`: warps and blocks that wait for long, and the turn until which they do.
  std::unordered_map<const void*, uint64_t> slow_until_;
  uint64_t turn_ = 0;
};

}  // namespace simt

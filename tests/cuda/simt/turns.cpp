#include "turns.h"

#include "scheduler.h"

namespace simt {

namespace {

bool goes_by_blocks(Order order) { return order == Order::block_up || order == Order::block_down; }

}  // namespace

void Turns::start(Order order) {
  order_ = order;
  ready_.clear();
  by_block_.clear();
  slow_until_.clear();
  turn_ = 0;
}

void Turns::add(Thread* thread) {
  (goes_by_blocks(order_) ? by_block_[thread->block->id] : ready_).push_back(thread);
}

Thread* Turns::take() {
  if (goes_by_blocks(order_)) {
    if (by_block_.empty()) return nullptr;
    const auto it = order_ == Order::block_up ? by_block_.begin() : std::prev(by_block_.end());
    Thread* next = it->second.front();
    it->second.pop_front();
    if (it->second.empty()) by_block_.erase(it);
    return next;
  }
  if (ready_.empty()) return nullptr;
  if (order_ == Order::lifo) {
    Thread* next = ready_.back();
    ready_.pop_back();
    return next;
  }
  if (order_ == Order::random) std::swap(ready_[0], ready_[draw() % ready_.size()]);
  if (order_ == Order::uneven) {
    ++turn_;
    for (int tries = 0; tries < 8; ++tries) {
      std::swap(ready_[0], ready_[draw() % ready_.size()]);
      if (!is_slow(*ready_[0])) break;
    }
  }
  Thread* next = ready_.front();
  ready_.pop_front();
  return next;
}

// Now and then a warp, less often a block, becomes slow, while others run for several rounds.
bool Turns::is_slow(const Thread& thread) {
  if (draw() % 64 == 0) {
    const void* who = thread.warp;
    if (draw() % 4 == 0) who = thread.block;
    slow_until_[who] = turn_ + draw() % (8 * thread_count());
  }
  for (const void* who :
       {static_cast<const void*>(thread.warp), static_cast<const void*>(thread.block)}) {
    const auto slow = slow_until_.find(who);
    if (slow != slow_until_.end() && slow->second > turn_) return true;
  }
  return false;
}

}  // namespace simt

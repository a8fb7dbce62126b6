// Asynchronous copies within a cluster, and to and from global memory: late, in any order and in
// pieces of 16 bytes or more. Their source is read when they arrive.
#include "copies.h"

#include <algorithm>
#include <cstring>
#include <deque>

#include "exchange_state.h"
#include "race.h"
#include "scheduler.h"

namespace simt {

unsigned char* in_shared(const Block& block, uint32_t offset, unsigned bytes, const char* what) {
  if (offset > block.shared_bytes || bytes > block.shared_bytes - offset)
    fail(std::string(what) + " outside of shared memory: " + std::to_string(bytes) +
         " bytes at shared+" + std::to_string(offset));
  if (block.live == 0)
    fail(std::string(what) + " to block " + std::to_string(block.rank) + ", which has exited");
  return block.shared + offset;
}

namespace {

struct Piece {
  unsigned char* to;
  const unsigned char* from;  // null: `value`
  unsigned bytes;
  uint4 value;
  const Block *source, *target;  // null: global memory
  const void* mbarrier;          // null: a store, of that thread and group
  uint32_t phase;                // of the mbarrier, when the copy started
  const Thread* thread;
  unsigned group;
};

// `slow` pieces arrive only when no thread can go on without them.
typedef std::deque<Piece> Pieces;
Pieces under_way, slow;

void deliver(Pieces& pieces, size_t j) {
  const Piece p = pieces[j];
  if (j == 0) {
    pieces.pop_front();
  } else {
    std::swap(pieces[j], pieces.back());
    pieces.pop_back();
  }
  std::memcpy(p.to, p.from ? static_cast<const void*>(p.from) : &p.value, p.bytes);
  progress();
  if (p.mbarrier) mbarrier_count(p.mbarrier, p.bytes, p.phase);
}

// Tells the race checker of a copy, which happens at some time from now on.
void announce(Piece& p, bool bulk, const void* code) {
  const race::Act act = mbarrier_copies(p.mbarrier, p.source, bulk, code);
  p.phase = act.time - 1;
  if (p.from) race::access_by(act, uintptr_t(p.from), p.bytes, false, code);
  race::access_by(act, uintptr_t(p.to), p.bytes, true, code);
}

// In the order `fifo` the copy is immediate; otherwise it comes later, in pieces.
void start(Piece whole) {
  if (order() == Order::fifo) {
    under_way.push_front(whole);
    return deliver(under_way, 0);
  }
  if (whole.target) std::memset(whole.to, 0xff, whole.bytes);  // unspecified until the copy arrives
  while (whole.bytes > 0) {
    Piece piece = whole;
    if (draw() % 2) piece.bytes = unsigned(draw() % (whole.bytes / 16) + 1) * 16;
    (order() != Order::block_up && draw() % 8 == 0 ? slow : under_way).push_back(piece);
    whole.to += piece.bytes;
    if (whole.from) whole.from += piece.bytes;
    whole.bytes -= piece.bytes;
  }
}

void check_size(const void* place, unsigned bytes, const char* what) {
  if (bytes == 0 || bytes % 16 != 0)
    fail(std::string(what) + " of " + std::to_string(bytes) + " bytes, which 16 do not divide");
  if (uintptr_t(place) % 16 != 0) fail(std::string(what) + ": an address that 16 do not divide");
}

const void* own_shared(const void* place, unsigned bytes, const char* what) {
  return in_shared(*self->block, offset_in_shared(place), bytes, what);
}

}  // namespace

void forget_exchange() {
  under_way.clear();
  slow.clear();
  forget_mbarriers();
  forget_packets();
}

void deliver_some() {
  if (under_way.empty() || order() == Order::lifo || order() == Order::block_up) return;
  if (draw() % 4 == 0) deliver(under_way, draw() % under_way.size());
}

bool deliver_when_idle() {
  Pieces& pieces = under_way.empty() ? slow : under_way;
  if (pieces.empty()) return false;
  if (order() == Order::lifo)
    deliver(pieces, pieces.size() - 1);
  else if (order() == Order::block_up)
    deliver(pieces, 0);
  else
    deliver(pieces, draw() % pieces.size());
  return true;
}

void check_exit() {
  if (self->stores_issued > self->stores_read)
    fail("a thread exits with bulk stores that nobody waited for");
}

void check_exit_of_block() {
  for (const Pieces* pieces : {&under_way, &slow})
    for (const Piece& p : *pieces)
      if (p.source == self->block || p.target == self->block)
        fail("a CTA exits while copies to or from its shared memory are under way");
  check_copies_at_exit();
}

unsigned cluster_rank() { return self->block->id - self->block->cluster; }

uint32_t offset_in_shared(const void* place) {
  const Block& block = *self->block;
  const uintptr_t at = uintptr_t(place), begin = uintptr_t(block.shared);
  if (at < begin || at > begin + block.shared_bytes)
    fail("an address that is not in this CTA's shared memory");
  return uint32_t(at - begin);
}

void async_send(unsigned rank, uint32_t to, const uint4& value, unsigned barrier_rank,
                uint32_t barrier) {
  Block& target = peer(rank);
  if (rank != barrier_rank) fail("send_async: place and mbarrier are of different CTAs");
  Piece p{};
  p.to = in_shared(target, to, 16, "send_async");
  p.bytes = 16;
  p.value = value;
  p.target = &target;
  p.mbarrier = in_shared(target, barrier, 8, "send_async: an mbarrier");
  check_size(p.to, 16, "send_async");
  announce(p, false, __builtin_return_address(0));
  start(p);
}

void bulk_send(unsigned rank, uint32_t to, const void* from, unsigned bytes, unsigned barrier_rank,
               uint32_t barrier) {
  Block& target = peer(rank);
  if (rank != barrier_rank) fail("bulk_send: place and mbarrier are of different CTAs");
  Piece p{};
  p.to = in_shared(target, to, bytes, "bulk_send");
  p.from = static_cast<const unsigned char*>(own_shared(from, bytes, "bulk_send"));
  p.bytes = bytes;
  p.source = self->block;
  p.target = &target;
  p.mbarrier = in_shared(target, barrier, 8, "bulk_send: an mbarrier");
  check_size(p.to, bytes, "bulk_send");
  check_size(p.from, bytes, "bulk_send");
  announce(p, true, __builtin_return_address(0));
  start(p);
}

void bulk_load(void* to, const void* from, unsigned bytes, void* barrier) {
  own_shared(to, bytes, "bulk_load");
  Piece p{};
  p.to = static_cast<unsigned char*>(to);
  p.from = static_cast<const unsigned char*>(from);
  p.bytes = bytes;
  p.target = self->block;
  p.mbarrier = own_shared(barrier, 8, "bulk_load: an mbarrier");
  check_size(to, bytes, "bulk_load");
  check_size(from, bytes, "bulk_load");
  announce(p, true, __builtin_return_address(0));
  start(p);
}

// A copy to each CTA: its pieces arrive there whenever they do, whatever the others have received.
void bulk_multicast(void* to, const void* from, unsigned bytes, void* barrier, unsigned ranks) {
  if (ranks == 0 || ranks > 0xffff) fail("bulk_multicast to ranks " + std::to_string(ranks));
  const uint32_t place = offset_in_shared(to), counter = offset_in_shared(barrier);
  check_size(from, bytes, "bulk_multicast");
  for (unsigned rank = 0; rank < 16; ++rank) {
    if (!(ranks >> rank & 1)) continue;
    const Block& target = peer(rank);
    Piece p{};
    p.to = in_shared(target, place, bytes, "bulk_multicast");
    p.from = static_cast<const unsigned char*>(from);
    p.bytes = bytes;
    p.target = &target;
    p.mbarrier = in_shared(target, counter, 8, "bulk_multicast: an mbarrier");
    check_size(p.to, bytes, "bulk_multicast");
    announce(p, true, __builtin_return_address(0));
    start(p);
  }
}

void bulk_store(void* to, const void* from, unsigned bytes) {
  own_shared(from, bytes, "bulk_store");
  check_size(to, bytes, "bulk_store");
  check_size(from, bytes, "bulk_store");
  Piece p{};
  p.to = static_cast<unsigned char*>(to);
  p.from = static_cast<const unsigned char*>(from);
  p.bytes = bytes;
  p.source = self->block;
  p.thread = self;
  p.group = self->stores_closed;
  self->stores_issued = self->stores_closed + 1;
  // Two actors: one reads, and is known as its groups are waited for; one writes until the kernel
  // ends.
  if (self->store_actors == 0 && race::active()) {
    self->store_actors = race::new_actor("the bulk stores of " + race::name_of(self->id));
    race::new_actor("the bulk stores of " + race::name_of(self->id));
  }
  const void* code = __builtin_return_address(0);
  race::access_by({self->store_actors, p.group + 1, true}, uintptr_t(from), bytes, false, code);
  race::access_by({self->store_actors + 1, 1, true}, uintptr_t(to), bytes, true, code);
  start(p);
}

void bulk_commit() { ++self->stores_closed; }

void bulk_wait_read(unsigned groups_left) {
  if (self->stores_closed <= groups_left) return;
  const unsigned read = self->stores_closed - groups_left;
  for (Pieces* pieces : {&under_way, &slow})
    for (size_t j = pieces->size(); j-- > 0;)
      if ((*pieces)[j].thread == self && (*pieces)[j].group < read) deliver(*pieces, j);
  self->stores_read = std::max(self->stores_read, read);
  if (self->store_actors) race::learn_actor(self->store_actors, self->stores_read);
}

void fence_async_copies() { race::fence_async_copies(); }

}  // namespace simt

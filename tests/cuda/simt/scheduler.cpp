// The launch, the schedule, barriers and warp collectives.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <random>

#include "exchange_state.h"
#include "fiber.h"
#include "race.h"
#include "scheduler.h"
#include "turns.h"

namespace simt {

Thread* self = nullptr;

const int mutant = [] {
  const char* number = std::getenv("SIMT_MUTANT");
  return number ? std::atoi(number) : 0;
}();

namespace {
struct Collective;
}
struct Warp {
  std::vector<Collective*> open;
  unsigned lanes = 32;
};

namespace {

constexpr unsigned kIdleRounds = 1000;  // rounds of polling without a change: a livelock

// A collective that some of its lanes have reached.
struct Collective {
  unsigned mask, arrived = 0;
  const void* operation;
  void* slots[32];
  Thread* threads[32];
};

struct Barrier {
  int line = 0;
  unsigned threads = 0;  // of a named barrier
  std::vector<Thread*> waiting;
};
// A barrier's key: the block and an id (0: __syncthreads, 1 to 15: named barriers); for a cluster
// its first block and kCluster; for a grid the grid and kGrid.
typedef std::pair<const void*, int> Key;
constexpr int kCluster = 16, kGrid = 17;

Config config;
Result* result;
std::mt19937_64 random_bits;
std::vector<RunningGrid> grids;
std::vector<Thread> threads;
std::vector<Block> blocks;
std::vector<Warp> warps;
std::map<Key, Barrier> barriers;
Turns turns;
std::vector<Thread*> polling;
unsigned live;
// Rounds in which every thread polled: since a thread was woken, and since a poll saw a change.
unsigned idle_rounds, stale_rounds;
bool stopping;

void switch_to(Thread* to) {
  Thread* from = self;
  if (from == to) return;
  ++result->switches;
  self = to;
  fiber::switch_to(from ? int(from->id) : fiber::kMain, to ? int(to->id) : fiber::kMain,
                   from && from->done);
}

std::string place_of(const Thread& t) {
  std::string text = name_of(*t.block) + " at " + t.where;
  if (t.file) {
    const char* slash = std::strrchr(t.file, '/');
    text += std::string(" in ") + (slash ? slash + 1 : t.file);
  }
  text += ":" + std::to_string(t.line);
  return t.mbarrier ? text + ", " + mbarrier_report(t.mbarrier) : text;
}

std::string stuck_report() {
  std::string text = polling.empty() ? "deadlock:" : "livelock (every thread polls):";
  std::map<std::string, int> groups;
  for (const Thread& t : threads)
    if (!t.done) ++groups[place_of(t)];
  int shown = 0;
  for (const auto& group : groups)
    if (shown++ < 6)
      text += " [" + std::to_string(group.second) + " threads of " + group.first + "]";
  return text;
}

void run_next() {
  if (stopping || live == 0) return switch_to(nullptr);
  deliver_some();
  Thread* next = turns.take();
  while (next == nullptr && deliver_when_idle()) {
    next = turns.take();
    if (next == nullptr && !polling.empty() && draw() % 4 == 0) break;  // they may poll in between
  }
  if (next == nullptr) {
    if (polling.empty() || ++idle_rounds > kIdleRounds || ++stale_rounds > 4 * kIdleRounds) {
      stopping = true;
      result->error = stuck_report();
      return switch_to(nullptr);
    }
    for (Thread* thread : polling) turns.add(thread);
    polling.clear();
    next = turns.take();
  }
  switch_to(next);
}

// How many threads a barrier waits for. Exited threads count as arrived, as on a GPU, except at
// named barriers.
unsigned expected(const Key& key, const Barrier& barrier) {
  if (barrier.threads) return barrier.threads;
  if (key.second == kGrid) return static_cast<const RunningGrid*>(key.first)->live;
  const Block* first = static_cast<const Block*>(key.first);
  if (key.second != kCluster) return first->live;
  unsigned count = 0;
  for (unsigned rank = 0; rank < first->grid->of->cluster; ++rank) count += first[rank].live;
  return count;
}

void open_if_full(const Key& key, Barrier& barrier) {
  if (barrier.waiting.empty() || barrier.waiting.size() < expected(key, barrier)) return;
  std::vector<unsigned> ids;
  for (Thread* thread : barrier.waiting) ids.push_back(thread->id);
  race::barrier(ids);
  Block& block = *barrier.waiting[0]->block;
  if (key.first == &block && ids.size() >= block.live) ++block.barriers;
  for (Thread* thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
}

void enter() {
  fiber::begin();
  RunningGrid& grid = *self->block->grid;
  grid.of->kernel();
  for (const auto& group : self->copies)
    if (!group.empty()) fail("a thread exits with asynchronous copies that nobody waited for");
  check_exit();
  self->done = true;
  self->where = "exited";
  --live;
  --grid.live;
  if (--self->block->live == 0) {
    check_exit_of_block();
    end_block();
  }
  if (grid.live == 0) end_grid();
  // Those that wait for this thread no longer.
  for (const Key& key :
       {Key(self->block, 0), Key(&blocks[self->block->cluster], kCluster), Key(&grid, kGrid)}) {
    const auto barrier = barriers.find(key);
    if (barrier != barriers.end()) open_if_full(key, barrier->second);
  }
  run_next();
  std::abort();  // never resumed
}

void add(Block& block, RunningGrid& grid, unsigned rank) {
  const Grid& of = *grid.of;
  block.id = grid.first_block + rank;
  block.rank = rank;
  block.index = {rank % of.size.x, rank / of.size.x % of.size.y, rank / of.size.x / of.size.y};
  block.grid = &grid;
  block.cluster = grid.first_block + rank / of.cluster * of.cluster;
  block.shared_bytes = of.shared;
  // Of the exact size, so that the address sanitizer sees the end.
  void* shared = nullptr;
  if (posix_memalign(&shared, 128, std::max<size_t>(of.shared, 1))) std::abort();
  block.shared = static_cast<unsigned char*>(shared);
  std::memset(block.shared, 0xff, of.shared);  // what nobody wrote reads as NaN
  track(block.shared, of.shared, "shared memory");

  const unsigned size = of.block.count(), first_warp = unsigned(warps.size());
  block.live = size;
  block.first_thread = unsigned(threads.size());
  warps.resize(first_warp + (size + 31) / 32);
  for (unsigned local = 0; local < size; ++local) {
    Thread t;
    t.id = unsigned(threads.size());
    t.block = &block;
    t.warp = &warps[first_warp + local / 32];
    t.warp->lanes = std::min(32u, size - local / 32 * 32);
    t.lane = local % 32;
    t.index = {local % of.block.x, local / of.block.x % of.block.y,
               local / of.block.x / of.block.y};
    threads.push_back(t);
  }
}

void prepare(const std::vector<Grid>& session) {
  unsigned block_count = 0, thread_total = 0, warp_count = 0;
  for (const Grid& grid : session) {
    const unsigned count = grid.size.count(), size = grid.block.count();
    block_count += count;
    thread_total += count * size;
    warp_count += count * ((size + 31) / 32);
  }
  grids.assign(session.size(), {});
  blocks.assign(block_count, {});
  threads.clear();
  warps.clear();
  threads.reserve(thread_total);  // others point to threads and warps
  warps.reserve(warp_count);
  barriers.clear();
  turns.start(config.order);
  polling.clear();
  live = thread_total;
  unsigned first_block = 0;
  for (unsigned g = 0; g < grids.size(); ++g) {
    RunningGrid& grid = grids[g];
    grid.of = &session[g];
    grid.number = g;
    grid.first_block = first_block;
    grid.untriggered = grid.of->size.count();
    grid.live = grid.untriggered * grid.of->block.count();
    if (g > 0) grid.primary = &grids[g - 1];
    if (g + 1 < grids.size()) grid.dependent = &grids[g + 1];
    for (unsigned rank = 0; rank < grid.untriggered; ++rank)
      add(blocks[first_block + rank], grid, rank);
    first_block += grid.untriggered;
  }
  for (unsigned rank = 0; rank < grids[0].untriggered; ++rank) begin(blocks[rank]);
}

}  // namespace

void begin(Block& block) {
  for (unsigned j = 0; j < block.live; ++j) wake(&threads[block.first_thread + j]);
}

void wake(Thread* thread) {
  turns.add(thread);
  idle_rounds = 0;
}

void sleep() { run_next(); }
void progress() { idle_rounds = stale_rounds = 0; }
uint64_t draw() { return random_bits(); }
Order order() { return config.order; }

Block& peer(unsigned rank) {
  const unsigned cluster = self->block->grid->of->cluster;
  if (rank >= cluster)
    fail("rank " + std::to_string(rank) + " in a cluster of " + std::to_string(cluster));
  return blocks[self->block->cluster + rank];
}

std::vector<unsigned> threads_of(const Block& block) {
  std::vector<unsigned> ids(block.grid->of->block.count());
  std::iota(ids.begin(), ids.end(), block.first_thread);
  return ids;
}

unsigned thread_count() { return unsigned(threads.size()); }
const dim3& grid_size() { return self->block->grid->of->size; }
const dim3& block_size() { return self->block->grid->of->block; }
Block& block_of(const RunningGrid& grid, unsigned rank) { return blocks[grid.first_block + rank]; }

std::string name_of(const Block& block) {
  std::string name = "block " + std::to_string(block.rank);
  if (grids.size() > 1) name += " of grid " + std::to_string(block.grid->number);
  return name;
}

std::string name_of_thread(unsigned id) {
  const Block& block = *threads[id].block;
  return name_of(block) + " thread " + std::to_string(id - block.first_thread);
}

Result launch(const Config& c, const std::vector<Grid>& session) {
  Result outcome;
  result = &outcome;
  config = c;
  random_bits.seed(c.seed);
  stopping = false;
  idle_rounds = stale_rounds = 0;
  prepare(session);
  forget_exchange();
  fiber::create(int(threads.size()), enter);
  if (c.races) race::begin(unsigned(threads.size()));
  self = nullptr;
  run_next();
  self = nullptr;
  if (c.races) {
    outcome.races = race::count();
    outcome.first_race = race::first();
    race::end();
  }
  fiber::destroy();
  for (Block& block : blocks) {
    untrack(block.shared);
    free(block.shared);
  }
  return outcome;
}

void fail(const std::string& message) {
  stop(message + " (" + name_of(*self->block) + ", thread " + std::to_string(self->index.x) + ")");
}

void stop(const std::string& message) {
  if (result->error.empty()) result->error = message;
  stopping = true;
  switch_to(nullptr);
  std::abort();
}

void yield(const char* where, int line, const char* file) {
  self->where = where;
  self->file = file;
  self->line = line;
  polling.push_back(self);
  run_next();
}

void poll(const void* address, uint64_t value, const char* where) {
  if (self->polled == address && self->polled_value == value) yield(where, 0);
  self->polled = address;
  self->polled_value = value;
}

void preempt() {
  if (config.preempt == 0 || self == nullptr || random_bits() % config.preempt != 0) return;
  turns.add(self);
  run_next();
}

void barrier(Scope scope, const char* where, int line, const char* file) {
  self->where = where;
  self->file = file;
  self->line = line;
  Key key(self->block->grid, kGrid);
  if (scope == Scope::block) key = {self->block, 0};
  if (scope == Scope::cluster) key = {&blocks[self->block->cluster], kCluster};
  Barrier& b = barriers[key];
  if (b.waiting.empty())
    b.line = line;
  else if (b.line != line && scope != Scope::cluster)
    fail("threads of one block wait at different barriers: lines " + std::to_string(b.line) +
         " and " + std::to_string(line));
  b.waiting.push_back(self);
  open_if_full(key, b);
  run_next();
}

void named_barrier(int id, int threads, const char* file, int line) {
  self->where = "named_barrier";
  self->file = file;
  self->line = line;
  if (id < 1 || id > 15 || threads < 32 || threads % 32 != 0)
    fail("named barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads");
  const Key key(self->block, id);
  Barrier& b = barriers[key];
  if (!b.waiting.empty() && b.threads != unsigned(threads))
    fail("threads come to named barrier " + std::to_string(id) + " with different numbers: " +
         std::to_string(b.threads) + " and " + std::to_string(threads));
  b.threads = unsigned(threads);
  b.waiting.push_back(self);
  open_if_full(key, b);
  run_next();
}

void collective(unsigned mask, const void* operation, void* slot,
                void (*work)(void** lanes, unsigned mask), bool orders_memory) {
  if (!(mask >> self->lane & 1)) fail("warp collective: the calling lane is not in its mask");
  if (self->warp->lanes < 32) mask &= (1u << self->warp->lanes) - 1;
  Collective here, *collective = nullptr;
  auto& open = self->warp->open;
  for (Collective* c : open)
    if (c->mask == mask) collective = c;
  if (collective == nullptr) {
    collective = &here;
    here.mask = mask;
    here.operation = operation;
    open.push_back(collective);
  }
  if (collective->operation != operation) fail("lanes of one warp are at different collectives");
  collective->arrived |= 1u << self->lane;
  collective->slots[self->lane] = slot;
  collective->threads[self->lane] = self;
  self->where = "warp collective";
  self->file = nullptr;
  self->line = 0;
  if (collective->arrived != mask) return run_next();
  open.erase(std::find(open.begin(), open.end(), collective));
  work(collective->slots, mask);
  std::vector<unsigned> ids;
  for (int j = 0; j < 32; ++j)
    if (mask >> j & 1) ids.push_back(collective->threads[j]->id);
  if (orders_memory) race::barrier(ids);  // __syncwarp does; shuffles and mma do not
  // `collective` may be in another fiber's frame, which is gone once that fiber runs.
  for (unsigned id : ids)
    if (id != self->id) wake(&threads[id]);
}

void async_copy(void* to, const void* from, size_t bytes, size_t valid) {
  if (uintptr_t(to) % bytes || uintptr_t(from) % bytes) fail("cp.async: misaligned address");
  // Hardware may write from now on: the old contents read as NaN, and no one may still use them.
  race::access(uintptr_t(to), bytes, true, __builtin_return_address(0));
  std::memset(to, 0xff, bytes);
  if (self->copies.empty()) self->copies.emplace_back();
  // It may read its source at once, or when it arrives.
  race::access(uintptr_t(from), valid, false, __builtin_return_address(0));
  Thread::Copy copy{to, from, bytes, valid, config.order != Order::fifo && draw() % 2 == 0, {}};
  if (copy.early) std::memcpy(copy.read, from, valid);
  self->copies.back().push_back(copy);
}

void async_commit() {
  if (self->copies.empty()) self->copies.emplace_back();
  self->copies.emplace_back();
}

void async_wait(size_t groups_left) {
  auto& groups = self->copies;
  while (groups.size() > groups_left + 1) {
    for (const Thread::Copy& c : groups.front()) {
      race::access(uintptr_t(c.from), c.valid, false, __builtin_return_address(0));
      race::access(uintptr_t(c.to), c.bytes, true, __builtin_return_address(0));
      std::memcpy(c.to, c.early ? c.read : c.from, c.valid);
      std::memset(static_cast<char*>(c.to) + c.valid, 0, c.bytes - c.valid);
    }
    groups.erase(groups.begin());
  }
  if (groups.empty()) groups.emplace_back();
}

}  // namespace simt

// Runs CUDA kernels on the CPU, to check them where there is no GPU.
//
// Every CUDA thread is a fiber of one OS thread. All blocks of a grid are resident at once, and a
// seeded scheduler decides which thread runs next, so that a run can be repeated exactly. Threads
// switch only where they synchronise or poll (and, with the race checker, at random memory
// accesses). The race checker (race.h) sees every access to memory that `track` names.
//
// The primitives of exchange.cuh (exchange_state.h) behave as loosely as the hardware may:
// - Asynchronous copies within a cluster arrive late, in any order and in pieces of 16 bytes or
// more.
//   They read their source when they arrive; until then their destination reads as NaN.
// - An mbarrier counts the bytes that have arrived.
// - A poll sees any of the last values of a packet's words: each word by itself, sometimes the
// words
//   at some places late for all threads, and no word ever going back in time.
// In the order `fifo`, all of that is immediate.
//
// Errors are: arrivals, bytes or copies that a phase does not expect or that may count in the
// previous phase; a phase that may end before all who wait for the previous phase have seen its
// end; a CTA that may exit before copies to or from it have ended; sizes and addresses that are not
// multiples of 16; places outside of the cluster or of shared memory; bulk copies of what a thread
// stored without fence_async_copies.
//
// A kernel that is launched early (device.cuh) shares a session with those before it on its stream.
// Its CTAs begin one by one, some as soon as they may and some when the kernel before has ended. To
// the race checker nothing in the kernels before orders what a thread does before
// wait_for_primary(): not even what had ended, for only the wait promises that memory is visible.
// It is an error if no thread of an early kernel waits.
//
// What it cannot see: fence scopes (cta against gpu), other proxy fences, __ldg of data written by
// the same kernel, fast-math and fused multiply-add, and whether a grid fits a GPU. Ordinary data
// that one CTA writes and another reads after waiting for an mbarrier count as ordered, though
// hardware orders no more than the bytes that the mbarrier counts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#define SIMT_UNSEEN __attribute__((no_sanitize_thread))  // an access by the emulator itself
#else
#define SIMT_UNSEEN
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr unsigned count() const { return x * y * z; }
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace simt {

struct Block;
struct RunningGrid;
struct Warp;

struct Thread {
  dim3 index;
  unsigned id = 0, lane = 0;  // id: in the session
  Block* block = nullptr;
  Warp* warp = nullptr;
  bool done = false;
  const char* where = "start";  // the last synchronisation, for reports of deadlocks
  const char* file = nullptr;
  int line = 0;
  const void* mbarrier = nullptr;  // the one that it waits for
  const void* polled = nullptr;    // the last polled address, and the value read there
  uint64_t polled_value = 0;
  struct Copy {
    void* to;
    const void* from;
    size_t bytes, valid;
    bool early;  // the source was read at once, to `read`
    unsigned char read[16];
  };
  std::vector<std::vector<Copy>> copies;  // asynchronous copies by group; the last is open
  // Groups of bulk stores: how many are closed, have stores, are known to have read their source.
  unsigned stores_closed = 0, stores_issued = 0, stores_read = 0;
  unsigned store_actors = 0;  // see race.h
};

struct Block {
  dim3 index;
  unsigned id = 0, rank = 0;  // in the session, in its grid
  unsigned live = 0, first_thread = 0;
  RunningGrid* grid = nullptr;
  bool triggered = false;  // the next grid may begin, as far as this block is concerned
  unsigned cluster = 0;    // the id of the first block of its cluster
  unsigned barriers = 0;   // barriers that all its live threads have passed
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
};

enum class Order { fifo, lifo, random, block_up, block_down, uneven };

// A kernel's launch.
struct Grid {
  dim3 size, block;      // blocks, and threads of a block
  unsigned cluster = 1;  // blocks to a cluster
  size_t shared = 0;     // bytes of dynamic shared memory of a block
  bool early = false;    // may begin before the grid before it has ended
  std::function<void()> kernel;
};

struct Config {
  Order order = Order::fifo;
  uint64_t seed = 1;
  bool races = false;
  unsigned preempt = 0;  // with the race build: one in so many memory accesses is a switch
};

struct Result {
  std::string error;  // empty where the kernel ran to its end
  long races = 0;
  std::string first_race;
  uint64_t switches = 0;
};

extern Thread* self;  // the thread that runs
// Which of the bugs that tests planted in these kernels is switched on; 0: none. The race checker
// does not see a constant's loads.
extern const int mutant;
const dim3& grid_size();
const dim3& block_size();

// Runs a session: a grid, and early ones that follow it.
Result launch(const Config& config, const std::vector<Grid>& grids);
[[noreturn]] void fail(const std::string& message);  // ends the launch with an error

// When streams do what they got: at once, or all of it when the first stream ends. Then what waits
// for nothing is done in any order: that of the first stream first, that of the last stream first,
// or drawn.
enum class Turn { issued, first, last, drawn };

// In place of a CUDA stream: keeps the first error and race, of the streams forked from it too.
struct Stream {
  Config config;  // order, seed, races, preempt
  Turn turn = Turn::issued;
  std::string error, first_race;
  long races = 0, launches = 0;
  unsigned largest_grid = 0;
  // Whether kernels wait until it is known what is launched early behind them. Then finish() runs
  // the last ones.
  bool overlaps = false;
  long follows = 0;     // calls of follow(), of forked streams too
  long forgotten = -1;  // which of them does nothing: a wait that is left out; -1: none

  void run(const Grid& grid);
  // A kernel of a library: of which nothing is known but what it reads and writes, in `work`.
  void run_library(const std::function<void()>& work);
  void zero(void* memory, size_t bytes);
  // What comes here from now on waits for what `other` has got so far.
  void follow(Stream& other);
  // Another stream, for work of this one.
  Stream& forked(int index);
  // Does what is left. It is an error if forked streams have work that this one does not wait for.
  void finish();

 private:
  void add(std::function<void()> work);

  struct Item {
    std::function<void()> work;  // empty: waits until `other` has done its first `count` items
    Stream* other;
    size_t count;
  };
  void launch_now(const Grid& grid, Stream& stream);
  void join_session(const Grid& grid, Stream& stream);
  void run_session();
  bool ready() const;
  void need(size_t count);

  std::vector<Item> items_;
  size_t done_ = 0, needed_ = 0;  // items that are done, and that the first stream waits for
  std::vector<std::unique_ptr<Stream>> forked_;
  Stream* origin_ = this;
  // Grids that have not run, and their stream. All streams have one session at a time.
  std::vector<Grid> session_;
  Stream* session_stream_ = nullptr;
  uint64_t session_seed_ = 0;
};

// Memory that the race checker watches, besides shared memory.
void track(const void* memory, size_t bytes, const char* name);
void untrack(const void* memory);

// Barriers of a block, of its cluster, or of the whole grid.
enum class Scope { block, cluster, grid };
void barrier(Scope scope, const char* where, int line, const char* file = nullptr);
// A barrier of any `threads` threads of a block.
void named_barrier(int id, int threads, const char* file, int line);

// A collective of the lanes in `mask`. The last lane to arrive runs `work` on the lanes' slots.
void collective(unsigned mask, const void* operation, void* slot,
                void (*work)(void** lanes, unsigned mask), bool orders_memory);

// For a load that is repeated until another thread writes: yields when the value has not changed.
void poll(const void* address, uint64_t value, const char* where);
void yield(const char* where, int line, const char* file = nullptr);

// Memory order at an address.
void release(const void* address);
void acquire(const void* address);
void fence();
void relaxed_store(const void* address, bool read_modify_write);
void relaxed_load(const void* address);

// The named functions of device.cuh.
void start_dependents();
void wait_for_primary(const char* file, int line);

// Asynchronous copies to shared memory: none arrives before it is waited for.
void async_copy(void* to, const void* from, size_t bytes, size_t valid);
void async_commit();
void async_wait(size_t groups_left);

}  // namespace simt

// Takes and gives back memory of csrc/scratch.h; prints what is wrong and exits with 1.
#include "scratch.h"

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

using namespace fastlstm;

constexpr int64_t MiB = 1 << 20;

static void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("%s\n", what);
  std::exit(1);
}

struct Taken {
  uint64_t* data;
  int64_t words;
  uint64_t mark;
};

static void write(const Taken& x) {
  for (int64_t j = 0; j < x.words; j += 8) x.data[j] = x.mark + uint64_t(j);
}
static void check(const Taken& x) {
  for (int64_t j = 0; j < x.words; j += 8)
    expect(x.data[j] == x.mark + uint64_t(j), "another block's data");
}

// Threads that hand blocks to each other: each holds its own, and gives back what others took.
static void exchange() {
  std::mutex mutex;
  std::vector<Taken> common;
  auto work = [&](uint64_t seed) {
    for (int round = 0; round < 150; ++round) {
      seed = seed * 6364136223846793005u + 1442695040888963407u;
      const int64_t bytes =
          round % 20 ? 8 << (seed >> 33) % 16 : 4 * MiB + int64_t(seed >> 40) % MiB;
      const Taken mine{static_cast<uint64_t*>(take_scratch(bytes)), bytes / 8, seed};
      expect(mine.data != nullptr, "no memory");
      expect(reinterpret_cast<uintptr_t>(mine.data) % 64 == 0, "not on a cache line");
      write(mine);
      Taken other{nullptr, 0, 0};
      {
        std::lock_guard<std::mutex> lock(mutex);
        common.push_back(mine);
        if (common.size() > 8) {
          const size_t j = size_t(seed >> 20) % common.size();
          other = common[j];
          common.erase(common.begin() + int64_t(j));
        }
      }
      if (other.data == nullptr) continue;
      check(other);
      give_scratch(other.data);
    }
  };
  std::vector<std::thread> threads;
  for (uint64_t seed = 1; seed <= 4; ++seed) threads.emplace_back(work, seed);
  for (std::thread& thread : threads) thread.join();
  for (const Taken& x : common) {
    check(x);
    give_scratch(x.data);
  }
}

static void large_blocks() {
  // Nothing below touches the memory, so none of it is there.
  void* first = take_scratch(200 * MiB);
  give_scratch(first);
  expect(kept_by_process() >= 200 * MiB, "a large block is not kept");
  void* again = take_scratch(199 * MiB);
  expect(again == first, "a call that needs a little less has another block");
  void* small = take_scratch(100 * MiB);
  give_scratch(again);
  expect(take_scratch(100 * MiB) != first, "half of a block stays unused");
  give_scratch(small);
  const int64_t kept = kept_by_process();
  give_scratch(take_scratch(1100 * MiB));
  expect(kept_by_process() == kept, "a block that cannot be kept pushes out the others");
  void* large[3];
  for (void*& block : large) block = take_scratch(400 * MiB);
  for (void* block : large) give_scratch(block);
  expect(kept_by_process() <= 1024 * MiB, "the process keeps more than its limit");
  expect(take_scratch(400 * MiB) != nullptr && kept_by_process() < 1024 * MiB, "kept twice");
}

static void a_threads_blocks() {
  std::vector<void*> blocks;
  for (int j = 0; j < 40; ++j) blocks.push_back(take_scratch(3 * MiB));
  const int64_t before = kept_by_process();
  for (void* block : blocks) give_scratch(block);
  expect(kept_by_thread() > 50 * MiB && kept_by_thread() <= 64 * MiB, "a thread's limit");
  expect(kept_by_process() == before, "a small block is the process's");
  free_kept();
  expect(kept_by_thread() == 0 && kept_by_process() == 0, "memory that was not given back");
}

int main() {
  exchange();
  large_blocks();
  std::thread(a_threads_blocks).join();
  return 0;
}

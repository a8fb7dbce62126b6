#include "scratch.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <vector>

namespace fastlstm {
namespace {

// A thread's blocks come in sizes of 4 to 7 quarters of a power of two, so that little of one is
// unused and the next call, of another length, still finds it.
constexpr int kSmallest = 8, kLargest = 21, kQuarters = 4;  // 256 bytes to 3.5 MiB
constexpr int kSizes = (kLargest - kSmallest + 1) * kQuarters;
constexpr int64_t kLine = 64, kHugePage = 2 << 20;
constexpr int64_t kMostKeptByThread = 64 << 20, kMostKeptByProcess = 1 << 30;

int64_t bytes_of(int size) {
  return int64_t(kQuarters + size % kQuarters) << (kSmallest + size / kQuarters - 2);
}

// The smallest size that holds so many bytes, or kSizes where all are too small.
int size_for(int64_t bytes) {
  if (bytes <= int64_t(1) << kSmallest) return 0;
  const int power = 63 - __builtin_clzll(uint64_t(bytes - 1));
  const int quarter = int((bytes - 1) >> (power - 2)) & (kQuarters - 1);
  const int size = (power - kSmallest) * kQuarters + quarter + 1;
  return size < kSizes ? size : kSizes;
}

// What stands before a block's data.
struct alignas(kLine) Block {
  Block* next;    // among those that a thread keeps
  int64_t bytes;  // of the data
  int size;       // kSizes: a large block
};

struct KeptByThread {
  Block* first[kSizes] = {};
  int64_t bytes = 0;

  void free_all() {
    for (Block*& list : first)
      while (Block* block = list) {
        list = block->next;
        std::free(block);
      }
    bytes = 0;
  }
  ~KeptByThread() { free_all(); }
};

thread_local KeptByThread kept;

// Large blocks, in the order in which they came back.
class KeptByProcess {
 public:
  // The smallest block that holds so many bytes, with at most a quarter more, or null.
  Block* take(int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    size_t best = blocks_.size();
    for (size_t j = 0; j < blocks_.size(); ++j)
      if (blocks_[j]->bytes >= bytes &&
          blocks_[j]->bytes - bytes <= std::max(bytes / 4, kHugePage) &&
          (best == blocks_.size() || blocks_[j]->bytes < blocks_[best]->bytes))
        best = j;
    return best < blocks_.size() ? remove(best) : nullptr;
  }

  // Those that nobody took for longest make room, unless the block would not fit alone.
  void give(Block* block) {
    if (block->bytes > kMostKeptByProcess) return std::free(block);
    std::lock_guard<std::mutex> lock(mutex_);
    blocks_.push_back(block);
    bytes_ += block->bytes;
    while (bytes_ > kMostKeptByProcess) std::free(remove(0));
  }

  void free_all() {
    std::lock_guard<std::mutex> lock(mutex_);
    while (!blocks_.empty()) std::free(remove(0));
  }

  int64_t bytes() {
    std::lock_guard<std::mutex> lock(mutex_);
    return bytes_;
  }

 private:
  Block* remove(size_t j) {
    Block* block = blocks_[j];
    blocks_.erase(blocks_.begin() + int64_t(j));
    bytes_ -= block->bytes;
    return block;
  }

  std::mutex mutex_;
  std::vector<Block*> blocks_;
  int64_t bytes_ = 0;
};

// Never destroyed: tensors may come back while the process ends.
KeptByProcess& process() {
  static KeptByProcess* const pool = new KeptByProcess;
  return *pool;
}

Block* new_block(int64_t bytes, int size) {
  const bool large = size == kSizes;
  const int64_t header = sizeof(Block), line = large ? kHugePage : kLine;
  const int64_t whole = (header + bytes + line - 1) / line * line;
  auto* block = static_cast<Block*>(std::aligned_alloc(size_t(line), size_t(whole)));
  if (block == nullptr) return nullptr;
#ifdef MADV_HUGEPAGE
  if (large) madvise(block, size_t(whole), MADV_HUGEPAGE);
#endif
  block->bytes = whole - header;
  block->size = size;
  return block;
}

}  // namespace

void* take_scratch(int64_t bytes) {
  const int size = size_for(bytes);
  Block* block;
  if (size == kSizes) {
    block = process().take(bytes);
  } else if ((block = kept.first[size])) {
    kept.first[size] = block->next;
    kept.bytes -= block->bytes;
  }
  if (block == nullptr) block = new_block(size == kSizes ? bytes : bytes_of(size), size);
  return block ? block + 1 : nullptr;
}

void give_scratch(void* data) {
  if (data == nullptr) return;
  Block* block = static_cast<Block*>(data) - 1;
  if (block->size == kSizes) return process().give(block);
  if (kept.bytes + block->bytes > kMostKeptByThread) return std::free(block);
  block->next = kept.first[block->size];
  kept.first[block->size] = block;
  kept.bytes += block->bytes;
}

int64_t kept_by_thread() { return kept.bytes; }
int64_t kept_by_process() { return process().bytes(); }

void free_kept() {
  kept.free_all();
  process().free_all();
}

}  // namespace fastlstm

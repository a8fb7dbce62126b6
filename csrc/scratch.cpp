#include "scratch.h"

#include <cstdlib>

namespace fastlstm {
namespace {

// Blocks come in sizes of 4 to 7 quarters of a power of two, so that little of one is unused and
// the next call, of another length, still finds it.
constexpr int kSmallest = 8, kLargest = 25, kQuarters = 4;  // 256 bytes to 56 MiB
constexpr int kSizes = (kLargest - kSmallest + 1) * kQuarters;
constexpr int64_t kLine = 64, kMostKept = 64 << 20;

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
  Block* next;
  int size;
};

struct Kept {
  Block* first[kSizes] = {};
  int64_t bytes = 0;

  ~Kept() {
    for (Block*& list : first)
      while (Block* block = list) {
        list = block->next;
        std::free(block);
      }
  }
};

thread_local Kept kept;

}  // namespace

void* take_scratch(int64_t bytes) {
  const int size = size_for(bytes);
  Block* block = nullptr;
  if (size < kSizes && (block = kept.first[size])) {
    kept.first[size] = block->next;
    kept.bytes -= bytes_of(size);
  } else {
    const int64_t whole = size < kSizes ? bytes_of(size) : (bytes + kLine - 1) / kLine * kLine;
    block = static_cast<Block*>(std::aligned_alloc(kLine, size_t(whole) + sizeof(Block)));
    if (block == nullptr) return nullptr;
    block->size = size;
  }
  return block + 1;
}

void give_scratch(void* data) {
  if (data == nullptr) return;
  Block* block = static_cast<Block*>(data) - 1;
  if (block->size == kSizes) return std::free(block);
  const int64_t bytes = bytes_of(block->size);
  if (kept.bytes + bytes > kMostKept) return std::free(block);
  block->next = kept.first[block->size];
  kept.first[block->size] = block;
  kept.bytes += bytes;
}

int64_t kept_scratch() { return kept.bytes; }

}  // namespace fastlstm

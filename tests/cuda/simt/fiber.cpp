#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN 1
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {
namespace fiber {
namespace {

#if defined(SIMT_ASAN)
constexpr size_t kStack = 256 << 10;  // red zones
const void* main_bottom = nullptr;
size_t main_size = 0;
#else
constexpr size_t kStack = 64 << 10;
#endif

constexpr size_t kKept = 64 << 20;  // between launches

// Stacks that all began at multiples of a power of two would share a few sets of the caches.
size_t offset_of(int fiber) { return size_t(fiber) % 61 * 192; }

char* stacks = nullptr;
size_t stacks_bytes = 0;

void reserve(size_t bytes) {
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(stacks, stacks_bytes);  // dead fibers leave poisoned frames
#endif
  if (stacks_bytes < bytes) {
    if (stacks) munmap(stacks, stacks_bytes);
    stacks = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    stacks_bytes = bytes;
  }
}

#if defined(__x86_64__)
// Pushes the registers that a call preserves, swaps stack pointers, pops.
extern "C" void simt_switch_stack(void** save, void* load);
asm(".text\n.globl simt_switch_stack\n.hidden simt_switch_stack\nsimt_switch_stack:\n"
    "  push %rbp\n  push %rbx\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
    "  mov %rsp, (%rdi)\n  mov %rsi, %rsp\n"
    "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbx\n  pop %rbp\n  ret\n");

void* main_context;
std::vector<void*> contexts;

void prepare(int j, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stacks + (j + 1) * kStack - offset_of(j));
  *--top = nullptr;  // the alignment that a function expects at its entry
  *--top = reinterpret_cast<void*>(entry);
  for (int k = 0; k < 6; ++k) *--top = nullptr;
  contexts[j] = top;
}

void swap(int from, int to) {
  simt_switch_stack(from == kMain ? &main_context : &contexts[from],
                    to == kMain ? main_context : contexts[to]);
}
#else
ucontext_t main_context;
std::vector<ucontext_t> contexts;

void prepare(int j, void (*entry)()) {
  getcontext(&contexts[j]);
  contexts[j].uc_stack.ss_sp = stacks + j * kStack;
  contexts[j].uc_stack.ss_size = kStack - offset_of(j);
  contexts[j].uc_link = nullptr;
  makecontext(&contexts[j], entry, 0);
}

void swap(int from, int to) {
  swapcontext(from == kMain ? &main_context : &contexts[from],
              to == kMain ? &main_context : &contexts[to]);
}
#endif

}  // namespace

void create(int count, void (*entry)()) {
  reserve(count * kStack);
  contexts.resize(count);
  for (int j = 0; j < count; ++j) prepare(j, entry);
}

void destroy() {
  if (stacks_bytes <= kKept) return;
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(stacks, stacks_bytes);
#endif
  munmap(stacks, stacks_bytes);
  stacks = nullptr;
  stacks_bytes = 0;
}

void switch_to(int from, int to, bool ends) {
#if defined(SIMT_ASAN)
  void* fake_stack = nullptr;
  void** save = ends ? nullptr : &fake_stack;
  if (to == kMain)
    __sanitizer_start_switch_fiber(save, main_bottom, main_size);
  else
    __sanitizer_start_switch_fiber(save, stacks + to * kStack, kStack - offset_of(to));
  swap(from, to);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
  (void)ends;
  swap(from, to);
#endif
}

void begin() {
#if defined(SIMT_ASAN)
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  const bool from_fiber = bottom >= stacks && bottom < stacks + stacks_bytes;
  if (!from_fiber) {
    main_bottom = bottom;
    main_size = size;
  }
#endif
}

}  // namespace fiber
}  // namespace simt

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

constexpr int kNone = -1;
constexpr size_t kKept = 4096;  // stacks, between launches

// Stacks that all began at multiples of a power of two would share a few sets of the caches.
size_t offset_of(int stack) { return size_t(stack) % 61 * 192; }

char* stacks = nullptr;
size_t stack_count = 0, stacks_used = 0;  // used: since the launch began
std::vector<int> free_stacks;             // the last one that was left comes first
std::vector<int> stack_of;                // of each fiber; kNone before it runs
int left = kNone;                         // by a fiber that ended, which may still be on it
int running = 0;                          // fibers that have a stack
void (*entry_of_all)();

char* bottom_of(int stack) { return stacks + stack * kStack; }
size_t size_of(int stack) { return kStack - offset_of(stack); }

// What dead frames have poisoned. The frames of a fiber that ended are few.
void clean(char* bottom, size_t bytes) {
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(bottom, bytes);
#endif
}

int take_stack() {
  int stack = int(stacks_used);
  if (free_stacks.empty()) {
    ++stacks_used;
  } else {
    stack = free_stacks.back();
    free_stacks.pop_back();
  }
  clean(bottom_of(stack) + size_of(stack) - kStack / 16, kStack / 16);
  return stack;
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

void prepare(int fiber, int stack) {
  void** top = reinterpret_cast<void**>(bottom_of(stack) + size_of(stack));
  *--top = nullptr;  // the alignment that a function expects at its entry
  *--top = reinterpret_cast<void*>(entry_of_all);
  for (int k = 0; k < 6; ++k) *--top = nullptr;
  contexts[fiber] = top;
}

void swap(int from, int to) {
  simt_switch_stack(from == kMain ? &main_context : &contexts[from],
                    to == kMain ? main_context : contexts[to]);
}
#else
ucontext_t main_context;
std::vector<ucontext_t> contexts;

void prepare(int fiber, int stack) {
  ucontext_t& context = contexts[fiber];
  getcontext(&context);
  context.uc_stack.ss_sp = bottom_of(stack);
  context.uc_stack.ss_size = size_of(stack);
  context.uc_link = nullptr;
  makecontext(&context, entry_of_all, 0);
}

void swap(int from, int to) {
  swapcontext(from == kMain ? &main_context : &contexts[from],
              to == kMain ? &main_context : &contexts[to]);
}
#endif

}  // namespace

void create(int count, void (*entry)()) {
  if (stack_count < size_t(count)) {
    if (stacks) munmap(stacks, stack_count * kStack);
    stack_count = size_t(count);
    stacks = static_cast<char*>(mmap(nullptr, stack_count * kStack, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  entry_of_all = entry;
  contexts.resize(count);
  stack_of.assign(count, kNone);
}

void destroy() {
  if (running > 0) clean(stacks, stacks_used * kStack);  // an error ended the launch
  if (stacks_used > kKept) madvise(bottom_of(kKept), (stacks_used - kKept) * kStack, MADV_DONTNEED);
  free_stacks.clear();
  stacks_used = 0;
  left = kNone;
  running = 0;
}

void switch_to(int from, int to, bool ends) {
  if (left != kNone) free_stacks.push_back(left);
  left = kNone;
  if (to != kMain && stack_of[to] == kNone) {
    stack_of[to] = take_stack();
    prepare(to, stack_of[to]);
    ++running;
  }
  if (ends) {
    left = stack_of[from];
    --running;
  }
#if defined(SIMT_ASAN)
  void* fake_stack = nullptr;
  void** save = ends ? nullptr : &fake_stack;
  if (to == kMain)
    __sanitizer_start_switch_fiber(save, main_bottom, main_size);
  else
    __sanitizer_start_switch_fiber(save, bottom_of(stack_of[to]), size_of(stack_of[to]));
  swap(from, to);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
  swap(from, to);
#endif
}

void begin() {
#if defined(SIMT_ASAN)
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  const bool from_fiber = bottom >= stacks && bottom < stacks + stack_count * kStack;
  if (!from_fiber) {
    main_bottom = bottom;
    main_size = size;
  }
#endif
}

}  // namespace fiber
}  // namespace simt

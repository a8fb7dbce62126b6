// What the kernels use of their surroundings: threads and scratch memory.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../generate.h"
#include "../lstm.h"
#include "../scratch.h"
#if FASTLSTM_AMX
#include "amx.h"
#endif

namespace fastlstm {

struct Runtime {
  int threads;
  // Calls fn(context, j) for every j in [0, n), on any number of threads.
  void (*parallel)(int64_t n, void* context, void (*fn)(void* context, int64_t j));
};

typedef void (*ForwardKernel)(const Forward&, const Runtime&);
typedef void (*BackwardKernel)(const Backward&, const Runtime&);
typedef void (*GenerateKernel)(const Generate&, const Runtime&);

namespace {

// A thread that computes. It leaves no tiles behind.
struct Worker {
  ~Worker() {
#if FASTLSTM_AMX
    release_tiles();
#endif
  }
};

// Multiply-adds that pay for the start of another thread and for its barriers. Copying an element
// costs about four.
constexpr int64_t kWorkPerThread = 100000;

// Calls body(j) for every j in [0, n). A thread that is free takes the next j, which balances
// uneven tasks and busy cores. Results do not depend on the number of threads.
template <class F>
void parallel(const Runtime& runtime, int64_t n, F&& body) {
  struct Work {
    F& body;
    int64_t n, next;
  } work = {body, n, 0};
  auto take = [](void* context, int64_t) {
    Work& w = *static_cast<Work*>(context);
    const Worker worker;
    for (int64_t j; (j = __atomic_fetch_add(&w.next, 1, __ATOMIC_RELAXED)) < w.n;) w.body(j);
  };
  const int64_t workers = n < runtime.threads ? n : runtime.threads;
  if (workers <= 1)
    take(&work, 0);
  else
    runtime.parallel(workers, &work, take);
}

// As many of the threads as so many multiply-adds pay for.
inline int64_t worthwhile_threads(int64_t threads, int64_t work) {
  const int64_t worth = work / kWorkPerThread;
  return worth < 1 ? 1 : worth < threads ? worth : threads;
}

// The same on as many threads as all calls together pay for.
template <class F>
void parallel_if_worth(const Runtime& runtime, int64_t work, int64_t n, F&& body) {
  parallel(Runtime{int(worthwhile_threads(runtime.threads, work)), runtime.parallel}, n, body);
}

}  // namespace

// Defined in the op layer: raises RuntimeError.
[[noreturn]] void throw_out_of_memory(int64_t bytes);

namespace {

// Uninitialised scratch of n elements, aligned to a cache line.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n) { reset(n); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { give_scratch(data_); }

  void reset(int64_t n) {
    give_scratch(data_);
    const int64_t bytes = n * int64_t(sizeof(T));
    data_ = static_cast<T*>(take_scratch(bytes));
    if (data_ == nullptr) throw_out_of_memory(bytes);
  }
  static void swap(Buffer& a, Buffer& b) {
    T* data = a.data_;
    a.data_ = b.data_;
    b.data_ = data;
  }
  void reset_to_zero(int64_t n) {
    reset(n);
    memset(data_, 0, size_t(n) * sizeof(T));
  }
  T* get() const { return data_; }
  T& operator[](int64_t j) const { return data_[j]; }

 private:
  T* data_ = nullptr;
};

// Objects that are constructed one after another and never move. Templates of the standard library
// would leave code of this instruction set for the linker to choose.
template <class T>
class List {
 public:
  explicit List(int64_t capacity) : items_(capacity) {}
  List(const List&) = delete;
  List& operator=(const List&) = delete;
  ~List() {
    while (count_ > 0) delete items_[--count_];
  }
  template <class... Args>
  void add(Args&&... args) {
    items_[count_] = new T(static_cast<Args&&>(args)...);
    ++count_;
  }
  T& operator[](int64_t j) const { return *items_[j]; }
  int64_t count() const { return count_; }

 private:
  Buffer<T*> items_;
  int64_t count_ = 0;
};

}  // namespace
}  // namespace fastlstm

// What a kernel unit needs from outside: threads. And its scratch memory.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../generate.h"
#include "../lstm.h"
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

// A thread at work.
struct Worker {
  ~Worker() {
#if FASTLSTM_AMX
    release_tiles();
#endif
  }
};

// Multiplications for which another thread is worth its start and its meetings. A copy of an
// element costs about four.
constexpr int64_t kWorthAThread = 100000;

// body(j) for every j in [0, n). Threads take the next j as they come free, so uneven tasks and
// busy cores even out; nothing depends on how many threads there really are.
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

// The same where all bodies together are `work` multiplications: alone where they are few.
template <class F>
void parallel_if_worth(const Runtime& runtime, int64_t work, int64_t n, F&& body) {
  parallel(work < 2 * kWorthAThread ? Runtime{1, nullptr} : runtime, n, body);
}

}  // namespace

// Defined in the op layer: raises RuntimeError.
[[noreturn]] void throw_out_of_memory(int64_t bytes);

namespace {

// Uninitialised scratch of n elements, on a cache line.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n) { reset(n); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(data_); }

  void reset(int64_t n) {
    free(data_);
    const int64_t bytes = (n * int64_t(sizeof(T)) + 63) / 64 * 64;
    data_ = static_cast<T*>(aligned_alloc(64, bytes > 0 ? size_t(bytes) : 64));
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

// Objects that are made one after the other and stay where they are. (Templates of the standard
// library would leave code of this instruction set for the linker to choose.)
template <class T>
class List {
 public:
  explicit List(int64_t most) : items_(most) {}
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

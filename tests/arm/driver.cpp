// The CPU kernels as a program that knows nothing of torch, so that an emulator of another
// processor can run it: it carries out one call that it reads from its input, and writes what
// became of it.
//
//   driver <forward|prepacked|backward|generate|activations> <threads>
//
// Input: Header, the places of all pointers in the call's memory, then that memory. It begins with
// the call's plain struct (csrc/lstm.h, csrc/generate.h, Activations). A pointer in it is an offset
// into it. Output: the memory after the call, with its pointers made absolute.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

namespace fastlstm {

void throw_out_of_memory(int64_t bytes) {
  throw std::runtime_error("out of memory: " + std::to_string(bytes) + " bytes");
}

namespace {

// Kernels::activations of one type.
struct Activations {
  DType dtype;
  int64_t n;
  const void* x;
  void *sigmoid, *tanh;
};

struct Header {
  int64_t struct_bytes, pointers, memory_bytes;
};

void read(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) throw std::runtime_error("the input is too short");
}

class Memory {
 public:
  Memory() {
    read(&header_, sizeof header_);
    std::vector<int64_t> places(static_cast<size_t>(header_.pointers));
    read(places.data(), places.size() * sizeof places[0]);
    constexpr size_t kLine = 64;
    data_ = static_cast<char*>(std::aligned_alloc(kLine, (size() + kLine - 1) / kLine * kLine));
    if (data_ == nullptr) throw_out_of_memory(header_.memory_bytes);
    read(data_, size());
    for (int64_t place : places) {
      int64_t offset;
      std::memcpy(&offset, data_ + place, sizeof offset);
      const char* pointer = data_ + offset;
      std::memcpy(data_ + place, &pointer, sizeof pointer);
    }
  }
  ~Memory() { std::free(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  template <class Struct>
  Struct& call() const {
    if (header_.struct_bytes != int64_t(sizeof(Struct)))
      throw std::runtime_error("the call's struct has " + std::to_string(header_.struct_bytes) +
                               " bytes, not " + std::to_string(sizeof(Struct)));
    return *reinterpret_cast<Struct*>(data_);
  }
  void write() const {
    if (std::fwrite(data_, 1, size(), stdout) != size() || std::fflush(stdout) != 0)
      throw std::runtime_error("the output cannot be written");
  }

 private:
  size_t size() const { return size_t(header_.memory_bytes); }

  Header header_;
  char* data_ = nullptr;
};

void run_parallel(int64_t n, void* context, void (*fn)(void*, int64_t)) {
  std::vector<std::thread> threads;
  for (int64_t j = 1; j < n; ++j) threads.emplace_back(fn, context, j);
  fn(context, 0);
  for (std::thread& thread : threads) thread.join();
}

void run(const std::string& name, const Memory& memory, const Runtime& runtime) {
  const InstructionSet& set = instruction_set();
  if (name == "forward") {
    const Forward& f = memory.call<Forward>();
    set.kernels[int(f.problem.dtype)]->forward(f, runtime);
  } else if (name == "prepacked") {
    Forward f = memory.call<Forward>();
    const Kernels& kernels = *set.kernels[int(f.problem.dtype)];
    f.packed = kernels.pack(f.problem, runtime);
    kernels.forward(f, runtime);
    kernels.free_packed(f.packed);
  } else if (name == "backward") {
    const Backward& b = memory.call<Backward>();
    set.kernels[int(b.problem.dtype)]->backward(b, runtime);
  } else if (name == "generate") {
    const Generate& g = memory.call<Generate>();
    set.generate->storage[int(g.storage)](g, runtime);
  } else if (name == "activations") {
    const Activations& a = memory.call<Activations>();
    set.kernels[int(a.dtype)]->activations(a.x, a.sigmoid, a.tanh, a.n);
  } else {
    throw std::runtime_error("there is no call " + name);
  }
}

}  // namespace
}  // namespace fastlstm

int main(int argc, char** argv) {
  try {
    if (argc != 3) throw std::runtime_error("expected the name of a call and how many threads");
    const fastlstm::Memory memory;
    fastlstm::run(argv[1], memory, {std::atoi(argv[2]), fastlstm::run_parallel});
    memory.write();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "driver: %s\n", error.what());
    return 1;
  }
  return 0;
}

// The CPU kernels with 64-byte vectors, compiled for the instructions that this processor has: the
// compiler makes each vector of two or four registers. tests/ops/test_cpu_wide.py defines STORAGE
// and, for bfloat16 in pairs or tiles, FASTLSTM_BF16_PAIRS and FASTLSTM_AMX.
#define FASTLSTM_VEC_BYTES 64
#include "cpu/backward.h"
#include "cpu/forward.h"

#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace fastlstm {

void throw_out_of_memory(int64_t) { throw std::runtime_error("out of memory"); }

namespace {

struct Options {
  int32_t threads;
};
struct Report {
  char error[512];
};

void run_parallel(int64_t n, void* context, void (*fn)(void*, int64_t)) {
  std::vector<std::thread> threads;
  for (int64_t j = 1; j < n; ++j) threads.emplace_back(fn, context, j);
  fn(context, 0);
  for (std::thread& thread : threads) thread.join();
}

template <class Run>
void guarded(Report* report, Run&& run) {
  report->error[0] = 0;
  try {
    run();
  } catch (const std::exception& error) {
    snprintf(report->error, sizeof report->error, "%s", error.what());
  }
}

}  // namespace
}  // namespace fastlstm

using namespace fastlstm;

extern "C" {
void wide_forward(const Forward* f, const Options* options, Report* report) {
  guarded(report, [&] { forward<STORAGE>(*f, {options->threads, run_parallel}); });
}
void wide_backward(const Backward* f, const Options* options, Report* report) {
  guarded(report, [&] { backward<STORAGE>(*f, {options->threads, run_parallel}); });
}
}

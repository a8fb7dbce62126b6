// The CUDA launcher as a library, with its kernels run by the emulator (simt_library.py calls it).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>

#include "grid/shapes.h"
#include "half.h"
#include "launch.h"
#include "race.h"
#include "simt.h"
#include "stepwise/tiles.h"

namespace fastlstm {
namespace cuda {

int64_t input_part(const Forward& f, int slots, int units, const Context* context, int64_t rows,
                   float* starts, float* biases);  // input_part.cu

// Some builds leave types out.
__attribute__((weak)) extern const Passes kStepwiseF32 = {nullptr, nullptr};
__attribute__((weak)) extern const Passes kStepwiseTf32 = {nullptr, nullptr};
__attribute__((weak)) extern const Passes kStepwiseF64 = {nullptr, nullptr};
__attribute__((weak)) extern const Passes kStepwiseBf16 = {nullptr, nullptr};
__attribute__((weak)) extern const Passes kStepwiseF16 = {nullptr, nullptr};
#define SIMT_LEFT_OUT(name, Call)                                                \
  __attribute__((weak)) int64_t name(const Call&, const Plan&, const Context*) { \
    throw std::logic_error(#name " is not in this build");                       \
  }
#define SIMT_PASSES_LEFT_OUT(algorithm, type)        \
  SIMT_LEFT_OUT(algorithm##_forward_##type, Forward) \
  SIMT_LEFT_OUT(algorithm##_backward_##type, Backward)
SIMT_PASSES_LEFT_OUT(cluster, f32)
SIMT_PASSES_LEFT_OUT(cluster, tf32)
SIMT_PASSES_LEFT_OUT(cluster, bf16)
SIMT_PASSES_LEFT_OUT(cluster, f16)
SIMT_PASSES_LEFT_OUT(grid, f32)
SIMT_PASSES_LEFT_OUT(grid, tf32)
SIMT_PASSES_LEFT_OUT(grid, bf16)
SIMT_PASSES_LEFT_OUT(grid, f16)

}  // namespace cuda
}  // namespace fastlstm

namespace {

using namespace fastlstm;
using namespace fastlstm::cuda;

double get(DType type, const void* from, int64_t at) {
  switch (type) {
    case DType::f32: return static_cast<const float*>(from)[at];
    case DType::f64: return static_cast<const double*>(from)[at];
    case DType::bf16: return simt::to_float(static_cast<const simt::Bf16*>(from)[at]);
    case DType::f16: return simt::to_float(static_cast<const simt::F16*>(from)[at]);
  }
  return 0;
}

void set(DType type, void* to, int64_t at, double value) {
  switch (type) {
    case DType::f32: static_cast<float*>(to)[at] = float(value); break;
    case DType::f64: static_cast<double*>(to)[at] = value; break;
    case DType::bf16: static_cast<simt::Bf16*>(to)[at] = simt::round_to_bf16(float(value)); break;
    case DType::f16: static_cast<simt::F16*>(to)[at] = simt::round_to_f16(float(value)); break;
  }
}

// How many large products there were, and how many of them have rows that do not begin at 16 bytes
// or are not whole pieces of 16 bytes.
struct Products {
  int64_t count, unaligned;
};

int64_t bytes_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

bool aligned(const Gemm& g) {
  auto whole = [](const void* data, int64_t row, int64_t width, DType type) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row * bytes_of(type) % 16 == 0 &&
           width * bytes_of(type) % 16 == 0;
  };
  auto operand = [&](const Operand& x, int64_t rows, int64_t columns) {
    return x.column == 1 ? whole(x.data, x.row, columns, g.in)
                         : whole(x.data, x.column, rows, g.in);
  };
  return operand(g.a, g.m, g.k) && operand(g.b, g.k, g.n) && whole(g.c, g.n, g.n, g.out);
}

// Tells the race checker of a matrix that a large product reads or writes.
void touch(const void* data, int64_t outer, int64_t stride, int64_t width, DType type, bool write) {
  for (int64_t j = 0; j < outer; ++j)
    simt::race::access(uintptr_t(data) + j * stride * bytes_of(type),
                       size_t(width * bytes_of(type)), write, __builtin_return_address(0));
}
void touch(const Operand& x, int64_t rows, int64_t columns, DType type) {
  if (x.column == 1)
    touch(x.data, rows, x.row, columns, type, false);
  else
    touch(x.data, columns, x.column, rows, type, false);
}

// The large products of the launcher's contract, in the simplest way.
void gemm(void* products, const Gemm& g) {
  Products& counts = *static_cast<Products*>(products);
  ++counts.count;
  counts.unaligned += !aligned(g);
  static_cast<simt::Stream*>(g.stream)->run_library([g] {
    touch(g.a, g.m, g.k, g.in);
    touch(g.b, g.k, g.n, g.in);
    for (int64_t i = 0; i < g.m; ++i)
      for (int64_t j = 0; j < g.n; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < g.k; ++k)
          sum += get(g.in, g.a.data, i * g.a.row + k * g.a.column) *
                 get(g.in, g.b.data, k * g.b.row + j * g.b.column);
        set(g.out, g.c, i * g.n + j, sum);
      }
    touch(g.c, g.m, g.n, g.n, g.out, true);
  });
}

}  // namespace

// Mirrored by simt_library.py.
struct Options {
  int32_t order, races, preempt, tile, algorithm, allow_tf32, capability, shape, active, ctas,
      units, sequences, chunk_steps, turn, forgotten;
  uint64_t seed;
};
struct Report {
  int64_t races, launches, largest_grid, products, unaligned, follows;
  char error[512], first_race[512];
};

namespace {

template <class Call>
void run(const Options& options, Report* report, const Problem& p, Pass pass, Call&& call) {
  *report = {};
  try {
    Settings settings;
    settings.algorithm = Algorithm(options.algorithm);
    settings.allow_tf32 = options.allow_tf32 != 0;
    const int64_t shared = options.capability >= 80 ? 227 << 10 : 64 << 10;
    Plan chosen = plan(p, pass, {options.capability, 132, shared}, settings);
    if (options.tile >= 0) {
      chosen.projection_tile = std::min(options.tile, kLibraryTile);
      chosen.cell_tile = pass == Pass::forward ? options.tile : chosen.projection_tile;
      chosen.single_step = false;
    }
    if (options.shape >= 0 && chosen.algorithm == Algorithm::grid) {
      const bool forward = pass == Pass::forward, fp32 = !chosen.tensor_cores;
      const int count = forward ? forward_shape_count(fp32) : backward_shape_count(fp32);
      chosen.shape = std::min(options.shape, count - 1);
      const int sequences = forward ? forward_shape(chosen.shape, fp32).sequences()
                                    : backward_shape(chosen.shape, fp32).sequences();
      chosen.groups = parts_of(p.batch, sequences);
      chosen.active = options.active > 0 ? options.active : p.directions * chosen.groups;
    }
    if (options.ctas > 0 && chosen.algorithm != Algorithm::grid) {
      chosen.ctas = options.ctas;
      chosen.units = options.units;
    }
    if (options.sequences > 0) chosen.sequences = options.sequences;
    if (options.chunk_steps >= 0 && chosen.algorithm == Algorithm::cluster)
      chosen.chunk_steps = options.chunk_steps;
    simt::Stream stream;
    stream.config.order = simt::Order(options.order);
    stream.config.seed = options.seed;
    stream.config.races = options.races != 0;
    stream.config.preempt = unsigned(options.preempt);
    stream.turn = simt::Turn(options.turn);
    stream.overlaps = true;
    stream.forgotten = options.forgotten;
    Products products{};
    Context context{&stream, nullptr, gemm, &products};
    call(chosen, context);
    report->products = products.count;
    report->unaligned = products.unaligned;
    report->races = stream.races;
    report->launches = stream.launches;
    report->largest_grid = stream.largest_grid;
    report->follows = stream.follows;
    snprintf(report->error, sizeof report->error, "%s", stream.error.c_str());
    snprintf(report->first_race, sizeof report->first_race, "%s", stream.first_race.c_str());
  } catch (const std::exception& e) {
    snprintf(report->error, sizeof report->error, "exception: %s", e.what());
  }
}

// Filled with NaNs, so that a read before the first write shows in the result.
struct Workspace {
  explicit Workspace(int64_t bytes)
      : memory(static_cast<unsigned char*>(aligned_alloc(256, size_t(bytes + 255) / 256 * 256))) {
    for (int64_t j = 0; j < bytes; ++j) memory[j] = 0xff;
    simt::track(memory, size_t(bytes), "workspace");
  }
  ~Workspace() {
    simt::untrack(memory);
    free(memory);
  }
  unsigned char* memory;
};

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void simt_track(const void* memory, size_t bytes,
                                                       const char* name) {
  simt::track(memory, bytes, name);
}
__attribute__((visibility("default"))) void simt_untrack(const void* memory) {
  simt::untrack(memory);
}

__attribute__((visibility("default"))) void simt_forward(const Forward* f, const Options* options,
                                                         Report* report) {
  run(*options, report, f->problem, Pass::forward, [&](const Plan& plan, Context& context) {
    const Workspace workspace(forward_workspace(*f, plan));
    context.workspace = workspace.memory;
    forward(*f, plan, context);
    static_cast<simt::Stream*>(context.stream)->finish();
  });
}

__attribute__((visibility("default"))) void simt_backward(const Backward* f, const Options* options,
                                                          Report* report) {
  run(*options, report, f->problem, Pass::backward, [&](const Plan& plan, Context& context) {
    const Workspace workspace(backward_workspace(*f, plan));
    context.workspace = workspace.memory;
    backward(*f, plan, context);
    static_cast<simt::Stream*>(context.stream)->finish();
  });
}

__attribute__((visibility("default"))) void simt_input_part(const Forward* f, int slots, int units,
                                                            int64_t rows, float* starts,
                                                            float* biases) {
  simt::Stream stream;
  Products products{};
  const Workspace workspace(input_part(*f, slots, units, nullptr, rows, starts, biases));
  const Context context{&stream, workspace.memory, gemm, &products};
  input_part(*f, slots, units, &context, rows, starts, biases);
}

__attribute__((visibility("default"))) void simt_plan(const Problem* p, int backward,
                                                      int capability, int sms, int algorithm,
                                                      Plan* result) {
  Settings settings;
  settings.algorithm = Algorithm(algorithm);
  *result = plan(*p, Pass(backward), {capability, sms, capability >= 80 ? 227 << 10 : 64 << 10},
                 settings);
}

}  // extern "C"

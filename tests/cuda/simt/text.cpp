// The launcher of the kernels that draw text as a library (simt_text.py calls it).
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <vector>

#include "generate_launch.h"
#include "simt.h"

namespace fastlstm {
namespace cuda {

// Some builds leave types out.
#define SIMT_LEFT_OUT(name)                                                             \
  __attribute__((weak)) void name(const Generate&, const GeneratePlan&, void*, void*) { \
    throw std::logic_error(#name " is not in this build");                              \
  }
SIMT_LEFT_OUT(generate_bf16)
SIMT_LEFT_OUT(generate_f16)
SIMT_LEFT_OUT(generate_f32)

}  // namespace cuda
}  // namespace fastlstm

using namespace fastlstm;
using namespace fastlstm::cuda;

// Mirrored by simt_text.py. units 0: the planner chooses everything.
struct TextOptions {
  int32_t order, races, preempt, capability, sms, units, tiles, active;
  uint64_t seed;
};
struct TextReport {
  int64_t races, launches, largest_grid;
  char error[512], first_race[512];
};

extern "C" {

__attribute__((visibility("default"))) void simt_track(const void* memory, size_t bytes,
                                                       const char* name) {
  simt::track(memory, bytes, name);
}
__attribute__((visibility("default"))) void simt_untrack(const void* memory) {
  simt::untrack(memory);
}

__attribute__((visibility("default"))) void simt_generate(const Generate* g,
                                                          const TextOptions* options,
                                                          TextReport* report) {
  *report = {};
  try {
    const GenerateModel model = generate_model(*g);
    GeneratePlan plan = generate_plan(model, {options->capability, options->sms, 227 << 10});
    if (options->units > 0) {
      plan = {};
      if (!generate_layout(model, options->tiles, options->units, &plan.layout))
        throw std::invalid_argument("no such shape");
      const int columns = plan.layout.columns();
      plan.groups = int((g->batch + columns - 1) / columns);
      plan.active = options->active > 0 ? options->active : plan.groups;
    }
    if (plan.reason) throw std::invalid_argument(plan.reason);
    simt::Stream stream;
    stream.config.order = simt::Order(options->order);
    stream.config.seed = options->seed;
    stream.config.races = options->races != 0;
    stream.config.preempt = unsigned(options->preempt);
    // Filled with NaNs, so that a read before the first write shows in the result.
    const size_t bytes = size_t(generate_workspace(plan));
    void* workspace = aligned_alloc(256, bytes);
    for (size_t j = 0; j < bytes; ++j) static_cast<unsigned char*>(workspace)[j] = 0xff;
    simt::track(workspace, bytes, "workspace");
    generate(*g, plan, &stream, workspace);
    simt::untrack(workspace);
    free(workspace);
    report->races = stream.races;
    report->launches = stream.launches;
    report->largest_grid = stream.largest_grid;
    snprintf(report->error, sizeof report->error, "%s", stream.error.c_str());
    snprintf(report->first_race, sizeof report->first_race, "%s", stream.first_race.c_str());
  } catch (const std::exception& e) {
    snprintf(report->error, sizeof report->error, "exception: %s", e.what());
  }
}

// Returns null where the model runs, or the reason why it does not.
__attribute__((visibility("default"))) const char* simt_generate_plan(const GenerateModel* model,
                                                                      int capability, int sms,
                                                                      int64_t shared,
                                                                      GeneratePlan* result) {
  *result = generate_plan(*model, {capability, sms, shared});
  return result->reason;
}

}  // extern "C"

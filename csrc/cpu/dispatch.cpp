// Which instruction set's kernels run: the best that this processor has.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fastlstm {

#define FASTLSTM_DECLARE(isa)                                                       \
  extern const Kernels k_##isa##_f32, k_##isa##_f64, k_##isa##_bf16, k_##isa##_f16; \
  extern const GenerateKernels k_##isa##_generate;
#define FASTLSTM_TABLES(isa) \
  {&k_##isa##_f32, &k_##isa##_f64, &k_##isa##_bf16, &k_##isa##_f16}, &k_##isa##_generate

FASTLSTM_DECLARE(baseline)
#if defined(__x86_64__)
FASTLSTM_DECLARE(avx2)
FASTLSTM_DECLARE(avx512)
extern const Kernels k_avx512dot_bf16;
#endif

#if defined(__x86_64__)
static bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    // As avx512, but bfloat16 is multiplied as it stands, two at a time.
    {"avx512_bf16",
     {&k_avx512_f32, &k_avx512_f64, &k_avx512dot_bf16, &k_avx512_f16},
     &k_avx512_generate,
     [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }},
    {"avx512", FASTLSTM_TABLES(avx512), has_avx512},
    {"avx2", FASTLSTM_TABLES(avx2),
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"baseline", FASTLSTM_TABLES(baseline), [] { return true; }},
};
const int kInstructionSetCount = int(sizeof(kInstructionSets) / sizeof(kInstructionSets[0]));

namespace {

const InstructionSet* find(const char* name) {
  for (const InstructionSet& set : kInstructionSets)
    if (set.supported() && (name == nullptr || std::strcmp(set.name, name) == 0)) return &set;
  return nullptr;
}

// A name that this processor lacks is reported by fastlstm.info; the best set runs.
const InstructionSet*& current() {
  static const InstructionSet* set = [] {
    const InstructionSet* asked = find(std::getenv("FASTLSTM_CPU_ISA"));
    return asked ? asked : find(nullptr);
  }();
  return set;
}

}  // namespace

const InstructionSet& instruction_set() { return *current(); }

bool select_instruction_set(const char* name) {
  const InstructionSet* set = find(name);
  if (set) current() = set;
  return set != nullptr;
}

}  // namespace fastlstm

// Chooses the instruction set whose kernels run: the best one that this processor has.
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
extern const Kernels k_avx512dot_bf16, k_amx_bf16;  // setup.py leaves out what a compiler lacks
#endif

#if defined(__x86_64__)
static bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

[[maybe_unused]] static bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
}

// Whether the processor has AMX-TILE and AMX-BF16, and the operating system lets this process use
// tiles. A process requests that once, for all its threads.
[[maybe_unused]] static bool has_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  constexpr long kArchReqXcompPerm = 0x1023, kTileData = 18;
  return has_avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) &&
         (d & kBf16) && syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
#else
  return false;
#endif
}
#endif

const InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
// Like avx512, but bfloat16 is multiplied without conversion: by tiles, or in pairs.
#if !defined(FASTLSTM_NO_AMX)
    {"amx",
     {&k_avx512_f32, &k_avx512_f64, &k_amx_bf16, &k_avx512_f16},
     &k_avx512_generate,
     has_amx},
#endif
#if !defined(FASTLSTM_NO_AVX512DOT)
    {"avx512_bf16",
     {&k_avx512_f32, &k_avx512_f64, &k_avx512dot_bf16, &k_avx512_f16},
     &k_avx512_generate,
     has_avx512_bf16},
#endif
    {"avx512", FASTLSTM_TABLES(avx512), has_avx512},
    {"avx2", FASTLSTM_TABLES(avx2),
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"baseline", FASTLSTM_TABLES(baseline), [] { return true; }},
};
const int kInstructionSetCount = int(sizeof(kInstructionSets) / sizeof(kInstructionSets[0]));

namespace {

// Pairs of bfloat16 are multiplied at twice the rate of floats on AMD's processors, and at half of
// it on Intel's.
bool is_fast([[maybe_unused]] const InstructionSet& set) {
#if defined(__x86_64__)
  return std::strcmp(set.name, "avx512_bf16") != 0 || !__builtin_cpu_is("intel");
#else
  return true;
#endif
}

const InstructionSet* find(const char* name) {
  for (const InstructionSet& set : kInstructionSets)
    if (set.supported() && (name ? std::strcmp(set.name, name) == 0 : is_fast(set))) return &set;
  return nullptr;
}

// fastlstm.info reports a name that this processor lacks; the best set runs instead.
const InstructionSet*& current() {
  static const InstructionSet* set = [] {
    const InstructionSet* requested = find(std::getenv("FASTLSTM_CPU_ISA"));
    return requested ? requested : find(nullptr);
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

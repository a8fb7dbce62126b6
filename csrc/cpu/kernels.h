// The table of one instruction set's kernels, filled by the tiny files kernels_*.cpp.
//
// Each of those is compiled alone with its flags. Nothing in it may be visible to the linker but
// its table: a shared inline function built for AVX-512 could be the copy that older processors
// run. tests/test_native.py reads the symbol tables.
#pragma once

#include "runtime.h"

namespace fastlstm {

struct Kernels {
  ForwardKernel forward;
  BackwardKernel backward;
  // Applies sigmoid and tanh to n elements, for the tests of their error bounds.
  void (*activations)(const void* x, void* sigmoid, void* tanh, int64_t n);
  // Independent multiplications and additions in registers: what the processor can do at most.
  // Returns their number; the benchmarks measure its rate.
  double (*multiply_adds)(int64_t rounds);
};

// The kernels that draw text, in the order of Storage.
struct GenerateKernels {
  GenerateKernel storage[4];
};

// One table for every storage type, in the order of DType; one for drawing text.
struct InstructionSet {
  const char* name;
  const Kernels* kernels[4];
  const GenerateKernels* generate;
  bool (*supported)();
};

// Best first. The last one runs on every processor.
extern const InstructionSet kInstructionSets[];
extern const int kInstructionSetCount;

// The set in use: the best supported one, unless FASTLSTM_CPU_ISA names another.
const InstructionSet& instruction_set();
// Switches to the set of that name; false where it is unknown or this processor lacks it.
bool select_instruction_set(const char* name);

}  // namespace fastlstm

// The tables of kernels. Each file isa/<instruction set>/<type>.cpp fills one.
//
// Each of these files is compiled with the flags of its instruction set. The linker may see nothing
// of it but the table: of an inline function that several files share it keeps one copy, and a copy
// built for AVX-512 would then run on older processors. tests/ops/test_native.py reads the symbol
// tables.
#pragma once

#include "runtime.h"

namespace fastlstm {

struct Kernels {
  ForwardKernel forward;
  BackwardKernel backward;
  // Packs a problem's weights for Forward::packed of this table alone, and frees them.
  const void* (*pack)(const Problem&, const Runtime&);
  void (*free_packed)(const void* packed);
  // sigmoid and tanh of n elements, for the tests of their error bounds.
  void (*activations)(const void* x, void* sigmoid, void* tanh, int64_t n);
  // Runs independent multiply-adds in registers, the peak rate of the processor. Returns how many
  // operations these were; the benchmarks measure their rate.
  double (*multiply_adds)(int64_t rounds);
};

// The kernels that draw text, in the order of Storage.
struct GenerateKernels {
  GenerateKernel storage[4];
};

// The tables of every storage type, in the order of DType, and the one of drawing text.
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

// The input part alone (csrc/cuda/shared/input_part.cuh), for float32 and a layout by slots.
#include "shared/input_part.cuh"

#include <cstring>

namespace fastlstm {
namespace cuda {

// Returns the bytes of the workspace. With a context, it also writes the input part of the first
// layer to `starts` (directions, rows or vocabulary, 4 * slots * units), and all sums of biases to
// `biases` (pseudo-layers, 4H).
int64_t input_part(const Forward& f, int slots, int units, const Context* context, int64_t rows,
                   float* starts, float* biases) {
  Plan plan{};
  Stack<float> stack(f.problem, f.saved, plan, context);
  InputPart<float> input(stack, f.problem.layers, SlotLayout{slots, units});
  if (context) {
    input.begin();
    input.multiply_input(0, stack.all_steps());
    const int64_t part = rows * input.start_stride(), gates = 4 * f.problem.hidden_size;
    for (int d = 0; d < f.problem.directions; ++d)
      std::memcpy(starts + d * part, input.start(d), size_t(part) * sizeof(float));
    for (int64_t j = 0; j < f.problem.layers * f.problem.directions; ++j)
      std::memcpy(biases + j * gates, input.bias(j), size_t(gates) * sizeof(float));
  }
  return stack.arena.used();
}

}  // namespace cuda
}  // namespace fastlstm

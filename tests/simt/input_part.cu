// The input's part alone (csrc/cuda/input_part.cuh), for float32 and a layout by slots.
#include "input_part.cuh"

#include <cstring>

namespace fastlstm {
namespace cuda {

// Returns the workspace; with a context, starts (directions, rows or vocabulary, 4 * slots * units)
// become those of the first layer, and biases (layers * directions, 4H) all sums.
int64_t input_part(const Forward& f, int slots, int units, const Context* context, int64_t rows,
                   float* starts, float* biases) {
  Plan plan{};
  Stack<float> stack(f.problem, f.saved, plan, context);
  InputPart<float> input(stack, f.problem.layers, SlotLayout{slots, units});
  if (context) {
    input.begin();
    input.multiply_input(0);
    const int64_t part = rows * input.start_wide(), gates = 4 * f.problem.hidden_size;
    for (int d = 0; d < f.problem.directions; ++d)
      std::memcpy(starts + d * part, input.start(d), size_t(part) * sizeof(float));
    for (int64_t cell = 0; cell < f.problem.layers * f.problem.directions; ++cell)
      std::memcpy(biases + cell * gates, input.bias(cell), size_t(gates) * sizeof(float));
  }
  return stack.arena.used();
}

}  // namespace cuda
}  // namespace fastlstm

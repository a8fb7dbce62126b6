// The operators' schemas and their CPU side.
#include "cpu/kernels.h"
#include "ops_common.h"
#include "ops_threads.h"

namespace fastlstm {

void throw_out_of_memory(int64_t bytes) { ops::throw_not_allocated(bytes, -1, nullptr); }

namespace {

using namespace ops;

// Compiled code comes here without the checks in Python.
void check_indices(const Problem& p) {
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t at =
        p.batch_sizes ? row * p.stride_b : row / p.batch * p.stride_t + row % p.batch * p.stride_b;
    const int64_t x = p.input_kind == InputKind::index64
                          ? static_cast<const int64_t*>(p.input)[at]
                          : int64_t(static_cast<const int32_t*>(p.input)[at]);
    STD_TORCH_CHECK(x >= 0 && x < p.input_size, "fastlstm: index ", x, " at row ", row,
                    " is outside 0 .. ", p.input_size - 1);
  }
}

struct Cpu {
  explicit Cpu(const Tensor&) {}

  void check(const Inputs& in) const {
    if (in.problem.input_kind != InputKind::dense) check_indices(in.problem);
  }
  void run(const Forward& call, const Options&) const {
    kernels(call.problem).forward(call, runtime());
  }
  void run(const Backward& call, const Options&) const {
    kernels(call.problem).backward(call, runtime());
  }

 private:
  static const Kernels& kernels(const Problem& p) {
    return *instruction_set().kernels[int(p.dtype)];
  }
};

// sigmoid and tanh as the kernels compute them, for the tests of their error bounds.
std::tuple<Tensor, Tensor> activations(Tensor x) {
  const Tensor from = as_contiguous(x);
  Tensor sigmoid = empty(sizes_of(from), from), tanh = empty(sizes_of(from), from);
  instruction_set().kernels[int(dtype_of(from))]->activations(
      from.const_data_ptr(), sigmoid.mutable_data_ptr(), tanh.mutable_data_ptr(), from.numel());
  return {sigmoid, tanh};
}

}  // namespace
}  // namespace fastlstm

STABLE_TORCH_LIBRARY(fastlstm, m) {
  m.def(
      "forward(Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, "
      "Tensor? seed, int hidden_size, int num_layers, bool has_bias, int proj_size, "
      "bool bidirectional, float dropout, float recurrent_dropout, float zoneout_h, "
      "float zoneout_c, float cell_clip, bool layer_norm, bool allow_tf32, int algorithm, bool "
      "save) -> "
      "(Tensor output, Tensor h_n, Tensor c_n, Tensor hidden, Tensor gates, Tensor cells)");
  m.def(
      "backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cells, "
      "Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, Tensor? seed, "
      "Tensor output, Tensor hidden, Tensor gates, Tensor cells, int hidden_size, "
      "int num_layers, bool has_bias, int proj_size, bool bidirectional, float dropout, "
      "float recurrent_dropout, float zoneout_h, float zoneout_c, float cell_clip, "
      "bool layer_norm, bool allow_tf32, int algorithm, bool[] needs) -> "
      "(Tensor grad_input, Tensor grad_h0, Tensor grad_c0, Tensor[] grad_weights)");
  m.def("_activations(Tensor x) -> (Tensor sigmoid, Tensor tanh)");
}

STABLE_TORCH_LIBRARY_IMPL(fastlstm, CPU, m) {
  m.impl("forward", TORCH_BOX(&fastlstm::ops::forward_on<fastlstm::Cpu>));
  m.impl("backward", TORCH_BOX(&fastlstm::ops::backward_on<fastlstm::Cpu>));
  m.impl("_activations", TORCH_BOX(&fastlstm::activations));
}

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

const Kernels& kernels(const Problem& p) { return *instruction_set().kernels[int(p.dtype)]; }

ForwardResult forward_cpu(Tensor input, MaybeTensor h0, MaybeTensor c0, std::vector<Tensor> weights,
                          MaybeTensor batch_sizes, MaybeTensor seed, int64_t hidden_size,
                          int64_t num_layers, bool has_bias, int64_t proj_size, bool bidirectional,
                          double dropout, double recurrent_dropout, double zoneout_h,
                          double zoneout_c, double cell_clip, bool layer_norm, bool allow_tf32,
                          int64_t algorithm, bool save) {
  const Options options = options_of(hidden_size, num_layers, has_bias, proj_size, bidirectional,
                                     dropout, recurrent_dropout, zoneout_h, zoneout_c, cell_clip,
                                     layer_norm, allow_tf32, algorithm);
  const Inputs in(input, h0, c0, weights, batch_sizes, seed, options);
  if (in.problem.input_kind != InputKind::dense) check_indices(in.problem);
  return ops::forward(in, options, save,
                      [&](const Forward& f) { kernels(in.problem).forward(f, runtime()); });
}

BackwardResult backward_cpu(MaybeTensor grad_output, MaybeTensor grad_h_n, MaybeTensor grad_c_n,
                            MaybeTensor grad_cells, Tensor input, MaybeTensor h0, MaybeTensor c0,
                            std::vector<Tensor> weights, MaybeTensor batch_sizes, MaybeTensor seed,
                            Tensor output, Tensor hidden, Tensor gates, Tensor cells,
                            int64_t hidden_size, int64_t num_layers, bool has_bias,
                            int64_t proj_size, bool bidirectional, double dropout,
                            double recurrent_dropout, double zoneout_h, double zoneout_c,
                            double cell_clip, bool layer_norm, bool allow_tf32, int64_t algorithm,
                            std::vector<bool> needs) {
  const Options options = options_of(hidden_size, num_layers, has_bias, proj_size, bidirectional,
                                     dropout, recurrent_dropout, zoneout_h, zoneout_c, cell_clip,
                                     layer_norm, allow_tf32, algorithm);
  const Inputs in(input, h0, c0, weights, batch_sizes, seed, options);
  if (in.problem.input_kind != InputKind::dense) check_indices(in.problem);
  const Reserve given{grad_output, grad_h_n, grad_c_n, grad_cells, output, hidden, gates, cells};
  return ops::backward(in, options, given, needs,
                       [&](const Backward& f) { kernels(in.problem).backward(f, runtime()); });
}

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
  m.impl("forward", TORCH_BOX(&fastlstm::forward_cpu));
  m.impl("backward", TORCH_BOX(&fastlstm::backward_cpu));
  m.impl("_activations", TORCH_BOX(&fastlstm::activations));
}

// The operators' schemas and their CPU side.
#include <algorithm>
#include <exception>

#include "cpu/kernels.h"
#include "ops_inference.h"

namespace fastlstm {

void throw_out_of_memory(int64_t bytes) { ops::throw_not_allocated(bytes, -1, nullptr); }

namespace {

using namespace ops;

struct Cpu {
  explicit Cpu(const Tensor&) {}

  void check(const Inputs& in) const { check_indices(in.problem); }
  void check(const Reserve&) const {}
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

// Inference of padded input on the CPU by a stack without options that nn.LSTM lacks. The order of
// `sizes` is that of fastlstm/ops/plain.py. Gives nothing for what it does not compute, be it
// another device's or a mistake: the caller then takes the way of all calls, which says what it is.
MaybeInference infer(Tensor input, MaybeTensor h0, MaybeTensor c0, std::vector<Tensor> weights,
                     std::vector<int64_t> sizes) {
  const MaybeInference nothing;
  auto on_cpu = [](const Tensor& x) { return x.is_cpu(); };
  try {
    if (!on_cpu(input) || (h0 && !on_cpu(*h0)) || (c0 && !on_cpu(*c0)) || weights.empty() ||
        !std::all_of(weights.begin(), weights.end(), on_cpu))
      return nothing;
    Options options{};
    options.hidden_size = sizes.at(1);
    options.num_layers = sizes.at(2);
    options.has_bias = sizes.at(3) != 0;
    options.proj_size = sizes.at(4);
    options.bidirectional = sizes.at(5) != 0;
    const Inputs in(input, h0, c0, weights, {}, {}, options, layout_of(input, sizes.at(6) != 0));
    if (in.problem.input_size != sizes[0]) return nothing;
    check_indices(in.problem);
    return compute(in, options, instruction_set().kernels[int(in.problem.dtype)]->forward);
  } catch (const std::exception&) {
    return nothing;
  }
}

// sigmoid and tanh as the kernels compute them, for the tests of their error bounds.
std::tuple<Tensor, Tensor> activations(Tensor x) {
  const Tensor from = as_contiguous(x);
  Tensor sigmoid = empty(sizes_of(from), from), tanh = empty(sizes_of(from), from);
  instruction_set().kernels[int(dtype_of(from.scalar_type()))]->activations(
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
  m.def(
      "_infer(Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, int[] sizes) -> "
      "(Tensor? output, Tensor? h_n, Tensor? c_n)");
  m.def("_activations(Tensor x) -> (Tensor sigmoid, Tensor tanh)");
}

STABLE_TORCH_LIBRARY_IMPL(fastlstm, CPU, m) {
  m.impl("forward", TORCH_BOX(&fastlstm::ops::forward_on<fastlstm::Cpu>));
  m.impl("backward", TORCH_BOX(&fastlstm::ops::backward_on<fastlstm::Cpu>));
  m.impl("_activations", TORCH_BOX(&fastlstm::activations));
}

// For every device: of those it does not know it gives nothing.
STABLE_TORCH_LIBRARY_IMPL(fastlstm, CompositeExplicitAutograd, m) {
  m.impl("_infer", TORCH_BOX(&fastlstm::infer));
}

// What the operators on the CPU that compute no gradient share.
#pragma once

#include <optional>
#include <tuple>

#include "cpu/kernels.h"
#include "ops_common.h"
#include "ops_threads.h"

namespace fastlstm {
namespace ops {

typedef std::tuple<Tensor, Tensor, Tensor> Inference;                      // output, h_n, c_n
typedef std::tuple<MaybeTensor, MaybeTensor, MaybeTensor> MaybeInference;  // all or none

// Compiled code comes here without the checks in Python.
inline void check_indices(const Problem& p) {
  if (p.input_kind == InputKind::dense) return;
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

// Allocates the results alone and computes them.
inline Inference compute(const Inputs& in, const Options& options, ForwardKernel forward,
                         const void* packed = nullptr) {
  const Problem& p = in.problem;
  const int64_t layers = options.pseudo_layers(), width = p.directions * p.out_size;
  auto make = [&](const std::vector<int64_t>& sizes) { return empty(sizes, in.input, in.type); };
  auto make_state = [&](int64_t units) {
    return in.batched() ? make({layers, p.batch, units}) : make({layers, units});
  };
  // Batch first is a view of time first, as in nn.LSTM.
  Tensor output = in.batch_sizes  ? make({p.rows, width})
                  : !in.batched() ? make({p.steps, width})
                  : in.layout == Layout::time_first
                      ? make({p.steps, p.batch, width})
                      : empty_strided({p.batch, p.steps, width}, {width, p.batch * width, 1},
                                      in.input, in.type);
  Tensor h_n = make_state(p.out_size), c_n = make_state(p.hidden_size);
  if (p.rows > 0) {
    const Buffer<char> hidden((p.layers - 1) * p.rows * width * element_size(in.type));
    const Saved saved{mutable_data(output), hidden.get(), nullptr, nullptr};
    forward(Forward{p, saved, mutable_data(h_n), mutable_data(c_n), packed}, runtime());
  }
  return {output, h_n, c_n};
}

inline bool is_index(const Tensor& input) {
  return input.scalar_type() == ScalarType::Long || input.scalar_type() == ScalarType::Int;
}

// Of padded input, as the user gave it.
inline Layout layout_of(const Tensor& input, bool batch_first) {
  if (input.dim() == (is_index(input) ? 1 : 2)) return Layout::unbatched;
  return batch_first ? Layout::batch_first : Layout::time_first;
}

}  // namespace ops
}  // namespace fastlstm

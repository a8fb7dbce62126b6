// What the operators do on every device: checks, allocation, and the plain structs for a backend.
// Shapes and types were checked in Python (fastlstm/functional.py); what is checked again here
// only keeps a direct call of the operator from reading foreign memory.
#pragma once

#include <initializer_list>
#include <string>
#include <tuple>
#include <vector>

#include "lstm.h"
#include "stable.h"

namespace fastlstm {
namespace ops {

inline const void* data(const MaybeTensor& x) { return x ? x->const_data_ptr() : nullptr; }
inline void* mutable_data(const Tensor& x) { return x.numel() ? x.mutable_data_ptr() : nullptr; }

inline DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default:
      STD_TORCH_CHECK(false, "fastlstm: weights must be float32, float64, bfloat16 or float16");
  }
  __builtin_unreachable();
}

inline ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

struct Options {
  int64_t hidden_size, num_layers;
  bool has_bias;
  int64_t proj_size;
  bool bidirectional;
  double dropout;
  CellOptions cell;
  bool layer_norm;
  bool allow_tf32;    // float32 on a GPU's tensor cores
  int64_t algorithm;  // cuda::Algorithm; the CPU has one alone

  int64_t pseudo_layers() const { return num_layers * (bidirectional ? 2 : 1); }
  int64_t weights_per_layer() const {
    return 2 + (has_bias ? 2 : 0) + (proj_size > 0 ? 1 : 0) + (layer_norm ? 4 : 0);
  }
};

// The operators' plain arguments, in the order of their schemas.
inline Options options_of(int64_t hidden_size, int64_t num_layers, bool has_bias, int64_t proj_size,
                          bool bidirectional, double dropout, double recurrent_dropout,
                          double zoneout_h, double zoneout_c, double cell_clip, bool layer_norm,
                          bool allow_tf32, int64_t algorithm) {
  const CellOptions cell{recurrent_dropout, zoneout_h, zoneout_c, cell_clip};
  return {hidden_size, num_layers, has_bias,   proj_size,  bidirectional,
          dropout,     cell,       layer_norm, allow_tf32, algorithm};
}

inline std::string text_of(const std::vector<int64_t>& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "(" : ", ") + std::to_string(size);
  return text.empty() ? "()" : text + ")";
}

// The dimensions before a dense input's features: (T, B), (B, T) or (T). States lack B with it.
enum class Layout { time_first, batch_first, unbatched };

// The problem, and the contiguous tensors that its pointers point into.
struct Inputs {
  // Without weights, of which only the dtype and the width of the input are known.
  Inputs(const Tensor& input_, const MaybeTensor& h0_, const MaybeTensor& c0_,
         const MaybeTensor& batch_sizes_, const MaybeTensor& seed_, const Options& options,
         Layout layout_, ScalarType type_, int64_t input_size)
      : input(input_),
        h0(maybe_contiguous(h0_)),
        c0(maybe_contiguous(c0_)),
        batch_sizes(maybe_contiguous(batch_sizes_)),
        seed(seed_),
        layout(layout_),
        type(type_) {
    Problem& p = problem;
    p.dtype = dtype_of(type);
    const ScalarType kind = input.scalar_type();
    p.input_kind = kind == ScalarType::Long  ? InputKind::index64
                   : kind == ScalarType::Int ? InputKind::index32
                                             : InputKind::dense;
    const bool dense = p.input_kind == InputKind::dense;
    if (dense && input.numel() > 0 && input.stride(input.dim() - 1) != 1)
      input = as_contiguous(input);
    const bool packed = batch_sizes.has_value(), rows_only = packed || !batched();
    STD_TORCH_CHECK(!packed || (batch_sizes->is_cpu() && batch_sizes->dim() == 1 &&
                                batch_sizes->scalar_type() == ScalarType::Long),
                    "fastlstm: batch_sizes must be int64 (T) on the CPU");
    STD_TORCH_CHECK(!seed || (seed->numel() == 1 && seed->scalar_type() == ScalarType::Long),
                    "fastlstm: seed must be one int64 element");
    STD_TORCH_CHECK(input.dim() == (dense ? 1 : 0) + (rows_only ? 1 : 2),
                    "fastlstm: input has the wrong number of dimensions");
    p.input_size = input_size;
    STD_TORCH_CHECK(!dense || input.size(input.dim() - 1) == p.input_size,
                    "fastlstm: input's last dimension is not weight_ih's");
    p.batch_sizes = packed ? static_cast<const int64_t*>(batch_sizes->const_data_ptr()) : nullptr;
    const int time = layout == Layout::batch_first ? 1 : 0, batch = 1 - time;
    p.steps = packed ? batch_sizes->numel() : input.size(time);
    p.batch = packed ? (p.steps ? p.batch_sizes[0] : 0) : batched() ? input.size(batch) : 1;
    p.rows = packed ? input.size(0) : p.steps * p.batch;
    p.stride_t = packed ? 0 : input.stride(time);
    p.stride_b = packed ? input.stride(0) : batched() ? input.stride(batch) : 0;
    p.input = input.const_data_ptr();
    if (p.batch_sizes) check_batch_sizes();
    p.hidden_size = options.hidden_size;
    p.out_size = options.proj_size > 0 ? options.proj_size : options.hidden_size;
    p.projected = options.proj_size > 0;
    p.layers = int(options.num_layers);
    p.directions = options.bidirectional ? 2 : 1;
    check_sizes(options);
    p.h0 = data(h0);
    p.c0 = data(c0);
    p.dropout = options.num_layers > 1 ? options.dropout : 0;
    p.seed = seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr;
    p.cell = options.cell;
    p.layer_norm = options.layer_norm;
    STD_TORCH_CHECK(p.seed || (p.dropout <= 0 && p.cell.recurrent_dropout <= 0),
                    "fastlstm: dropout needs a seed");
    STD_TORCH_CHECK(
        !p.projected || (p.cell.zoneout_h <= 0 && p.cell.zoneout_c <= 0 && !p.layer_norm),
        "fastlstm: there is no zoneout and no layer norm with a projection");
  }

  Inputs(const Tensor& input_, const MaybeTensor& h0_, const MaybeTensor& c0_,
         const std::vector<Tensor>& weights_, const MaybeTensor& batch_sizes_,
         const MaybeTensor& seed_, const Options& options, Layout layout_ = Layout::time_first)
      : Inputs(input_, h0_, c0_, batch_sizes_, seed_, options, layout_,
               weights_.at(0).scalar_type(), weights_.at(0).size(1)) {
    STD_TORCH_CHECK(
        int64_t(weights_.size()) == options.pseudo_layers() * options.weights_per_layer(),
        "fastlstm: expected ", options.pseudo_layers() * options.weights_per_layer(),
        " weights, got ", weights_.size());
    weights.reserve(weights_.size());
    for (const Tensor& w : weights_) weights.push_back(as_contiguous(w));
    check_weights(options);
    layer_weights.reserve(size_t(options.pseudo_layers()));
    for (int64_t layer = 0; layer < options.pseudo_layers(); ++layer) {
      const Tensor* w = &weights[layer * options.weights_per_layer()];
      LayerWeights c{};
      c.w_ih = w[0].const_data_ptr();
      c.w_hh = w[1].const_data_ptr();
      if (options.has_bias) {
        c.b_ih = w[2].const_data_ptr();
        c.b_hh = w[3].const_data_ptr();
      }
      if (problem.projected) c.w_hr = w[options.weights_per_layer() - 1].const_data_ptr();
      if (problem.layer_norm) {
        const Tensor* norm = w + options.weights_per_layer() - 4;
        c.norm_ih = norm[0].const_data_ptr();
        c.norm_hh = norm[1].const_data_ptr();
        c.norm_c = norm[2].const_data_ptr();
        c.norm_c_bias = norm[3].const_data_ptr();
      }
      layer_weights.push_back(c);
    }
    problem.weights = layer_weights.data();
  }

  bool batched() const { return layout != Layout::unbatched; }

  void check_tensor(const char* name, const Tensor& x, int64_t elements) const {
    STD_TORCH_CHECK(x.scalar_type() == type && x.numel() == elements, "fastlstm: ", name,
                    " must have the weights' dtype and ", elements, " elements, got ", x.numel());
  }

  void check_shape(const char* name, const Tensor& x, std::initializer_list<int64_t> sizes) const {
    int64_t d = 0;
    bool fits = x.scalar_type() == type && x.dim() == int64_t(sizes.size());
    for (const int64_t size : sizes) fits = fits && x.size(d++) == size;
    STD_TORCH_CHECK(fits, "fastlstm: ", name, " must have the weights' dtype and shape ",
                    text_of(sizes), ", got ", text_of(sizes_of(x)));
  }

  void check_state(const char* name, const MaybeTensor& x, int64_t layers, int64_t width) const {
    if (x && batched())
      check_shape(name, *x, {layers, problem.batch, width});
    else if (x)
      check_shape(name, *x, {layers, width});
  }

  void check_sizes(const Options& options) const {
    const Problem& p = problem;
    const int64_t layers = options.pseudo_layers();
    STD_TORCH_CHECK(p.hidden_size > 0 && p.layers > 0, "fastlstm: there must be units and layers");
    STD_TORCH_CHECK(p.batch_sizes || p.steps > 0, "fastlstm: a sequence has at least one step");
    if (p.input_kind == InputKind::dense) check_tensor("input", input, p.rows * p.input_size);
    check_state("h0", h0, layers, p.out_size);
    check_state("c0", c0, layers, p.hidden_size);
  }

  void check_weights(const Options& options) const {
    const Problem& p = problem;
    const int64_t gates = 4 * p.hidden_size, layers = options.pseudo_layers();
    for (int64_t layer = 0; layer < layers; ++layer) {
      const Tensor* w = &weights[layer * options.weights_per_layer()];
      const int64_t width = layer < p.directions ? p.input_size : p.directions * p.out_size;
      check_shape("weight_ih", w[0], {gates, width});
      check_shape("weight_hh", w[1], {gates, p.out_size});
      for (int j = 2; options.has_bias && j < 4; ++j) check_shape("bias", w[j], {gates});
      if (p.projected)
        check_shape("weight_hr", w[options.weights_per_layer() - 1], {p.out_size, p.hidden_size});
      for (int j = 0; options.layer_norm && j < 4; ++j)
        check_shape("norm", w[options.weights_per_layer() - 4 + j],
                    {j < 2 ? gates : p.hidden_size});
    }
  }

  void check_batch_sizes() const {
    const Problem& p = problem;
    int64_t rows = 0;
    for (int64_t t = 0; t < p.steps; ++t) {
      rows += p.batch_sizes[t];
      STD_TORCH_CHECK(p.batch_sizes[t] > 0 && (t == 0 || p.batch_sizes[t] <= p.batch_sizes[t - 1]),
                      "fastlstm: batch_sizes must be positive and must not increase");
    }
    STD_TORCH_CHECK(rows == p.rows, "fastlstm: batch_sizes add up to ", rows, ", input has ",
                    p.rows, " rows");
  }

  Tensor input;
  MaybeTensor h0, c0, batch_sizes, seed;
  Layout layout;
  ScalarType type;  // the weights'
  std::vector<Tensor> weights;
  std::vector<LayerWeights> layer_weights;
  Problem problem{};
};

typedef std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ForwardResult;
typedef std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> BackwardResult;

// Allocates the results and hands them to run(Forward), unless there is nothing to compute.
template <class Run>
ForwardResult forward(const Inputs& in, const Options& options, bool save, Run&& run) {
  const Problem& p = in.problem;
  const Tensor& like = in.weights[0];
  const int64_t output_width = p.directions * p.out_size, layers = options.pseudo_layers();
  Tensor output = p.batch_sizes ? empty({p.rows, output_width}, like)
                                : empty({p.steps, p.batch, output_width}, like);
  Tensor h_n = empty({layers, p.batch, p.out_size}, like);
  Tensor c_n = empty({layers, p.batch, p.hidden_size}, like);
  const int64_t saved_layers = save ? layers : 0;
  Tensor hidden = empty_reused({p.layers - 1, p.rows, output_width}, like);
  Tensor gates =
      empty_reused({saved_layers, p.rows, saved_per_unit(p.layer_norm) * p.hidden_size}, like);
  Tensor states =
      empty_reused({saved_layers, p.rows, p.hidden_size}, like, accumulation_type(like));
  if (p.rows > 0) {
    const Saved saved{mutable_data(output), mutable_data(hidden), mutable_data(gates),
                      mutable_data(states)};
    run(Forward{p, saved, mutable_data(h_n), mutable_data(c_n), nullptr});
  }
  if (!save && p.layers > 1) hidden = empty({0, p.rows, output_width}, like);
  return {output, h_n, c_n, hidden, gates, states};
}

// What backward is given besides the problem.
struct Reserve {
  MaybeTensor grad_output, grad_h_n, grad_c_n, grad_cells;
  Tensor output, hidden, gates, cell_states;
};

template <class Run>
BackwardResult backward(const Inputs& in, const Options& options, const Reserve& reserve,
                        const std::vector<bool>& needs, Run&& run) {
  const Problem& p = in.problem;
  const Tensor& like = in.weights[0];
  STD_TORCH_CHECK(needs.size() == 3 + in.weights.size(), "fastlstm: needs has the wrong length");
  STD_TORCH_CHECK(reserve.gates.size(0) == options.pseudo_layers(),
                  "fastlstm: forward was not asked to save");
  const int64_t layer_rows = options.pseudo_layers() * p.rows,
                output_width = p.directions * p.out_size;
  in.check_tensor("output", reserve.output, p.rows * output_width);
  in.check_tensor("hidden", reserve.hidden, (p.layers - 1) * p.rows * output_width);
  in.check_tensor("gates", reserve.gates,
                  layer_rows * saved_per_unit(p.layer_norm) * p.hidden_size);
  STD_TORCH_CHECK(reserve.cell_states.scalar_type() == accumulation_type(like) &&
                      reserve.cell_states.numel() == layer_rows * p.hidden_size,
                  "fastlstm: cells are not those of this problem's forward");
  auto check_gradient = [&](const char* name, const MaybeTensor& x, int64_t elements) {
    if (x) in.check_tensor(name, *x, elements);
  };
  check_gradient("grad_output", reserve.grad_output, p.rows * output_width);
  check_gradient("grad_h_n", reserve.grad_h_n, options.pseudo_layers() * p.batch * p.out_size);
  check_gradient("grad_c_n", reserve.grad_c_n, options.pseudo_layers() * p.batch * p.hidden_size);
  STD_TORCH_CHECK(!reserve.grad_cells ||
                      (reserve.grad_cells->numel() == reserve.cell_states.numel() &&
                       reserve.grad_cells->scalar_type() == reserve.cell_states.scalar_type()),
                  "fastlstm: grad_cells must be like cells");
  const MaybeTensor dy = maybe_contiguous(reserve.grad_output),
                    dh = maybe_contiguous(reserve.grad_h_n),
                    dc = maybe_contiguous(reserve.grad_c_n),
                    dcells = maybe_contiguous(reserve.grad_cells);
  const Tensor y = as_contiguous(reserve.output), inner = as_contiguous(reserve.hidden),
               act = as_contiguous(reserve.gates), states = as_contiguous(reserve.cell_states);

  const bool dense = p.input_kind == InputKind::dense;
  auto gradient = [&](bool needed, const std::vector<int64_t>& sizes) {
    return needed ? empty_reused(sizes, like) : empty({0}, like);
  };
  Tensor grad_input = gradient(
      needs[0] && dense, p.batch_sizes ? std::vector<int64_t>{p.rows, p.input_size}
                                       : std::vector<int64_t>{p.steps, p.batch, p.input_size});
  Tensor grad_h0 = gradient(needs[1], {options.pseudo_layers(), p.batch, p.out_size});
  Tensor grad_c0 = gradient(needs[2], {options.pseudo_layers(), p.batch, p.hidden_size});
  std::vector<Tensor> grads;
  for (size_t j = 0; j < in.weights.size(); ++j) {
    grads.push_back(gradient(needs[3 + j], sizes_of(in.weights[j])));
    if (p.rows == 0) torch::stable::zero_(grads.back());
  }
  if (p.rows > 0) {
    std::vector<LayerGrads> pointers;
    for (int64_t layer = 0; layer < options.pseudo_layers(); ++layer) {
      const Tensor* g = &grads[layer * options.weights_per_layer()];
      LayerGrads c{};
      c.w_ih = mutable_data(g[0]);
      c.w_hh = mutable_data(g[1]);
      if (options.has_bias) {
        c.b_ih = mutable_data(g[2]);
        c.b_hh = mutable_data(g[3]);
      }
      if (p.projected) c.w_hr = mutable_data(g[options.weights_per_layer() - 1]);
      if (p.layer_norm) {
        const Tensor* norm = g + options.weights_per_layer() - 4;
        c.norm_ih = mutable_data(norm[0]);
        c.norm_hh = mutable_data(norm[1]);
        c.norm_c = mutable_data(norm[2]);
        c.norm_c_bias = mutable_data(norm[3]);
      }
      pointers.push_back(c);
    }
    const Saved saved{
        const_cast<void*>(y.const_data_ptr()), const_cast<void*>(inner.const_data_ptr()),
        const_cast<void*>(act.const_data_ptr()), const_cast<void*>(states.const_data_ptr())};
    run(Backward{p, saved, data(dy), data(dh), data(dc), data(dcells), mutable_data(grad_input),
                 mutable_data(grad_h0), mutable_data(grad_c0), pointers.data()});
  }
  return {grad_input, grad_h0, grad_c0, grads};
}

// The operators on a kind of device, which has
//   a constructor from a tensor of the weights, whose device is then current,
//   check(in), check(reserve): throw where they are not what this kind of device reads,
//   run(call, options): computes a Forward or a Backward.
template <class Device>
ForwardResult forward_on(Tensor input, MaybeTensor h0, MaybeTensor c0, std::vector<Tensor> weights,
                         MaybeTensor batch_sizes, MaybeTensor seed, int64_t hidden_size,
                         int64_t num_layers, bool has_bias, int64_t proj_size, bool bidirectional,
                         double dropout, double recurrent_dropout, double zoneout_h,
                         double zoneout_c, double cell_clip, bool layer_norm, bool allow_tf32,
                         int64_t algorithm, bool save) {
  const Options options = options_of(hidden_size, num_layers, has_bias, proj_size, bidirectional,
                                     dropout, recurrent_dropout, zoneout_h, zoneout_c, cell_clip,
                                     layer_norm, allow_tf32, algorithm);
  STD_TORCH_CHECK(!weights.empty(), "fastlstm: there are no weights");
  const Device device(weights[0]);
  const Inputs in(input, h0, c0, weights, batch_sizes, seed, options);
  device.check(in);
  return forward(in, options, save, [&](const Forward& call) { device.run(call, options); });
}

template <class Device>
BackwardResult backward_on(MaybeTensor grad_output, MaybeTensor grad_h_n, MaybeTensor grad_c_n,
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
  STD_TORCH_CHECK(!weights.empty(), "fastlstm: there are no weights");
  const Device device(weights[0]);
  const Inputs in(input, h0, c0, weights, batch_sizes, seed, options);
  const Reserve reserve{grad_output, grad_h_n, grad_c_n, grad_cells, output, hidden, gates, cells};
  device.check(in);
  device.check(reserve);
  return backward(in, options, reserve, needs,
                  [&](const Backward& call) { device.run(call, options); });
}

}  // namespace ops
}  // namespace fastlstm

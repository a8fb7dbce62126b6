// The operators' CUDA side: a plan, a workspace, and torch's matrix products for the large GEMMs.
// No CUDA header here: the kernels are behind cuda/launch.h.
#include <array>
#include <limits>
#include <optional>

#include "cuda/launch.h"
#include "ops_common.h"

namespace fastlstm {
namespace {

using namespace ops;

ScalarType scalar_type(DType type) {
  switch (type) {
    case DType::f32: return ScalarType::Float;
    case DType::f64: return ScalarType::Double;
    case DType::bf16: return ScalarType::BFloat16;
    case DType::f16: return ScalarType::Half;
  }
  __builtin_unreachable();
}

// Makes a stream torch's current one.
class StreamGuard {
 public:
  StreamGuard(void* stream, int32_t index) {
    check_call(aoti_torch_create_cuda_stream_guard(stream, index, &guard_), "setting a stream");
  }
  StreamGuard(const StreamGuard&) = delete;
  StreamGuard& operator=(const StreamGuard&) = delete;
  ~StreamGuard() { aoti_torch_delete_cuda_stream_guard(guard_); }

 private:
  CUDAStreamGuardHandle guard_ = nullptr;
};

// What gemm() knows of its call.
struct GemmContext {
  torch::stable::Device device;
  void* stream;  // torch's current one
};

// cuda::Context::gemm. The view of a row-major or transposed operand is what torch hands to cuBLAS
// as it stands.
void gemm(void* context, const cuda::Gemm& g) {
  const GemmContext& call = *static_cast<const GemmContext*>(context);
  const torch::stable::Device device = call.device;
  std::optional<StreamGuard> guard;
  if (g.stream != call.stream) guard.emplace(g.stream, device.index());
  auto view = [&](const void* from, int64_t rows, int64_t columns, int64_t row, int64_t column,
                  DType type) {
    const int64_t sizes[2] = {rows, columns}, strides[2] = {row, column};
    return torch::stable::from_blob(const_cast<void*>(from), {sizes, 2}, {strides, 2}, device,
                                    scalar_type(type));
  };
  const Tensor a = view(g.a.data, g.m, g.k, g.a.row, g.a.column, g.in);
  const Tensor b = view(g.b.data, g.k, g.n, g.b.row, g.b.column, g.in);
  const Tensor c = view(g.c, g.m, g.n, g.n, 1, g.out);
  using torch::stable::detail::from;
  if (g.in == g.out) {
    std::array<StableIValue, 3> stack{from(a), from(b), from(c)};
    check_call(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION),
               "aten::mm.out");
    torch::stable::detail::to<Tensor>(stack[0]);  // takes the result, to release it
  } else {  // half types, with a float32 result that was never rounded
    std::array<StableIValue, 4> stack{from(a), from(b), from(scalar_type(g.out)), from(c)};
    check_call(torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION),
               "aten::mm.dtype_out");
    torch::stable::detail::to<Tensor>(stack[0]);
  }
}

struct Gpu {
  // weight: on the CUDA device that is to be current.
  explicit Gpu(const Tensor& weight) : like(weight), index(checked_index(weight)), guard(index) {}

  // Everything on one device, and sizes that the kernels' 32-bit tables and grids hold.
  void check(const Inputs& in) const {
    check(in.input, "input");
    for (const Tensor& w : in.weights) check(w, "a weight");
    check(in.h0, "h0");
    check(in.c0, "c0");
    check(in.seed, "seed");
    constexpr int64_t most = std::numeric_limits<int32_t>::max(), most_units = 250'000;
    const Problem& p = in.problem;
    STD_TORCH_CHECK(p.rows < most && p.input_size < most,
                    "fastlstm: more than 2^31 rows or columns");
    STD_TORCH_CHECK(p.hidden_size <= most_units, "fastlstm: more than ", most_units,
                    " units on a CUDA device");
  }
  void check(const Reserve& of) const {
    check(of.grad_output, "grad_output");
    check(of.grad_h_n, "grad_h_n");
    check(of.grad_c_n, "grad_c_n");
    check(of.grad_cells, "grad_cells");
    check(of.output, "output");
    check(of.hidden, "hidden");
    check(of.gates, "gates");
    check(of.cell_states, "cells");
  }
  void run(const Forward& call, const Options& options) const {
    launch(call, cuda::Pass::forward, options, cuda::forward_workspace, cuda::forward);
  }
  void run(const Backward& call, const Options& options) const {
    launch(call, cuda::Pass::backward, options, cuda::backward_workspace, cuda::backward);
  }

 private:
  void check(const Tensor& x, const char* name) const {
    STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == index, "fastlstm: ", name,
                    " is not on the weights' CUDA device");
  }
  void check(const MaybeTensor& x, const char* name) const {
    if (x) check(*x, name);
  }
  static int32_t checked_index(const Tensor& weight) {
    STD_TORCH_CHECK(weight.is_cuda(), "fastlstm: the weights are not on a CUDA device");
    return weight.get_device_index();
  }

  // A pass of the whole stack on torch's current stream.
  template <class Call>
  void launch(const Call& call, cuda::Pass pass, const Options& options,
              int64_t (*workspace_of)(const Call&, const cuda::Plan&),
              void (*enqueue)(const Call&, const cuda::Plan&, const cuda::Context&)) const {
    const cuda::Plan plan = cuda::plan(call.problem, pass, cuda::device_properties(index),
                                       {cuda::Algorithm(options.algorithm), options.allow_tf32});
    const Tensor workspace = empty({workspace_of(call, plan)}, like, ScalarType::Byte);
    GemmContext products{like.device(), nullptr};
    check_call(aoti_torch_get_current_cuda_stream(index, &products.stream), "the current stream");
    enqueue(call, plan, {products.stream, mutable_data(workspace), gemm, &products});
  }

  const Tensor like;
  const int32_t index;
  const torch::stable::accelerator::DeviceGuard guard;
};

}  // namespace
}  // namespace fastlstm

STABLE_TORCH_LIBRARY_IMPL(fastlstm, CUDA, m) {
  m.impl("forward", TORCH_BOX(&fastlstm::ops::forward_on<fastlstm::Gpu>));
  m.impl("backward", TORCH_BOX(&fastlstm::ops::backward_on<fastlstm::Gpu>));
}

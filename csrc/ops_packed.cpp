// The operators of weights that were packed before: on the CPU, for inference.
#include "ops_packed.h"

#include <memory>
#include <mutex>
#include <unordered_map>

#include "ops_inference.h"

namespace fastlstm {
namespace {

using namespace ops;

// A stack whose weights are packed. Its instruction set's kernels read them, whichever is in use.
struct Packed {
  Packed(const std::vector<Tensor>& weights, const Options& options_)
      : options(options_), type(weights.at(0).scalar_type()), input_size(weights[0].size(1)) {
    const Tensor no_rows = empty({1, 0, input_size}, weights[0]);
    const Inputs in(no_rows, {}, {}, weights, {}, {}, options);
    kernels = instruction_set().kernels[int(in.problem.dtype)];
    data = kernels->pack(in.problem, runtime());
  }
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;
  ~Packed() { kernels->free_packed(data); }

  const Options options;
  const ScalarType type;
  const int64_t input_size;
  const Kernels* kernels;
  const void* data;
};

// All that there are, by their handles.
class Registry {
 public:
  int64_t add(std::shared_ptr<const Packed> packed) {
    const std::lock_guard<std::mutex> lock(mutex_);
    packed_[++last_] = std::move(packed);
    return last_;
  }
  std::shared_ptr<const Packed> find(int64_t handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto at = packed_.find(handle);
    STD_TORCH_CHECK(at != packed_.end(), "fastlstm: there are no packed weights of handle ",
                    handle);
    return at->second;
  }
  void remove(int64_t handle) {
    std::shared_ptr<const Packed> last;  // freed without the lock, once no call uses it
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto at = packed_.find(handle);
    if (at == packed_.end()) return;
    last.swap(at->second);
    packed_.erase(at);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const Packed>> packed_;
  int64_t last_ = 0;
};

Registry& registry() {
  static Registry* all = new Registry;  // calls may come while the process ends
  return *all;
}

// The plain arguments as of the forward operator; what only GPUs know is left out.
int64_t pack(std::vector<Tensor> weights, int64_t hidden_size, int64_t num_layers, bool has_bias,
             int64_t proj_size, bool bidirectional, double zoneout_h, double zoneout_c,
             double cell_clip, bool layer_norm) {
  return registry().add(std::make_shared<const Packed>(
      weights, options_of(hidden_size, num_layers, has_bias, proj_size, bidirectional, 0, 0,
                          zoneout_h, zoneout_c, cell_clip, layer_norm, false, 0)));
}

Inference run(const Packed& packed, const Tensor& input, const MaybeTensor& h0,
              const MaybeTensor& c0, const MaybeTensor& batch_sizes, Layout layout) {
  const Inputs in(input, h0, c0, batch_sizes, {}, packed.options, layout, packed.type,
                  packed.input_size);
  check_indices(in.problem);
  return compute(in, packed.options, packed.kernels->forward, packed.data);
}

// Time-major, or packed rows: its arguments were checked.
Inference forward_packed(Tensor input, MaybeTensor h0, MaybeTensor c0, MaybeTensor batch_sizes,
                         int64_t handle, std::vector<int64_t>) {
  return run(*registry().find(handle), input, h0, c0, batch_sizes, Layout::time_first);
}

// As `_infer`.
MaybeInference infer_packed(Tensor input, MaybeTensor h0, MaybeTensor c0, int64_t handle,
                            bool batch_first) {
  try {
    if (!input.is_cpu() || (h0 && !h0->is_cpu()) || (c0 && !c0->is_cpu())) return {};
    const Layout layout = layout_of(input, batch_first);
    if (input.size(layout == Layout::batch_first ? 1 : 0) == 0) return {};
    return run(*registry().find(handle), input, h0, c0, {}, layout);
  } catch (const std::exception&) {
    return {};
  }
}

}  // namespace

void free_packed(int64_t handle) { registry().remove(handle); }

}  // namespace fastlstm

STABLE_TORCH_LIBRARY_FRAGMENT(fastlstm, m) {
  m.def(
      "_pack(Tensor[] weights, int hidden_size, int num_layers, bool has_bias, int proj_size, "
      "bool bidirectional, float zoneout_h, float zoneout_c, float cell_clip, bool layer_norm) -> "
      "int");
  m.def(
      "_forward_packed(Tensor input, Tensor? h0, Tensor? c0, Tensor? batch_sizes, int packed, "
      "int[] sizes) -> (Tensor output, Tensor h_n, Tensor c_n)");
  m.def(
      "_infer_packed(Tensor input, Tensor? h0, Tensor? c0, int packed, bool batch_first) -> "
      "(Tensor? output, Tensor? h_n, Tensor? c_n)");
}

STABLE_TORCH_LIBRARY_IMPL(fastlstm, CPU, m) {
  m.impl("_pack", TORCH_BOX(&fastlstm::pack));
  m.impl("_forward_packed", TORCH_BOX(&fastlstm::forward_packed));
}

STABLE_TORCH_LIBRARY_IMPL(fastlstm, CompositeExplicitAutograd, m) {
  m.impl("_infer_packed", TORCH_BOX(&fastlstm::infer_packed));
}

// The CUDA side of the operator that draws text. No CUDA header here: the kernels are behind
// cuda/generate_launch.h.
#include "cuda/generate_launch.h"
#include "cuda/launch.h"
#include "ops_generate.h"

namespace fastlstm {
namespace {

using namespace ops;

class Gpu {
 public:
  explicit Gpu(const Tensor& table)
      : like_(table), index_(table.get_device_index()), guard_(index_) {}

  bool holds(const Tensor& x) const { return x.is_cuda() && x.get_device_index() == index_; }

  // One column an element, whatever the type.
  Storage storage_of(const Tensor& packed) const {
    switch (packed.scalar_type()) {
      case ScalarType::Float: return Storage::f32;
      case ScalarType::BFloat16: return Storage::bf16;
      case ScalarType::Half: return Storage::f16;
      case ScalarType::Char: return Storage::int8;
      default:
        STD_TORCH_CHECK(false,
                        "fastlstm: packed weights on a GPU are float32, bfloat16, float16 or int8");
    }
    __builtin_unreachable();
  }
  int64_t words_of(Storage, int64_t depth) const { return depth * kGenerateColumns; }

  // Tokens stay on the GPU, where the kernel takes one outside the vocabulary for token 0.
  void check_tokens(const Generate&) const {}

  void run(const Generate& g) const {
    const cuda::GeneratePlan plan =
        cuda::generate_plan(cuda::generate_model(g), cuda::device_properties(index_));
    STD_TORCH_CHECK(plan.reason == nullptr,
                    "fastlstm: one launch cannot draw this text: ", plan.reason);
    const Tensor workspace = empty({cuda::generate_workspace(plan)}, like_, ScalarType::Byte);
    void* stream = nullptr;
    check_call(aoti_torch_get_current_cuda_stream(index_, &stream), "the current stream");
    cuda::generate(g, plan, stream, workspace.mutable_data_ptr());
  }

 private:
  const Tensor like_;
  const int32_t index_;
  const torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace
}  // namespace fastlstm

STABLE_TORCH_LIBRARY_IMPL(fastlstm, CUDA, m) {
  m.impl("generate", TORCH_BOX(&fastlstm::ops::generate_on<fastlstm::Gpu>));
}

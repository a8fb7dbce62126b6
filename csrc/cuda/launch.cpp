#include "launch.h"

namespace fastlstm {
namespace cuda {
namespace {

const Passes& passes(const Problem& p, const Plan& plan) {
  const bool persistent = plan.algorithm == Algorithm::persistent;
  switch (p.dtype) {
    case DType::f32:
      return persistent ? kPersistentTf32 : plan.tensor_cores ? kStepwiseTf32 : kStepwiseF32;
    case DType::f64: return kStepwiseF64;
    case DType::bf16: return persistent ? kPersistentBf16 : kStepwiseBf16;
    case DType::f16: return persistent ? kPersistentF16 : kStepwiseF16;
  }
  return kStepwiseF32;
}

}  // namespace

int64_t forward_workspace(const Forward& f, const Plan& plan) {
  return passes(f.problem, plan).forward(f, plan, nullptr);
}
void forward(const Forward& f, const Plan& plan, const Context& context) {
  passes(f.problem, plan).forward(f, plan, &context);
}
int64_t backward_workspace(const Backward& f, const Plan& plan) {
  return passes(f.problem, plan).backward(f, plan, nullptr);
}
void backward(const Backward& f, const Plan& plan, const Context& context) {
  passes(f.problem, plan).backward(f, plan, &context);
}

}  // namespace cuda
}  // namespace fastlstm

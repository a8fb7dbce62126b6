// What the computing warps of the forward cluster kernel have in common, whether their CTA is alone
// or one of several: the product, the states of their cells, and the rules that apply to them.
#pragma once

#include "forward_fp32.cuh"
#include "forward_movers.cuh"
#include "forward_product.cuh"

namespace fastlstm {
namespace cuda {

#if FASTLSTM_SM90

// By tensor cores or, in full fp32, by multiply-adds.
template <class Shape>
using ForwardProduct =
    std::conditional_t<std::is_same_v<typename Shape::Operand, float>,
                       ClusterForwardFp32Product<Shape>, ClusterForwardProduct<Shape>>;

// A barrier of a CTA's computing warps.
template <class Shape>
__device__ __forceinline__ void compute_barrier() {
  named_barrier(1, 32 * Shape::kWarps);
}

// The rules of this thread's cells in the next turn: drawn when registers are free, and kept in
// shared memory that no other thread accesses.
template <class Shape>
class StoredRules {
  typedef ForwardProduct<Shape> Product;
  static constexpr int kStride = 32 * Shape::kWarps;

 public:
  __device__ __forceinline__ StoredRules(unsigned char* shared, int thread)
      : rules_(reinterpret_cast<float*>(shared + Shape::kRulesAt) + thread) {}

  __device__ __forceinline__ void draw(const DrawnRules<float>& rules, const Product& product,
                                       int t, int begin, int unit) const {
#pragma unroll
    for (int x = 0; x < Shape::kCells; ++x) {
      const CellRules<float> drawn = rules.at(rules.row(t, begin + product.sequence(x)), unit);
      rules_[3 * x * kStride] = drawn.update;
      rules_[(3 * x + 1) * kStride] = drawn.new_c;
      rules_[(3 * x + 2) * kStride] = drawn.new_h;
    }
  }
  __device__ __forceinline__ CellRules<float> of(int x, float clip) const {
    return {rules_[3 * x * kStride], clip, rules_[(3 * x + 1) * kStride],
            rules_[(3 * x + 2) * kStride]};
  }

 private:
  float* rules_;
};

// The states of a thread's cells of group g before the first step.
template <class Shape>
__device__ __forceinline__ void begin_states(const ClusterForwardCta<Shape>& cta,
                                             const ForwardProduct<Shape>& product, int g, int unit,
                                             float (&c)[Shape::kCells],
                                             typename Shape::S (&h)[Shape::kCells]) {
  const int hidden_size = cta.args.hidden_size;
#pragma unroll
  for (int x = 0; x < Shape::kCells; ++x) {
    const int sequence = g * Shape::kSequences + product.sequence(x);
    const bool inside = cta.span(sequence)->leave > 0 && unit < hidden_size;
    const int64_t at = int64_t(cta.begin + sequence) * hidden_size + unit;
    c[x] = !inside              ? 0.0f
           : cta.layer.c_before ? cta.layer.c_before[at]
                                : value_or_zero(cta.layer.c0, at);
    from_acc(inside ? value_or_zero(cta.layer.h0, at) : 0.0f, h[x]);
  }
}

// ... and behind the last one. begin: the cluster's first sequence.
template <class Shape>
__device__ __forceinline__ void end_states(const ClusterForwardCta<Shape>& cta,
                                           const ForwardProduct<Shape>& product, int g,
                                           uint32_t begin, int unit,
                                           const float (&c)[Shape::kCells],
                                           const typename Shape::S (&h)[Shape::kCells]) {
#pragma unroll
  for (int x = 0; x < Shape::kCells; ++x) {
    const int sequence = g * Shape::kSequences + product.sequence(x);
    if (cta.span(sequence)->leave == 0) continue;
    const int64_t at = int64_t(begin + sequence) * cta.args.hidden_size + unit;
    cta.layer.h_n[at] = h[x];
    from_acc(c[x], cta.layer.c_n[at]);
    if (cta.layer.c_after) cta.layer.c_after[at] = c[x];
  }
}

#endif

}  // namespace cuda
}  // namespace fastlstm

// What the operators call: a problem's plan, its workspace, forward and backward on a stream.
#pragma once

#include "lstm.h"
#include "planner.h"

namespace fastlstm {
namespace cuda {

// C (m x n, row-major) = A (m x k) B (k x n). Element (i, j) of an operand is at i * row + j *
// column; one of the strides is 1.
struct Operand {
  const void* data;
  int64_t row, column;
};
struct Gemm {
  void* stream;   // which it is to follow
  DType in, out;  // out: `in`, or f32
  int64_t m, n, k;
  Operand a, b;
  void* c;
};

// What a pass gets from its caller. The caller computes large products: kernels know nothing of
// torch or cuBLAS.
struct Context {
  void* stream;
  void* workspace;  // of the bytes that *_workspace() returns, aligned to 256
  void (*gemm)(void* context, const Gemm& gemm);
  void* gemm_context;
};

int64_t forward_workspace(const Forward& f, const Plan& plan);
void forward(const Forward& f, const Plan& plan, const Context& context);
int64_t backward_workspace(const Backward& f, const Plan& plan);
void backward(const Backward& f, const Plan& plan, const Context& context);

// What the planner needs to know of the current GPU, whose number this is.
Device device_properties(int index);

// The passes of an algorithm for one storage type. They return the bytes of their workspace; with a
// null context they do nothing else.
struct Passes {
  int64_t (*forward)(const Forward& f, const Plan& plan, const Context* context);
  int64_t (*backward)(const Backward& f, const Plan& plan, const Context* context);
};
extern const Passes kStepwiseF32, kStepwiseTf32, kStepwiseF64, kStepwiseBf16, kStepwiseF16;

#define FASTLSTM_DECLARE_PASSES(algorithm, type)                                                  \
  int64_t algorithm##_forward_##type(const Forward& f, const Plan& plan, const Context* context); \
  int64_t algorithm##_backward_##type(const Backward& f, const Plan& plan, const Context* context)
FASTLSTM_DECLARE_PASSES(cluster, bf16);
FASTLSTM_DECLARE_PASSES(cluster, f16);
FASTLSTM_DECLARE_PASSES(cluster, tf32);
FASTLSTM_DECLARE_PASSES(cluster, f32);
FASTLSTM_DECLARE_PASSES(grid, bf16);
FASTLSTM_DECLARE_PASSES(grid, f16);
FASTLSTM_DECLARE_PASSES(grid, tf32);
FASTLSTM_DECLARE_PASSES(grid, f32);
#undef FASTLSTM_DECLARE_PASSES

}  // namespace cuda
}  // namespace fastlstm

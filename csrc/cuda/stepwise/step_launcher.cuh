// Launches a step (step_kernel.cuh): packs its right operands, and multiplies with the tile that
// the plan names or by cuBLAS.
//
// The kernels of a layer's steps begin early, each behind the one before it; only the first one
// waits for the end of all before it, among them the packing of W and the input part. So those are
// complete when any of the others begins, however early. A kernel behind a product by cuBLAS begins
// early too, but reads nothing before its wait.
#pragma once

#include "../shared/exchange.cuh"
#include "../shared/stack.cuh"
#include "step_kernel.cuh"
#include "tiles.h"

namespace fastlstm {
namespace cuda {

template <class S, bool kTensor>
class StepLauncher {
  typedef Acc<S> T;

 public:
  // columns: those of the widest product.
  StepLauncher(Stack<S>& stack, int64_t columns) : stack_(stack) {
    const Plan& plan = stack_.plan;
    if (plan.cell_tile != kLibraryTile && plan.projection_tile != kLibraryTile) return;
    for (int d = 0; d < stack_.problem.directions; ++d)
      product_[d] = stack_.arena.template take<T>(stack_.problem.batch * operand_rows(columns));
  }

  // n elements of K, padded to whole stages.
  static int64_t padded(int64_t n) { return round_up(n, kPadBytes / int64_t(sizeof(S))); }
  // Columns of the gates of so many units, in blocks of eight units.
  static int64_t gate_columns(int64_t units) { return round_up(units, 8) * 4; }

  // Takes memory for the right operands of a step's products, (columns, depth) for each direction.
  void take_operands(S* (&to)[2], int64_t columns, int64_t depth, bool gates) {
    for (int d = 0; d < stack_.problem.directions; ++d)
      to[d] = stack_.arena.template take<S>(operand_columns(columns, gates) * padded(depth));
  }
  // Packs them from `matrix` of a layer's weights, whose element (column, k) is at
  // column * row_stride + k * k_stride. What is launched next begins late.
  void pack_operands(S* const (&to)[2], int layer, const void* LayerWeights::* matrix,
                     int64_t columns, int64_t depth, int64_t row_stride, int64_t k_stride,
                     bool gates) const {
    PackArgs<S, S> args;
    args.row_stride = row_stride;
    args.k_stride = k_stride;
    args.rows = columns;
    args.to_rows = operand_columns(columns, gates);
    args.to_stride = padded(depth);
    args.depth = int(depth);
    if (gates) args.row_order = GateOrder{int(columns / 4), 8};
    const Problem& p = stack_.problem;
    for (int d = 0; d < p.directions; ++d) {
      args.from[d] = static_cast<const S*>(p.weights[layer * p.directions + d].*matrix);
      args.to[d] = to[d];
    }
    stack_.pack(args);
    begin_late();
  }
  // What is launched next begins late.
  void begin_late() const { begin_ = Begin::late; }

  // `count` rows of A times B transposed, each `depth` long and padded.
  static Operands<S> operands(const S* a, int64_t a_stride, int count, const S* b, int64_t depth) {
    Operands<S> x{};
    x.a = a;
    x.b = b;
    x.a_stride = a_stride;
    x.b_stride = depth;
    x.rows = count;
    x.depth_bytes = int(depth * int64_t(sizeof(S)));
    return x;
  }

  // Launches a step of all directions, with the tile that the plan names.
  template <class Step>
  void step(int tile, int64_t columns, const StepArgs<Step>& args) const {
    switch (tile) {
      case 0: return step_tile<0>(columns, args);
      case 1: return step_tile<1>(columns, args);
      case 2: return step_tile<2>(columns, args);
      default: return step_by_library(columns, args);
    }
  }

  // Launches one of the steps' kernels.
  template <class Kernel, class Args>
  void run_kernel(Kernel kernel, dim3 grid, unsigned threads, size_t shared,
                  const Args& args) const {
    stack_.run_kernel(kernel, grid, threads, shared, args, begin_);
    begin_ = Begin::early;
  }
  // The same for a kernel whose CTAs form clusters along x.
  template <class Kernel, class Args>
  void run_clusters(Kernel kernel, dim3 grid, unsigned cluster, unsigned threads, size_t shared,
                    const Args& args) const {
    launch_clusters(kernel, grid, cluster, threads, shared, stack_.stream(), args, begin_);
    begin_ = Begin::early;
  }

 private:
  static int64_t operand_rows(int64_t columns) { return round_up(columns, kPadColumns); }
  static int64_t operand_columns(int64_t columns, bool gates) {
    return operand_rows(gates ? gate_columns(columns / 4) : columns);
  }

  template <int kIndex, class Step>
  void step_tile(int64_t columns, const StepArgs<Step>& args) const {
    constexpr TileShape shape = tile_shape(kIndex, kTensor);
    typedef Tile<S, kTensor, shape.row_frags, shape.row_warps, shape.column_warps, shape.split,
                 shape.slabs, shape.stages>
        Shape;
    static_assert(Shape::kSharedBytes == shape.shared() && Shape::kRows == shape.rows() &&
                      Shape::kColumns == shape.columns(),
                  "the planner knows the kernel's tile");
    const int most = args.active[0] > args.active[1] ? args.active[0] : args.active[1];
    const dim3 grid(blocks_of(columns, Shape::kColumns), blocks_of(most, Shape::kRows),
                    unsigned(stack_.problem.directions));
    run_kernel(step_kernel<Shape, Step>, grid, Shape::kThreads, Shape::kSharedBytes, args);
  }

  // The same operands, padding included, as one large product for each direction.
  template <class Step>
  void step_by_library(int64_t columns, const StepArgs<Step>& args) const {
    FinishArgs<Step> finish{};
    finish.stride = operand_rows(columns);
    int most = 0;
    for (int d = 0; d < stack_.problem.directions; ++d) {
      const Operands<S>& x = args.operands[d];
      finish.step[d] = args.step[d];
      finish.active[d] = args.active[d];
      finish.product[d] = product_[d];
      finish.rows[d] = x.rows;
      if (args.active[d] > most) most = args.active[d];
      if (x.rows > 0)
        stack_.multiply(x.rows, finish.stride, x.depth_bytes / int64_t(sizeof(S)),
                        row_major(x.a, x.a_stride), transposed(x.b, x.b_stride), product_[d]);
    }
    if (finish.step[0].together())
      finish_product<Step::kNeighbours>(most, columns / Step::kGates, finish);
    else
      finish_product<1>(most, columns / Step::kGates, finish);
  }
  template <int kCount, class Step>
  void finish_product(int sequences, int64_t columns, const FinishArgs<Step>& args) const {
    const dim3 grid(unsigned(sequences), blocks_of(columns, kFinishThreads * kCount),
                    unsigned(stack_.problem.directions));
    run_kernel(finish_kernel<kCount, Step>, grid, kFinishThreads, 0, args);
  }

  Stack<S>& stack_;
  T* product_[2];  // of a step, by direction; only where the plan has kLibraryTile
  mutable Begin begin_ = Begin::late;  // of the next kernel
};

}  // namespace cuda
}  // namespace fastlstm

// A step of stepwise.cuh on the host: its operands, and its product with the plan's tile or by the
// library.
#pragma once

#include "stack.cuh"
#include "stepwise.cuh"
#include "tiles.h"

namespace fastlstm {
namespace cuda {

template <class S, bool kTensor>
class StepLauncher {
  typedef Acc<S> T;

 public:
  // columns: of the widest product.
  StepLauncher(Stack<S>& stack, int64_t columns) : stack_(stack) {
    const Plan& plan = stack_.plan;
    if (plan.gates != kLibraryTile && plan.project != kLibraryTile && plan.hidden != kLibraryTile &&
        plan.cell != kLibraryTile)
      return;
    for (int d = 0; d < stack_.problem.directions; ++d)
      product_[d] = stack_.arena.template take<T>(stack_.problem.batch * operand_rows(columns));
  }

  // Numbers of an operand's row of n: whole stages of K.
  static int64_t padded(int64_t n) { return round_up(n, kPadBytes / int64_t(sizeof(S))); }
  // Gates stand in blocks of eight units.
  static int64_t gate_columns(int64_t units) { return round_up(units, 8) * 4; }

  // The right operands of a step's products, (columns, depth), one for each direction.
  void take_operands(S* (&to)[2], int64_t columns, int64_t depth, bool gates) {
    for (int d = 0; d < stack_.problem.directions; ++d)
      to[d] = stack_.arena.template take<S>(operand_columns(columns, gates) * padded(depth));
  }
  // ... from `matrix` of a layer's weights, at the given strides.
  void pack_operands(S* const (&to)[2], int layer, const void* CellWeights::* matrix,
                     int64_t columns, int64_t depth, int64_t row_stride, int64_t k_stride,
                     bool gates) const {
    PackArgs<S, S> args{{},
                        {},
                        nullptr,
                        row_stride,
                        k_stride,
                        columns,
                        operand_columns(columns, gates),
                        padded(depth),
                        int(depth),
                        gates ? GateOrder{int(columns / 4), 8} : kAsStored,
                        kAsStored};
    const Problem& p = stack_.problem;
    for (int d = 0; d < p.directions; ++d) {
      args.from[d] = static_cast<const S*>(p.weights[layer * p.directions + d].*matrix);
      args.to[d] = to[d];
    }
    stack_.pack(args);
  }

  // Both directions, with the tile that the plan names.
  template <class Step>
  void step(int tile, int64_t columns, const StepArgs<Step>& args) const {
    switch (tile) {
      case 0: return step_tile<0>(columns, args);
      case 1: return step_tile<1>(columns, args);
      case 2: return step_tile<2>(columns, args);
      default: return step_by_library(columns, args);
    }
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
    stack_.run_kernel(step_kernel<Shape, Step>, grid, Shape::kThreads, Shape::kSharedBytes, args);
  }

  // The same operands, padding included, in one large product a direction.
  template <class Step>
  void step_by_library(int64_t columns, const StepArgs<Step>& args) const {
    FinishArgs<Step> finish{};
    finish.wide = operand_rows(columns);
    int most = 0;
    for (int d = 0; d < stack_.problem.directions; ++d) {
      const Operands<S>& x = args.operands[d];
      finish.step[d] = args.step[d];
      finish.active[d] = args.active[d];
      finish.product[d] = product_[d];
      finish.rows[d] = x.rows;
      if (args.active[d] > most) most = args.active[d];
      if (x.rows > 0)
        stack_.gemm({dtype_of<S>(),
                     dtype_of<T>(),
                     x.rows,
                     finish.wide,
                     x.depth_bytes / int64_t(sizeof(S)),
                     {x.a, x.a_wide, 1},
                     {x.b, 1, x.b_wide},
                     product_[d]});
    }
    const int64_t threads = Step::kGates ? columns / 4 : columns;
    const dim3 grid(unsigned(most), blocks_of(threads, kFinishThreads),
                    unsigned(stack_.problem.directions));
    stack_.run_kernel(finish_kernel<Step>, grid, kFinishThreads, 0, finish);
  }

  Stack<S>& stack_;
  T* product_[2];  // of a step, by direction; only where the plan leaves one to the library
};

}  // namespace cuda
}  // namespace fastlstm

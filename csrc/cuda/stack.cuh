// What every pass of both algorithms shares on the host: workspace, the rows of the problem, and
// launches of the step kernel and of the small kernels.
#pragma once

#include <vector>

#include "launch.h"
#include "rows.cuh"
#include "stepwise.cuh"
#include "sums.cuh"
#include "tiles.h"

namespace fastlstm {
namespace cuda {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline unsigned blocks_of(int64_t n, int64_t size) { return unsigned((n + size - 1) / size); }

template <class S>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<float>() {
  return DType::f32;
}
template <>
constexpr DType dtype_of<double>() {
  return DType::f64;
}
template <>
constexpr DType dtype_of<Bf16>() {
  return DType::bf16;
}
template <>
constexpr DType dtype_of<F16>() {
  return DType::f16;
}

// Hands out parts of the workspace. Without one it only counts, and hands out null pointers.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    char* at = base_ ? base_ + used_ : nullptr;
    used_ += round_up(count * int64_t(sizeof(T)), 256);
    return reinterpret_cast<T*>(at);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

template <class S>
const S* part(const void* all, int64_t index, int64_t size) {
  return all ? static_cast<const S*>(all) + index * size : nullptr;
}
template <class S>
S* part(void* all, int64_t index, int64_t size) {
  return all ? static_cast<S*>(all) + index * size : nullptr;
}

template <class S, bool kTensor>
class Stack {
 public:
  typedef Acc<S> T;

  Stack(const Problem& problem, const Saved& saved_, const Plan& plan_, const Context* context_)
      : p(problem),
        saved(saved_),
        plan(plan_),
        arena(context_ ? context_->workspace : nullptr),
        first(p.steps + 1),
        wide(p.directions * p.out_size),
        context_(context_) {
    for (int64_t t = 0; t < p.steps; ++t)
      first[t + 1] = first[t] + (p.batch_sizes ? p.batch_sizes[t] : p.batch);
    map = {nullptr, nullptr, nullptr, int(p.steps), int(p.batch)};
    if (p.batch_sizes) {
      map.t = arena.template take<int>(p.rows);
      map.b = arena.template take<int>(p.rows);
      map.first = arena.template take<int>(p.steps + 1);
    }
  }

  // How many sequences reach step t; 0 outside the steps.
  int active(int64_t t) const { return t < 0 || t >= p.steps ? 0 : int(first[t + 1] - first[t]); }
  static int64_t padded(int64_t n) { return round_up(n, kPadBytes / int64_t(sizeof(S))); }
  // Columns of an operand: gates stand in blocks of eight units.
  static int64_t padded_columns(int64_t n) { return round_up(n, kPadColumns); }
  static int64_t gate_columns(int64_t units) { return round_up(units, 8) * 4; }

  S* layer_output(int layer) const {
    return layer == p.layers - 1 ? static_cast<S*>(saved.output)
                                 : part<S>(saved.hidden, layer, p.rows * wide);
  }
  int64_t input_width(int layer) const { return layer == 0 ? p.input_size : wide; }
  bool dense(int layer) const { return layer > 0 || p.input_kind == InputKind::dense; }
  bool dropped(int layer) const {  // whether this layer's input is
    return layer > 0 && p.dropout > 0;
  }
  // Whether the kernels' caller can multiply this layer's input as it stands in memory.
  bool plain_input(int layer) const {
    if (layer > 0) return !dropped(layer);
    return p.stride_b >= p.input_size && (p.batch_sizes || p.stride_t == p.batch * p.stride_b);
  }
  int64_t widest_copied_input() const {
    int64_t most = 0;
    for (int layer = 0; layer < p.layers; ++layer)
      if (dense(layer) && !plain_input(layer) && input_width(layer) > most)
        most = input_width(layer);
    return most;
  }
  DropoutArgs dropout_of(int layer) const {  // of this layer's output
    if (p.dropout <= 0 || layer < 0 || layer >= p.layers - 1) return {nullptr, 0, 1, 0, 1};
    return {p.seed, uint64_t(p.dropout * 4294967296.0), p.dropout >= 1 ? 0 : 1 / (1 - p.dropout),
            layer, int(p.out_size)};
  }

  // ---- launches ----
  template <class Kernel, class Args>
  void run_kernel(Kernel kernel, dim3 grid, unsigned threads, size_t shared,
                  const Args& args) const {
    launch(kernel, grid, threads, shared, context_->stream, args);
  }

  void fill_map() const {
    if (map.t == nullptr) return;
    TableArgs args{
        const_cast<int*>(map.t), const_cast<int*>(map.b), const_cast<int*>(map.first), 0, 0, {}};
    for (args.begin = 0; args.begin < p.steps; args.begin += kTableSteps) {
      args.steps = int(p.steps - args.begin < kTableSteps ? p.steps - args.begin : kTableSteps);
      for (int j = 0; j <= args.steps; ++j) args.starts[j] = int(first[args.begin + j]);
      run_kernel(table_kernel, dim3(args.steps), kRowThreads, 0, args);
    }
  }

  template <class To>
  void pack(const PackArgs<S, To>& args) const {
    const unsigned blocks = blocks_of(args.to_rows * args.wide, kRowThreads);
    run_kernel(pack_kernel<S, To>, dim3(blocks < 4096 ? blocks : 4096), kRowThreads, 0, args);
  }
  // An operand of the step's product: (columns, depth) from w at the given strides.
  void pack_operand(S* to, const void* w, int64_t columns, int64_t depth, int64_t row_stride,
                    int64_t k_stride, bool gates) const {
    pack(PackArgs<S, S>{static_cast<const S*>(w), to, nullptr, row_stride, k_stride, columns,
                        operand_columns(columns, gates), padded(depth), int(depth),
                        gates ? int(columns / 4) : 0});
  }
  static int64_t operand_columns(int64_t columns, bool gates) {
    return padded_columns(gates ? gate_columns(columns / 4) : columns);
  }
  S* take_operand(int64_t columns, int64_t depth, bool gates) {
    return arena.template take<S>(operand_columns(columns, gates) * padded(depth));
  }

  void rows(const RowArgs<S>& args) const {
    run_kernel(row_kernel<S>, dim3(unsigned(p.rows)), kRowThreads, 0, args);
  }

  // A CTA for each sequence of a step, in both directions.
  dim3 row_grid(const int (&sequences)[2]) const {
    const int most = sequences[0] > sequences[1] ? sequences[0] : sequences[1];
    return dim3(unsigned(most), 1, unsigned(p.directions));
  }

  void fill_index(int* index) const {
    const IndexArgs args{map,          p.input, p.input_kind == InputKind::index64, place(), p.rows,
                         p.input_size, index};
    run_kernel(index_kernel, dim3(blocks_of(p.rows, kRowThreads)), kRowThreads, 0, args);
  }
  RowPlace place() const { return {p.batch_sizes != nullptr, p.stride_t, p.stride_b}; }

  // A layer's dense input as rows (at *row_stride): where it stands, or copied to `copy`.
  const S* input(int layer, S* copy, int64_t* row_stride) const {
    const int64_t width = input_width(layer);
    const S* from = layer == 0 ? static_cast<const S*>(p.input) : layer_output(layer - 1);
    if (plain_input(layer)) {
      *row_stride = layer == 0 ? p.stride_b : width;
      return from;
    }
    RowArgs<S> args{};
    args.kind = RowKind::copy;
    args.map = map;
    args.to = copy;
    args.to_wide = *row_stride = width;
    args.width = int(width);
    args.from = from;
    args.place = layer == 0 ? place() : RowPlace{true, 0, width};
    args.dropout = dropout_of(layer - 1);
    rows(args);
    return copy;
  }

  // One launch of the step kernel with the tile that the plan names.
  template <class Step>
  void step(int tile, int64_t columns, const StepArgs<Step>& args) const {
    switch (tile) {
      case 0: return step_tile<0>(columns, args);
      case 1: return step_tile<1>(columns, args);
      default: return step_tile<2>(columns, args);
    }
  }

  void* stream() const { return context_->stream; }
  void gemm(const Gemm& g) const { context_->gemm(context_->gemm_context, g); }
  void zero(void* memory, int64_t bytes) const {
    if (bytes > 0) zero_async(memory, size_t(bytes), context_->stream);
  }

  const Problem& p;
  const Saved& saved;
  const Plan& plan;
  Arena arena;
  std::vector<int64_t> first;  // each step's first row
  const int64_t wide;          // of a layer's output
  RowMap map;

 private:
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
                    unsigned(p.directions));
    run_kernel(step_kernel<Shape, Step>, grid, Shape::kThreads, Shape::kSharedBytes, args);
  }

  const Context* context_;
};

}  // namespace cuda
}  // namespace fastlstm

// What every pass of every algorithm shares on the host: the problem's rows, the workspace, and
// launches of the small kernels (rows.cuh) and of large products.
//
// A pass is a class with plain members, in this order (each takes its part of the workspace when it
// is constructed, without a context too):
//   Stack<S> stack_;             the problem, its rows, the arena, launches
//   InputPart<S> input_;         forward: start(d) of a layer, bias sums (input_part.cuh)
//   GradientPart<S> gradients_;  backward: dgates, and what follows from them (gradient_part.cuh)
//   StepLauncher<S, kTensor>     stepwise only: the step kernel and its operands
// and with run() and workspace(); run_pass() makes the entry point of launch.h from it.
#pragma once

#include <vector>

#include "launch.h"
#include "rows.cuh"

namespace fastlstm {
namespace cuda {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
// Rows that a large product reads or writes begin at 16 bytes and hold whole pieces of them: for
// others, cuBLAS takes kernels that load element by element.
constexpr int64_t kPieceBytes = 16;
template <class S>
constexpr int64_t whole_pieces(int64_t n) {
  return (n * int64_t(sizeof(S)) + kPieceBytes - 1) / kPieceBytes * kPieceBytes /
         int64_t(sizeof(S));
}
template <class S>
bool in_pieces(const void* rows, int64_t stride, int64_t width) {
  return reinterpret_cast<uintptr_t>(rows) % kPieceBytes == 0 &&
         whole_pieces<S>(stride) == stride && whole_pieces<S>(width) == width;
}

inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
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

// Rows of a layer's input for a large product: `stride` from row to row, `width` numbers of each,
// those beyond the input's own zero.
template <class S>
struct InputRows {
  const S* data;
  int64_t stride, width;
};

template <class S>
class Stack {
 public:
  typedef Acc<S> T;

  Stack(const Problem& problem_, const Saved& saved_, const Plan& plan_, const Context* context)
      : problem(problem_),
        saved(saved_),
        plan(plan_),
        arena(context ? context->workspace : nullptr),
        first(problem.steps + 1),
        output_width(problem.directions * problem.out_size),
        context_(context) {
    const Problem& p = problem;
    for (int64_t t = 0; t < p.steps; ++t)
      first[t + 1] = first[t] + (p.batch_sizes ? p.batch_sizes[t] : p.batch);
    map = {nullptr, nullptr, nullptr, int(p.steps), int(p.batch)};
    if (p.batch_sizes) {
      map.t = arena.template take<int>(p.rows);
      map.b = arena.template take<int>(p.rows);
      map.first = arena.template take<int>(p.steps + 1);
    }
  }

  // ---- steps, in the order of a direction ----
  // How many sequences reach step t; 0 outside the steps.
  int active(int64_t t) const {
    return t < 0 || t >= problem.steps ? 0 : int(first[t + 1] - first[t]);
  }
  int64_t step_of(int64_t s, int d) const { return d == 0 ? s : problem.steps - 1 - s; }
  static int64_t before(int64_t t, int d) { return d == 0 ? t - 1 : t + 1; }
  static int64_t after(int64_t t, int d) { return d == 0 ? t + 1 : t - 1; }

  // ---- layers ----
  S* layer_output(int layer) const {
    return layer == problem.layers - 1 ? static_cast<S*>(saved.output)
                                       : part<S>(saved.hidden, layer, problem.rows * output_width);
  }
  int64_t input_width(int layer) const { return layer == 0 ? problem.input_size : output_width; }
  bool dense(int layer) const { return layer > 0 || problem.input_kind == InputKind::dense; }
  bool dropped(int layer) const {  // whether this layer's input is
    return layer > 0 && problem.dropout > 0;
  }
  // Elements of the rows that input() may have to copy.
  int64_t copied_input() const {
    int64_t most = 0;
    for (int layer = 0; layer < problem.layers; ++layer)
      if (dense(layer) && !plain_input(layer) && input_width(layer) > most)
        most = input_width(layer);
    return problem.rows * whole_pieces<S>(most);
  }
  DropoutArgs dropout_of(int layer) const {  // of this layer's output
    const Problem& p = problem;
    if (p.dropout <= 0 || layer < 0 || layer >= p.layers - 1) return {nullptr, 0, 1, 0, 1};
    return {p.seed, uint64_t(p.dropout * 4294967296.0), p.dropout >= 1 ? 0 : 1 / (1 - p.dropout),
            layer, int(p.out_size)};
  }

  // ---- what is saved for a cell (layer * directions + direction) ----
  S* gates(int64_t cell) const {
    return part<S>(saved.gates, cell,
                   problem.rows * saved_per_unit(problem.layer_norm) * problem.hidden_size);
  }
  T* cells(int64_t cell) const {
    return part<T>(saved.cells, cell, problem.rows * problem.hidden_size);
  }
  // Of states like h0, c0, h_n or c_n, `width` numbers a sequence.
  template <class Any>
  auto* states(Any* all, int64_t cell, int64_t width) const {
    return part<S>(all, cell, problem.batch * width);
  }

  // ---- launches ----
  template <class Kernel, class Args>
  void run_kernel(Kernel kernel, dim3 grid, unsigned threads, size_t shared,
                  const Args& args) const {
    launch(kernel, grid, threads, shared, context_->stream, args);
  }

  void fill_map() const {
    if (map.t == nullptr) return;
    const int64_t steps = problem.steps;
    TableArgs args{
        const_cast<int*>(map.t), const_cast<int*>(map.b), const_cast<int*>(map.first), 0, 0, {}};
    for (args.begin = 0; args.begin < steps; args.begin += kTableSteps) {
      args.steps = int(steps - args.begin < kTableSteps ? steps - args.begin : kTableSteps);
      for (int j = 0; j <= args.steps; ++j) args.starts[j] = int(first[args.begin + j]);
      run_kernel(table_kernel, dim3(args.steps), kRowThreads, 0, args);
    }
  }

  // One matrix, or two of one shape.
  template <class To>
  void pack(const PackArgs<S, To>& args) const {
    const unsigned blocks = blocks_of(args.to_rows * args.wide, kRowThreads);
    run_kernel(pack_kernel<S, To>, dim3(blocks < 4096 ? blocks : 4096, args.to[1] ? 2 : 1),
               kRowThreads, 0, args);
  }
  // A matrix of which only the width of rows changes.
  void copy_matrix(const S* from, int64_t from_wide, S* to, int64_t to_wide, int64_t rows,
                   int64_t width) const {
    pack(PackArgs<S, S>{{from, nullptr},
                        {to, nullptr},
                        nullptr,
                        from_wide,
                        1,
                        rows,
                        rows,
                        to_wide,
                        int(width),
                        kAsStored,
                        kAsStored});
  }

  // What its caller leaves out: the rows' map and number.
  void make_rows(RowArgs<S> args) const {
    args.map = map;
    args.rows = problem.rows;
    run_kernel(row_kernel<S>, dim3(blocks_of(problem.rows, kRowsOfBlock)), kRowThreads, 0, args);
  }

  void fill_index(int* index) const {
    const Problem& p = problem;
    const IndexArgs args{map,          p.input, p.input_kind == InputKind::index64, place(), p.rows,
                         p.input_size, index};
    run_kernel(index_kernel, dim3(blocks_of(p.rows, kRowThreads)), kRowThreads, 0, args);
  }

  // A layer's dense input: where it stands, or copied to `copy`.
  InputRows<S> input(int layer, S* copy) const {
    const int64_t width = input_width(layer);
    const S* from = input_data(layer);
    if (plain_input(layer)) return {from, input_stride(layer), width};
    RowArgs<S> args{};
    args.kind = RowKind::copy;
    args.to = copy;
    args.to_wide = whole_pieces<S>(width);
    args.width = int(width);
    args.from = from;
    args.place = layer == 0 ? place() : RowPlace{true, 0, width};
    args.dropout = dropout_of(layer - 1);
    args.aligned = !dropped(layer) && in_pieces<S>(from, args.place.stride_b, width) &&
                   whole_pieces<S>(args.place.stride_t) == args.place.stride_t;
    make_rows(args);
    return {copy, args.to_wide, args.to_wide};
  }

  void* stream() const { return context_->stream; }
  void gemm(const Gemm& g) const { context_->gemm(context_->gemm_context, g); }
  void zero(void* memory, int64_t bytes) const {
    if (bytes > 0) zero_async(memory, size_t(bytes), context_->stream);
  }

  const Problem& problem;
  const Saved& saved;
  const Plan& plan;
  Arena arena;
  std::vector<int64_t> first;  // each step's first row
  const int64_t output_width;  // of a layer, both directions
  RowMap map;

 private:
  const S* input_data(int layer) const {
    return layer == 0 ? static_cast<const S*>(problem.input) : layer_output(layer - 1);
  }
  int64_t input_stride(int layer) const { return layer == 0 ? problem.stride_b : output_width; }
  // Whether this layer's input can be multiplied as it stands in memory.
  bool plain_input(int layer) const {
    const Problem& p = problem;
    if (!in_pieces<S>(input_data(layer), input_stride(layer), input_width(layer))) return false;
    if (layer > 0) return !dropped(layer);
    return p.stride_b >= p.input_size && (p.batch_sizes || p.stride_t == p.batch * p.stride_b);
  }
  RowPlace place() const {
    return {problem.batch_sizes != nullptr, problem.stride_t, problem.stride_b};
  }

  const Context* context_;
};

// An entry point of launch.h: the pass itself or, without a context, its workspace.
template <class Pass, class Call>
int64_t run_pass(const Call& call, const Plan& plan, const Context* context) {
  Pass pass(call, plan, context);
  if (context) pass.run();
  return pass.workspace();
}

}  // namespace cuda
}  // namespace fastlstm

// What every pass of every algorithm uses on the host: the problem's rows, the workspace, and
// launches of the small kernels (rows.cuh) and of large products.
//
// A pass is a class with plain members, in this order:
//   Stack<S> stack_;             the problem, its rows, the arena, launches
//   InputPart<S> input_;         forward: the input part of a layer, sums of biases
//   GradientPart<S> gradients_;  backward: dgates, and the products that follow from them
// Each member takes its part of the workspace when it is constructed. Without a context the arena
// only counts. run() launches the pass, workspace() is the arena's size, and run_pass() makes an
// entry point of launch.h from the two.
#pragma once

#include <vector>

#include "../forked_streams.h"
#include "../launch.h"
#include "rows.cuh"

namespace fastlstm {
namespace cuda {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows that a large product reads or writes begin at a multiple of 16 bytes and are whole pieces of
// 16 bytes: for other rows, cuBLAS chooses kernels that load element by element.
constexpr int64_t kPieceBytes = 16;
// n elements, rounded up to whole pieces.
template <class S>
constexpr int64_t whole_pieces(int64_t n) {
  return (n * int64_t(sizeof(S)) + kPieceBytes - 1) / kPieceBytes * kPieceBytes /
         int64_t(sizeof(S));
}
inline bool begins_piece(const void* memory) {
  return reinterpret_cast<uintptr_t>(memory) % kPieceBytes == 0;
}
// Whether rows of `width` elements, `stride` apart, begin at pieces and are whole ones.
template <class S>
bool in_pieces(const void* rows, int64_t stride, int64_t width) {
  return begins_piece(rows) && whole_pieces<S>(stride) == stride && whole_pieces<S>(width) == width;
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

// An operand of a large product whose rows, or (transposed) whose columns, are contiguous.
inline Operand row_major(const void* data, int64_t stride) { return {data, stride, 1}; }
inline Operand transposed(const void* data, int64_t stride) { return {data, 1, stride}; }

// Hands out parts of the workspace. Without a workspace it hands out null pointers and only counts.
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

// Part `index` of an array of parts of `size` elements; null of null.
template <class S>
const S* part(const void* all, int64_t index, int64_t size) {
  return all ? static_cast<const S*>(all) + index * size : nullptr;
}
template <class S>
S* part(void* all, int64_t index, int64_t size) {
  return all ? static_cast<S*>(all) + index * size : nullptr;
}

// Rows of a layer's input for a large product: `width` elements each, `stride` apart. Those beyond
// the input's width are zero.
template <class S>
struct InputRows {
  const S* data;
  int64_t stride, width;
};

// Steps from `begin` to `end` - 1.
struct StepRange {
  int64_t begin, end;
};
struct RowRange {
  int64_t begin, count;
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
        context_(context),
        stream_(context ? context->stream : nullptr) {
    const Problem& p = problem;
    for (int64_t t = 0; t < p.steps; ++t)
      first[t + 1] = first[t] + (p.batch_sizes ? p.batch_sizes[t] : p.batch);
    map = {nullptr, nullptr, {nullptr, int(p.steps), int(p.batch)}};
    if (p.batch_sizes) {
      map.t = arena.template take<int>(p.rows);
      map.b = arena.template take<int>(p.rows);
      map.steps.first = arena.template take<int>(p.steps + 1);
    }
  }

  // ---- steps ----
  // How many sequences step t has; 0 outside of the steps.
  int active(int64_t t) const {
    return t < 0 || t >= problem.steps ? 0 : int(first[t + 1] - first[t]);
  }
  // In direction d: the time step that comes s-th, and the one before or after step t.
  int64_t step_of(int64_t s, int d) const { return d == 0 ? s : problem.steps - 1 - s; }
  static int64_t before(int64_t t, int d) { return d == 0 ? t - 1 : t + 1; }
  static int64_t after(int64_t t, int d) { return d == 0 ? t + 1 : t - 1; }

  // ---- chunks of steps, in each of which a layer is one launch (layers.cuh) ----
  int64_t chunk_steps() const {
    return plan.chunk_steps > 0 && plan.chunk_steps < problem.steps ? plan.chunk_steps
                                                                    : problem.steps;
  }
  int64_t chunks() const {
    return problem.steps > 0 ? (problem.steps + chunk_steps() - 1) / chunk_steps() : 1;
  }
  // Whether several layers work at once. Then each has memory of its own.
  bool at_once() const { return chunks() > 1; }
  StepRange chunk(int64_t k) const {
    const int64_t end = (k + 1) * chunk_steps();
    return {k * chunk_steps(), end < problem.steps ? end : problem.steps};
  }
  RowRange rows_of(const StepRange& steps) const {
    return {first[steps.begin], first[steps.end] - first[steps.begin]};
  }
  StepRange all_steps() const { return {0, problem.steps}; }
  RowRange all_rows() const { return {0, problem.rows}; }
  // The first chunk has the most rows: sequences end, and none enters later.
  int64_t most_rows_of_chunk() const { return rows_of(chunk(0)).count; }
  // The same for kernels.
  StepRows step_rows(const StepRange& steps) const {
    return {map.steps.first, int(steps.end - steps.begin), active(steps.begin), int(steps.begin)};
  }

  // ---- layers ----
  S* layer_output(int layer) const {
    return layer == problem.layers - 1 ? static_cast<S*>(saved.output)
                                       : part<S>(saved.hidden, layer, problem.rows * output_width);
  }
  int64_t input_width(int layer) const { return layer == 0 ? problem.input_size : output_width; }
  bool dense(int layer) const { return layer > 0 || problem.input_kind == InputKind::dense; }
  // Whether dropout applies to this layer's input.
  bool dropped(int layer) const { return layer > 0 && problem.dropout > 0; }
  // Elements of a row of the widest input that input() has to copy, of layers from `begin` to
  // `end` - 1.
  int64_t copied_width(int begin, int end) const {
    int64_t most = 0;
    for (int layer = begin; layer < end; ++layer)
      if (dense(layer) && !plain_input(layer) && input_width(layer) > most)
        most = input_width(layer);
    return whole_pieces<S>(most);
  }
  // Dropout of this layer's output.
  DropoutArgs dropout_of(int layer) const {
    const Problem& p = problem;
    DropoutArgs dropout;
    if (p.dropout <= 0 || layer < 0 || layer >= p.layers - 1) return dropout;
    dropout.seed = p.seed;
    dropout.threshold = dropout_threshold(p.dropout);
    dropout.scale = dropout_scale(p.dropout);
    dropout.layer = layer;
    dropout.width = int(p.out_size);
    return dropout;
  }

  // ---- pseudo-layers: layer * directions + direction ----
  S* gates(int64_t pseudo_layer) const {
    return part<S>(saved.gates, pseudo_layer,
                   problem.rows * saved_per_unit(problem.layer_norm) * problem.hidden_size);
  }
  T* cell_states(int64_t pseudo_layer) const {
    return part<T>(saved.cell_states, pseudo_layer, problem.rows * problem.hidden_size);
  }
  // Of states like h0, c0, h_n or c_n, with `width` elements for each sequence.
  template <class Any>
  auto* states(Any* all, int64_t pseudo_layer, int64_t width) const {
    return part<S>(all, pseudo_layer, problem.batch * width);
  }

  // ---- launches ----
  template <class Kernel, class Args>
  void run_kernel(Kernel kernel, dim3 grid, unsigned threads, size_t shared, const Args& args,
                  Begin begin = Begin::late) const {
    launch(kernel, grid, threads, shared, stream_, args, begin);
  }

  void fill_map() const {
    if (map.t == nullptr) return;
    const int64_t steps = problem.steps;
    TableArgs args{};
    args.t = const_cast<int*>(map.t);
    args.b = const_cast<int*>(map.b);
    args.first = const_cast<int*>(map.steps.first);
    for (args.begin = 0; args.begin < steps; args.begin += kTableSteps) {
      args.steps = int(steps - args.begin < kTableSteps ? steps - args.begin : kTableSteps);
      for (int j = 0; j <= args.steps; ++j) args.starts[j] = int(first[args.begin + j]);
      run_kernel(table_kernel, dim3(args.steps), kRowThreads, 0, args);
    }
  }

  // Packs one matrix, or two of one shape.
  template <class To>
  void pack(const PackArgs<S, To>& args) const {
    const unsigned blocks = blocks_of(args.to_rows * args.to_stride, kRowThreads);
    run_kernel(pack_kernel<S, To>, dim3(blocks < 4096 ? blocks : 4096, args.to[1] ? 2 : 1),
               kRowThreads, 0, args);
  }
  // Copies a matrix to rows of another stride.
  void copy_matrix(const S* from, int64_t from_stride, S* to, int64_t to_stride, int64_t rows,
                   int64_t width) const {
    PackArgs<S, S> args;
    args.from[0] = from;
    args.to[0] = to;
    args.row_stride = from_stride;
    args.rows = args.to_rows = rows;
    args.to_stride = to_stride;
    args.depth = int(width);
    pack(args);
  }

  // Fills in what its caller leaves out: the map of the rows, and which of them.
  void make_rows(RowArgs<S> args, const RowRange& rows) const {
    args.map = map;
    args.begin = rows.begin;
    args.rows = rows.count;
    run_kernel(row_kernel<S>, dim3(blocks_of(rows.count, kRowsOfBlock)), kRowThreads, 0, args);
  }

  void fill_index(int* index) const {
    const Problem& p = problem;
    IndexArgs args{};
    args.map = map;
    args.from = p.input;
    args.is_64_bit = p.input_kind == InputKind::index64;
    args.place = place();
    args.rows = p.rows;
    args.bound = p.input_size;
    args.to = index;
    run_kernel(index_kernel, dim3(blocks_of(p.rows, kRowThreads)), kRowThreads, 0, args);
  }

  // Some rows of a layer's dense input: in their place or, where a product cannot read that, copied
  // to `copy`.
  InputRows<S> input(int layer, S* copy, const RowRange& rows) const {
    const int64_t width = input_width(layer), stride = input_stride(layer);
    const S* from = input_data(layer);
    if (plain_input(layer)) return {from + rows.begin * stride, stride, width};
    RowArgs<S> args{};
    args.kind = RowKind::copy;
    args.to = copy;
    args.to_stride = whole_pieces<S>(width);
    args.width = int(width);
    args.from = from;
    args.place = layer == 0 ? place() : RowPlace{true, 0, width};
    args.dropout = dropout_of(layer - 1);
    args.aligned = !dropped(layer) && in_pieces<S>(from, args.place.stride_b, width) &&
                   whole_pieces<S>(args.place.stride_t) == args.place.stride_t;
    make_rows(args, rows);
    return {copy, args.to_stride, args.to_stride};
  }

  // Where work goes.
  void* stream() const { return stream_; }
  void set_stream(void* stream) { stream_ = stream; }
  // A large product: c (m x n) = a (m x k) b (k x n), of S, with a result of type To.
  template <class To>
  void multiply(int64_t m, int64_t n, int64_t k, const Operand& a, const Operand& b, To* c) const {
    Gemm gemm;
    gemm.stream = stream_;
    gemm.in = dtype_of<S>();
    gemm.out = dtype_of<To>();
    gemm.m = m;
    gemm.n = n;
    gemm.k = k;
    gemm.a = a;
    gemm.b = b;
    gemm.c = c;
    context_->gemm(context_->gemm_context, gemm);
  }
  void zero(void* memory, int64_t bytes) const {
    if (bytes > 0) zero_async(memory, size_t(bytes), stream_);
  }

  const Problem& problem;
  const Saved& saved;
  const Plan& plan;
  Arena arena;
  std::vector<int64_t> first;  // each step's first row
  const int64_t output_width;  // of a layer: all directions
  RowMap map;

 private:
  const S* input_data(int layer) const {
    return layer == 0 ? static_cast<const S*>(problem.input) : layer_output(layer - 1);
  }
  int64_t input_stride(int layer) const { return layer == 0 ? problem.stride_b : output_width; }
  // Whether a large product can read this layer's input in its place.
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
  void* stream_;
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

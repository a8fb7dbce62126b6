// What every backward pass does after a layer's steps, over all rows at once: the gradients of
// weights and input as large products, those of biases as sums in a fixed order. What goes to the
// layer below stays in the accumulation type. Products read and write rows of whole pieces
// (stack.cuh): where a gradient has others, it is copied from one that has.
#pragma once

#include "stack.cuh"
#include "sums.cuh"

namespace fastlstm {
namespace cuda {

// One-hot rows and a large product for a vocabulary up to this; beyond, sums by index.
constexpr int64_t kOneHotColumns = 1024;

template <class S>
class GradientPart {
  typedef Acc<S> T;

 public:
  // depth: numbers of a direction's row of dgates, at least 4H in whole pieces; what is beyond 4H
  // is zero.
  // dh_width: with a projection, those of a row of dh().
  GradientPart(const Backward& f, Stack<S>& stack, int64_t depth, int64_t dh_width)
      : f_(f),
        stack_(stack),
        p_(stack.problem),
        units_(p_.hidden_size),
        out_(p_.out_size),
        depth_(depth),
        dgates_wide_(p_.directions * depth),
        dh_wide_(dh_width) {
    Arena& arena = stack_.arena;
    const bool one_hot = !stack_.dense(0) && p_.input_size <= kOneHotColumns;
    if (!stack_.dense(0)) index_ = arena.template take<int>(p_.rows);
    if (one_hot) one_hot_ = arena.template take<S>(p_.rows * whole_pieces<S>(p_.input_size));
    copy_ = arena.template take<S>(stack_.copied_input());
    previous_ = arena.template take<S>(shifted() ? 0 : p_.rows * whole_pieces<S>(out_));
    raw_ = arena.template take<S>(p_.projected ? p_.rows * whole_pieces<S>(units_) : 0);
    const bool whole = whole_rows(p_.input_size) && whole_rows(units_) && whole_rows(out_) &&
                       whole_rows(4 * units_);
    const int64_t x_wide = stack_.dense(0) || one_hot ? p_.input_size : 0;
    const int64_t widest = whole_pieces<S>(max_of(x_wide, max_of(stack_.output_width, units_)));
    product_ = arena.template take<S>(whole ? 0 : whole_pieces<S>(4 * units_) * widest);
    weights_ = arena.template take<S>(f_.grad_input || p_.layers > 1 ? dgates_wide_ * widest : 0);
    upper_input_ = arena.template take<T>(p_.layers > 1 ? p_.rows * stack_.output_width : 0);
    const bool copied = f_.grad_input && stack_.dense(0) && !whole_rows(p_.input_size);
    grad_input_ = arena.template take<S>(copied ? p_.rows * whole_pieces<S>(p_.input_size) : 0);
    partial_ = arena.template take<T>(parts() * dgates_wide_);
    dgates_ = dz_x_ = dz_h_ = arena.template take<S>(p_.rows * dgates_wide_);
    if (p_.layer_norm) {
      dz_x_ = arena.template take<S>(p_.rows * dgates_wide_);
      dz_h_ = arena.template take<S>(p_.rows * dgates_wide_);
      for (int d = 0; d < p_.directions; ++d)
        terms_[d] = arena.template take<T>(p_.rows * 10 * units_);
    }
    for (int d = 0; d < p_.directions; ++d) {
      dh_[d] = arena.template take<S>(p_.projected ? p_.rows * dh_wide_ : 0);
      const bool stays = p_.cell.zoneout_h > 0;
      dh_stays_[d] = stays ? arena.template take<T>(p_.batch * units_) : nullptr;
    }
  }

  // `steps(layer)` turns the gradients of a layer's output and last states into its dgates (and,
  // with a projection, dh_).
  template <class Steps>
  void run_layers(Steps&& steps) {
    stack_.fill_map();
    if (index_) stack_.fill_index(index_);
    // The padding of K.
    if (depth_ != 4 * units_) {
      const int64_t bytes = p_.rows * dgates_wide_ * int64_t(sizeof(S));
      stack_.zero(dgates_, bytes);
      if (p_.layer_norm) stack_.zero(dz_x_, bytes);
      if (p_.layer_norm) stack_.zero(dz_h_, bytes);
    }
    for (int layer = p_.layers - 1; layer >= 0; --layer) {
      steps(layer);
      weight_gradients(layer);
      if (layer > 0 || f_.grad_input) input_gradient(layer);
    }
  }

  // The gradients of the pre-activations of the layer at hand, dgates_wide() from row to row.
  S* dgates(int d) const { return dgates_ + d * depth_; }
  // What is multiplied by W_ih and the input, and by W_hh and h.
  S* to_input(int d) const { return dz_x_ + d * depth_; }
  S* to_hidden(int d) const { return dz_h_ + d * depth_; }
  int64_t depth() const { return depth_; }
  int64_t dgates_wide() const { return dgates_wide_; }  // both directions side by side

  // The gradient of the upper layer's input, (rows, output_width), dropped out already.
  const T* upper_input() const { return upper_input_; }
  // With a projection: the gradient of h, (rows, P).
  S* dh(int d) const { return dh_[d]; }
  // (B, H), what zoneout hands to the h before the last step that ran; or null.
  T* dh_stays(int d) const { return dh_stays_[d]; }
  // Layer normalisation: what the gradients of gains and bias sum, (rows, 10H).
  T* terms(int d) const { return terms_[d]; }

 private:
  int64_t parts() const { return (p_.rows + kSumRows - 1) / kSumRows; }

  // Whether y itself, a step apart, holds every h before a step: the first is zero.
  bool shifted() const { return !p_.h0 && !p_.batch_sizes && p_.steps > 1 && whole_rows(out_); }
  static bool whole_rows(int64_t width) { return whole_pieces<S>(width) == width; }

  // to (m x n) = left^T (rows x m, at left_wide) times right (rows x n). Both have zeros, or what
  // does not matter, up to whole pieces.
  void sum_product(void* to, int64_t rows, const S* left, int64_t left_wide, int64_t m,
                   const S* right, int64_t right_wide, int64_t n) const {
    const int64_t whole_m = whole_pieces<S>(m), whole_n = whole_pieces<S>(n);
    const bool direct = whole_m == m && whole_n == n;
    stack_.gemm({dtype_of<S>(),
                 dtype_of<S>(),
                 whole_m,
                 whole_n,
                 rows,
                 {left, 1, left_wide},
                 {right, right_wide, 1},
                 direct ? to : product_});
    if (!direct) stack_.copy_matrix(product_, whole_n, static_cast<S*>(to), n, m, n);
  }

  void weight_gradients(int layer) const {
    const CellGrads* grads = f_.grads + layer * p_.directions;
    bool need_input = false;
    for (int d = 0; d < p_.directions; ++d) need_input |= grads[d].w_ih != nullptr;
    InputRows<S> x{};
    if (need_input) x = layer == 0 && one_hot_ ? one_hot_rows() : dense_rows(layer);
    for (int d = 0; d < p_.directions; ++d) {
      const CellGrads& g = grads[d];
      if (g.w_ih && x.data)
        sum_product(g.w_ih, p_.rows, to_input(d), dgates_wide_, 4 * units_, x.data, x.stride,
                    stack_.input_width(layer));
      else if (g.w_ih)
        index_gradient(static_cast<S*>(g.w_ih), d);
      if (g.w_hh) recurrent_gradient(layer, d, g.w_hh);
      if (g.w_hr) projection_gradient(layer, d, g.w_hr);
      if (f_.grad_h0) first_hidden_gradient(layer, d);
      if (p_.layer_norm) norm_gradients(g, d);
    }
    bias_gradients(layer);
  }

  InputRows<S> dense_rows(int layer) const {
    return stack_.dense(layer) ? stack_.input(layer, copy_) : InputRows<S>{};
  }
  InputRows<S> one_hot_rows() const {
    const int64_t width = whole_pieces<S>(p_.input_size);
    RowArgs<S> args{};
    args.kind = RowKind::one_hot;
    args.to = one_hot_;
    args.to_wide = width;
    args.width = int(p_.input_size);
    args.index = index_;
    stack_.make_rows(args);
    return {one_hot_, width, width};
  }

  void index_gradient(S* to, int d) const {
    const dim3 grid(blocks_of(p_.input_size, kSumIndices), blocks_of(4 * units_, kSumColumns));
    stack_.run_kernel(index_sum_kernel<S>, grid, kSumColumns, sizeof(IndexSumShared<S>),
                      IndexSumArgs<S>{to_input(d), index_, to, p_.rows, dgates_wide_, p_.input_size,
                                      int(4 * units_)});
  }

  void recurrent_gradient(int layer, int d, void* to) const {
    const S *h = stack_.layer_output(layer) + d * out_, *left = to_hidden(d),
            *h0 = stack_.states(p_.h0, layer * p_.directions + d, out_);
    const int64_t h_wide = stack_.output_width;
    if (shifted()) {
      const int64_t rows = p_.rows - p_.batch;
      return sum_product(to, rows, left + (d == 0 ? p_.batch * dgates_wide_ : 0), dgates_wide_,
                         4 * units_, h + (d == 0 ? 0 : p_.batch * h_wide), h_wide, out_);
    }
    RowArgs<S> args{};
    args.kind = RowKind::previous;
    args.to = previous_;
    args.to_wide = whole_pieces<S>(out_);
    args.width = int(out_);
    args.from = h;
    args.place.stride_b = h_wide;
    args.h0 = h0;
    args.direction = d;
    args.aligned = in_pieces<S>(h, h_wide, out_) && in_pieces<S>(h0, out_, out_);
    stack_.make_rows(args);
    sum_product(to, p_.rows, left, dgates_wide_, 4 * units_, previous_, args.to_wide, out_);
  }

  void bias_gradients(int layer) const {
    S *to[2] = {}, *also_to[2] = {};
    bool needed = false;
    for (int d = 0; d < p_.directions; ++d) {
      const CellGrads& g = f_.grads[layer * p_.directions + d];
      to[d] = static_cast<S*>(g.b_ih);
      also_to[d] = static_cast<S*>(g.b_hh);
      needed |= to[d] || also_to[d];
    }
    if (needed) sum_columns(dgates(0), dgates_wide_, dgates_wide_, to, also_to, depth_, 4 * units_);
  }

  // Of rows of From, in two launches; ColumnArgs says which go where.
  template <class From>
  void sum_columns(const From* from, int64_t from_wide, int64_t columns, S* const (&to)[2],
                   S* const (&also_to)[2], int64_t group, int64_t used) const {
    const int n = int(columns);
    const dim3 grid(unsigned(parts()), blocks_of(n, 32));
    const ColumnArgs<From, T> part_sums{from,     {partial_}, {}, p_.rows, from_wide,
                                        kSumRows, n,          n,  n};
    const ColumnArgs<T, S> sums{partial_, {to[0], to[1]}, {also_to[0], also_to[1]},
                                parts(),  columns,        parts(),
                                n,        int(group),     int(used)};
    stack_.run_kernel(column_kernel<From, T>, grid, 32 * kSumWarps, kColumnShared<T>, part_sums);
    stack_.run_kernel(column_kernel<T, S>, dim3(1, grid.y), 32 * kSumWarps, kColumnShared<T>, sums);
  }

  void norm_gradients(const CellGrads& g, int d) const {
    int64_t at = 0;
    auto sum = [&](void* to, int64_t columns) {
      if (to)
        sum_columns(terms_[d] + at, 10 * units_, columns, {static_cast<S*>(to), nullptr},
                    {nullptr, nullptr}, columns, columns);
      at += columns;
    };
    sum(g.norm_ih, 4 * units_);
    sum(g.norm_hh, 4 * units_);
    sum(g.norm_c, units_);
    sum(g.norm_c_bias, units_);
  }

  void projection_gradient(int layer, int d, void* to) const {
    const int64_t cell = layer * p_.directions + d;
    RowArgs<S> args{};
    args.kind = RowKind::raw_h;
    args.to = raw_;
    args.to_wide = whole_pieces<S>(units_);
    args.width = int(units_);
    args.from = stack_.gates(cell);
    args.cells = stack_.cells(cell);
    stack_.make_rows(args);
    sum_product(to, p_.rows, dh_[d], dh_wide_, out_, raw_, args.to_wide, units_);
  }

  // dgates of each sequence's first step, times W_hh. Sequences of one length share a step.
  void first_hidden_gradient(int layer, int d) const {
    const int64_t cell = layer * p_.directions + d;
    S* to = stack_.states(f_.grad_h0, cell, out_);
    for (int64_t t = 0; t < p_.steps; ++t) {
      const int64_t begin = stack_.active(Stack<S>::before(t, d)), end = stack_.active(t);
      if (begin >= end) continue;
      stack_.gemm({dtype_of<S>(),
                   dtype_of<S>(),
                   end - begin,
                   out_,
                   4 * units_,
                   {to_hidden(d) + (stack_.first[t] + begin) * dgates_wide_, dgates_wide_, 1},
                   {p_.weights[cell].w_hh, out_, 1},
                   to + begin * out_});
    }
    if (dh_stays_[d])
      stack_.run_kernel(add_kernel<S>, dim3(blocks_of(p_.batch * units_, kRowThreads)), kRowThreads,
                        0, AddArgs<S>{to, dh_stays_[d], p_.batch * units_});
  }

  // dgates of both directions side by side, times their W_ih one above the other: one product,
  // rounded once.
  void input_gradient(int layer) const {
    if (!stack_.dense(layer)) return;
    const int64_t width = stack_.input_width(layer), whole = whole_pieces<S>(width);
    const CellWeights* w = p_.weights + layer * p_.directions;
    const S* weights = static_cast<const S*>(w[0].w_ih);
    int64_t depth = 4 * units_;
    if (p_.directions == 2 || !in_pieces<S>(weights, width, width) || !whole_rows(depth)) {
      PackArgs<S, S> args{{},     {},    nullptr,    width,     1,        4 * units_,
                          depth_, whole, int(width), kAsStored, kAsStored};
      for (int d = 0; d < p_.directions; ++d) {
        args.from[d] = static_cast<const S*>(w[d].w_ih);
        args.to[d] = weights_ + d * depth_ * whole;
      }
      stack_.pack(args);
      weights = weights_;
      depth = dgates_wide_;
    }
    // The upper layers' gradients are read as rows of output_width.
    const bool lowest = layer == 0, copied = lowest && whole != width;
    void* to = copied ? grad_input_ : lowest ? f_.grad_input : static_cast<void*>(upper_input_);
    stack_.gemm({dtype_of<S>(),
                 lowest ? dtype_of<S>() : dtype_of<T>(),
                 p_.rows,
                 lowest ? whole : width,
                 depth,
                 {to_input(0), dgates_wide_, 1},
                 {weights, whole, 1},
                 to});
    if (copied)
      stack_.copy_matrix(grad_input_, whole, static_cast<S*>(f_.grad_input), width, p_.rows, width);
    if (!stack_.dropped(layer)) return;
    GradientArgs<T> args{};
    args.map = stack_.map;
    args.gradient = upper_input_;
    args.width = int(width);
    args.dropout = stack_.dropout_of(layer - 1);
    stack_.run_kernel(gradient_kernel<T>, dim3(unsigned(p_.rows)), kRowThreads, 0, args);
  }

  const Backward& f_;
  Stack<S>& stack_;
  const Problem& p_;
  const int64_t units_, out_, depth_, dgates_wide_, dh_wide_;
  int* index_ = nullptr;
  S *one_hot_ = nullptr, *copy_, *previous_, *raw_;  // right operands, by rows
  S *product_, *weights_, *grad_input_;              // in whole pieces
  S *dgates_, *dz_x_, *dz_h_, *dh_[2];
  T *upper_input_, *partial_, *dh_stays_[2], *terms_[2];
};

}  // namespace cuda
}  // namespace fastlstm

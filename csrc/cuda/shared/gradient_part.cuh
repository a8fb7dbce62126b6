// What every backward pass computes after a layer's steps, over all rows at once: the gradients of
// weights and input as large products, those of biases as sums in a fixed order.
//
// The gradient that goes to the layer below stays in the accumulation type. Products read and write
// rows of whole pieces (stack.cuh); a gradient whose rows are not is copied from a padded one.
//
// Where layers work at once (layers.cuh), that gradient is computed chunk by chunk, and those of
// weights follow when all layers are done.
#pragma once

#include "column_sums.cuh"
#include "layers.cuh"
#include "sums.cuh"

namespace fastlstm {
namespace cuda {

// Index input: up to this vocabulary, the gradient of W_ih is a product with one-hot rows; beyond,
// it is summed by index.
constexpr int64_t kOneHotColumns = 1024;

// Layer normalisation: the terms of a unit and row whose sums over rows are gradients, in this
// order, each of them for all units: of the gains of W_ih x and of W_hh h (4 each), of c's gain and
// of what is added to c.
constexpr int kNormTerms = 10, kNormTermsOfHidden = 4, kNormTermsOfGainC = 8, kNormTermsOfBiasC = 9;

template <class S>
class GradientPart {
  typedef Acc<S> T;

 public:
  // depth: elements of one direction's row of dgates, at least 4H in whole pieces; those beyond 4H
  // are zero. dh_stride: with a projection, elements of a row of dh().
  GradientPart(const Backward& f, Stack<S>& stack, int64_t depth, int64_t dh_stride)
      : f_(f),
        stack_(stack),
        p_(stack.problem),
        units_(p_.hidden_size),
        out_(p_.out_size),
        depth_(depth),
        dgates_stride_(p_.directions * depth),
        dh_stride_(dh_stride),
        sums_(stack, dgates_stride_) {
    Arena& arena = stack_.arena;
    const bool one_hot = !stack_.dense(0) && p_.input_size <= kOneHotColumns;
    if (!stack_.dense(0)) index_ = arena.template take<int>(p_.rows);
    if (one_hot) one_hot_ = arena.template take<S>(p_.rows * whole_pieces<S>(p_.input_size));
    copy_ = arena.template take<S>(p_.rows * stack_.copied_width(0, p_.layers));
    previous_ = arena.template take<S>(shifted() ? 0 : p_.rows * whole_pieces<S>(out_));
    unprojected_ = arena.template take<S>(p_.projected ? p_.rows * whole_pieces<S>(units_) : 0);
    const bool whole = whole_rows(p_.input_size) && whole_rows(units_) && whole_rows(out_) &&
                       whole_rows(4 * units_);
    const int64_t x_width = stack_.dense(0) || one_hot ? p_.input_size : 0;
    const int64_t widest = whole_pieces<S>(max_of(x_width, max_of(stack_.output_width, units_)));
    product_ = arena.template take<S>(whole ? 0 : whole_pieces<S>(4 * units_) * widest);
    const bool copied = f_.grad_input && stack_.dense(0) && !whole_rows(p_.input_size);
    grad_input_ = arena.template take<S>(copied ? p_.rows * whole_pieces<S>(p_.input_size) : 0);
    for (int layer = 0; layer < (stack_.at_once() ? p_.layers : 1); ++layer) {
      Memory memory{};
      memory.weights =
          arena.template take<S>(f_.grad_input || p_.layers > 1 ? dgates_stride_ * widest : 0);
      memory.upper_input =
          arena.template take<T>(p_.layers > layer + 1 ? p_.rows * stack_.output_width : 0);
      memory.dgates = arena.template take<S>(p_.rows * dgates_stride_);
      const bool zoneout = p_.cell.zoneout_h > 0;
      for (int d = 0; d < p_.directions; ++d)
        memory.dh_zoneout[d] = zoneout ? arena.template take<T>(p_.batch * units_) : nullptr;
      memory_.push_back(memory);
    }
    if (p_.layer_norm) {
      dz_x_ = arena.template take<S>(p_.rows * dgates_stride_);
      dz_h_ = arena.template take<S>(p_.rows * dgates_stride_);
      for (int d = 0; d < p_.directions; ++d)
        terms_[d] = arena.template take<T>(p_.rows * kNormTerms * units_);
    }
    for (int d = 0; d < p_.directions; ++d)
      dh_[d] = arena.template take<S>(p_.projected ? p_.rows * dh_stride_ : 0);
  }

  // run(layer, steps) computes a layer's dgates (and, with a projection, dh) from the gradients of
  // its output and last states.
  template <class Run>
  void run_layers(Run&& run) {
    stack_.fill_map();
    if (index_) stack_.fill_index(index_);
    // Zeros in the padding of each row: products read it.
    if (depth_ != 4 * units_) {
      const int64_t bytes = p_.rows * dgates_stride_ * int64_t(sizeof(S));
      for (const Memory& memory : memory_) stack_.zero(memory.dgates, bytes);
      if (p_.layer_norm) stack_.zero(dz_x_, bytes);
      if (p_.layer_norm) stack_.zero(dz_h_, bytes);
    }
    for_layers(stack_, Pass::backward, [&](int layer, const StepRange& steps) {
      layer_ = layer + 1;
      if (layer_ < p_.layers) upper_gradient(steps);
      layer_ = layer;
      run(layer, steps);
      if (!stack_.at_once()) weight_gradients();
    });
    for (layer_ = p_.layers - 1; layer_ >= 0 && stack_.at_once(); --layer_) weight_gradients();
    layer_ = 0;
    if (f_.grad_input && stack_.dense(0)) bottom_gradient();
  }

  // The gradients of the current layer's pre-activations, in rows of dgates_stride().
  S* dgates(int d) const { return memory().dgates + d * depth_; }
  // The gradients of the products W_ih x and W_hh h: the same but for layer normalisation.
  S* to_input(int d) const { return (dz_x_ ? dz_x_ : memory().dgates) + d * depth_; }
  S* to_hidden(int d) const { return (dz_h_ ? dz_h_ : memory().dgates) + d * depth_; }
  int64_t depth() const { return depth_; }
  int64_t dgates_stride() const { return dgates_stride_; }  // both directions side by side

  // The gradient of the upper layer's input, (rows, output_width), behind its dropout.
  const T* upper_input() const { return memory().upper_input; }
  // With a projection: the gradient of h, (rows, P).
  S* dh(int d) const { return dh_[d]; }
  // (B, H), the share of dh that zoneout passes to the previous h unchanged; null without zoneout.
  T* dh_zoneout(int d) const { return memory().dh_zoneout[d]; }
  // Layer normalisation: (rows, kNormTerms * H).
  T* terms(int d) const { return terms_[d]; }

 private:
  // Memory of one layer, or of all where they do not work at once.
  struct Memory {
    S *weights, *dgates;  // weights: all directions' W_ih, packed
    T *upper_input, *dh_zoneout[2];
  };
  const Memory& memory() const { return memory_[stack_.at_once() ? layer_ : 0]; }

  // Whether y itself, shifted by one step, is every step's previous h: the first one is zero.
  bool shifted() const { return !p_.h0 && !p_.batch_sizes && p_.steps > 1 && whole_rows(out_); }
  static bool whole_rows(int64_t width) { return whole_pieces<S>(width) == width; }

  // to (m x n) = left^T right, of matrices (rows x m) and (rows x n) whose rows are padded to whole
  // pieces. What stands in the padding reaches only the padding of the product.
  void sum_product(void* to, int64_t rows, const S* left, int64_t left_stride, int64_t m,
                   const S* right, int64_t right_stride, int64_t n) const {
    const int64_t whole_m = whole_pieces<S>(m), whole_n = whole_pieces<S>(n);
    const bool direct = whole_m == m && whole_n == n;
    stack_.multiply(whole_m, whole_n, rows, transposed(left, left_stride),
                    row_major(right, right_stride), direct ? static_cast<S*>(to) : product_);
    if (!direct) stack_.copy_matrix(product_, whole_n, static_cast<S*>(to), n, m, n);
  }

  void weight_gradients() const {
    const int layer = layer_;
    const LayerGrads* grads = f_.grads + layer * p_.directions;
    bool need_input = false;
    for (int d = 0; d < p_.directions; ++d) need_input |= grads[d].w_ih != nullptr;
    InputRows<S> x{};
    if (need_input) x = layer == 0 && one_hot_ ? one_hot_rows() : dense_rows(layer);
    for (int d = 0; d < p_.directions; ++d) {
      const LayerGrads& g = grads[d];
      if (g.w_ih && x.data)
        sum_product(g.w_ih, p_.rows, to_input(d), dgates_stride_, 4 * units_, x.data, x.stride,
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
    return stack_.dense(layer) ? stack_.input(layer, copy_, stack_.all_rows()) : InputRows<S>{};
  }
  InputRows<S> one_hot_rows() const {
    const int64_t width = whole_pieces<S>(p_.input_size);
    RowArgs<S> args{};
    args.kind = RowKind::one_hot;
    args.to = one_hot_;
    args.to_stride = width;
    args.width = int(p_.input_size);
    args.index = index_;
    stack_.make_rows(args, stack_.all_rows());
    return {one_hot_, width, width};
  }

  void index_gradient(S* to, int d) const {
    const dim3 grid(blocks_of(p_.input_size, kSumIndices), blocks_of(4 * units_, kSumColumns));
    IndexSumArgs<S> args{};
    args.from = to_input(d);
    args.index = index_;
    args.to = to;
    args.rows = p_.rows;
    args.stride = dgates_stride_;
    args.vocabulary = p_.input_size;
    args.columns = int(4 * units_);
    stack_.run_kernel(index_sum_kernel<S>, grid, kSumColumns, sizeof(IndexSumShared<S>), args);
  }

  void recurrent_gradient(int layer, int d, void* to) const {
    const S *h = stack_.layer_output(layer) + d * out_, *left = to_hidden(d),
            *h0 = stack_.states(p_.h0, layer * p_.directions + d, out_);
    const int64_t h_stride = stack_.output_width;
    if (shifted()) {
      const int64_t rows = p_.rows - p_.batch;
      return sum_product(to, rows, left + (d == 0 ? p_.batch * dgates_stride_ : 0), dgates_stride_,
                         4 * units_, h + (d == 0 ? 0 : p_.batch * h_stride), h_stride, out_);
    }
    RowArgs<S> args{};
    args.kind = RowKind::previous;
    args.to = previous_;
    args.to_stride = whole_pieces<S>(out_);
    args.width = int(out_);
    args.from = h;
    args.place.stride_b = h_stride;
    args.h0 = h0;
    args.direction = d;
    args.aligned = in_pieces<S>(h, h_stride, out_) && in_pieces<S>(h0, out_, out_);
    stack_.make_rows(args, stack_.all_rows());
    sum_product(to, p_.rows, left, dgates_stride_, 4 * units_, previous_, args.to_stride, out_);
  }

  void bias_gradients(int layer) const {
    typename ColumnSums<S>::Targets targets{};
    bool needed = false;
    for (int d = 0; d < p_.directions; ++d) {
      const LayerGrads& g = f_.grads[layer * p_.directions + d];
      targets.to[d] = static_cast<S*>(g.b_ih);
      targets.copy_to[d] = static_cast<S*>(g.b_hh);
      needed |= g.b_ih || g.b_hh;
    }
    if (needed) sums_.run(dgates(0), dgates_stride_, dgates_stride_, targets, depth_, 4 * units_);
  }

  void norm_gradients(const LayerGrads& g, int d) const {
    auto sum = [&](void* to, int first_term, int64_t columns) {
      const typename ColumnSums<S>::Targets targets{{static_cast<S*>(to), nullptr}, {}};
      if (to)
        sums_.run(terms_[d] + first_term * units_, kNormTerms * units_, columns, targets, columns,
                  columns);
    };
    sum(g.norm_ih, 0, 4 * units_);
    sum(g.norm_hh, kNormTermsOfHidden, 4 * units_);
    sum(g.norm_c, kNormTermsOfGainC, units_);
    sum(g.norm_c_bias, kNormTermsOfBiasC, units_);
  }

  void projection_gradient(int layer, int d, void* to) const {
    const int64_t pseudo_layer = layer * p_.directions + d;
    RowArgs<S> args{};
    args.kind = RowKind::unprojected_h;
    args.to = unprojected_;
    args.to_stride = whole_pieces<S>(units_);
    args.width = int(units_);
    args.from = stack_.gates(pseudo_layer);
    args.cell_states = stack_.cell_states(pseudo_layer);
    stack_.make_rows(args, stack_.all_rows());
    sum_product(to, p_.rows, dh_[d], dh_stride_, out_, unprojected_, args.to_stride, units_);
  }

  // dgates of each sequence's first step, times W_hh. Sequences of one length have the same first
  // step.
  void first_hidden_gradient(int layer, int d) const {
    const int64_t pseudo_layer = layer * p_.directions + d;
    S* to = stack_.states(f_.grad_h0, pseudo_layer, out_);
    for (int64_t t = 0; t < p_.steps; ++t) {
      const int64_t begin = stack_.active(Stack<S>::before(t, d)), end = stack_.active(t);
      if (begin >= end) continue;
      const S* dgates = to_hidden(d) + (stack_.first[t] + begin) * dgates_stride_;
      stack_.multiply(end - begin, out_, 4 * units_, row_major(dgates, dgates_stride_),
                      row_major(p_.weights[pseudo_layer].w_hh, out_), to + begin * out_);
    }
    if (dh_zoneout(d))
      stack_.run_kernel(add_kernel<S>, dim3(blocks_of(p_.batch * units_, kRowThreads)), kRowThreads,
                        0, AddArgs<S>{to, dh_zoneout(d), p_.batch * units_});
  }

  // All directions' W_ih of the current layer, one above the other, as the right operand of a
  // product with rows of their dgates side by side: in their place, or packed to `weights`.
  struct InputWeights {
    const S* data;
    int64_t depth, stride;
    bool packed;
  };
  InputWeights input_weights() const {
    const int64_t width = stack_.input_width(layer_);
    const S* w_ih = static_cast<const S*>(p_.weights[layer_ * p_.directions].w_ih);
    if (p_.directions == 1 && in_pieces<S>(w_ih, width, width) && whole_rows(4 * units_))
      return {w_ih, 4 * units_, width, false};
    return {memory().weights, dgates_stride_, whole_pieces<S>(width), true};
  }
  void pack_input_weights() const {
    const InputWeights to = input_weights();
    if (!to.packed) return;
    PackArgs<S, S> args;
    args.row_stride = stack_.input_width(layer_);
    args.rows = 4 * units_;
    args.to_rows = depth_;
    args.to_stride = to.stride;
    args.depth = int(args.row_stride);
    for (int d = 0; d < p_.directions; ++d) {
      args.from[d] = static_cast<const S*>(p_.weights[layer_ * p_.directions + d].w_ih);
      args.to[d] = memory().weights + d * depth_ * to.stride;
    }
    stack_.pack(args);
  }

  // The gradient of the current layer's input, a product that is rounded once: some rows of it, for
  // the layer below.
  void upper_gradient(const StepRange& steps) const {
    if (steps.end == p_.steps) pack_input_weights();
    const InputWeights weights = input_weights();
    const RowRange rows = stack_.rows_of(steps);
    const int64_t width = stack_.output_width;
    T* const to = memory_[stack_.at_once() ? layer_ - 1 : 0].upper_input;
    stack_.multiply(rows.count, width, weights.depth,
                    row_major(to_input(0) + rows.begin * dgates_stride_, dgates_stride_),
                    row_major(weights.data, weights.stride), to + rows.begin * width);
    if (!stack_.dropped(layer_)) return;
    GradientArgs<T> args{};
    args.map = stack_.map;
    args.gradient = to;
    args.begin = rows.begin;
    args.width = int(width);
    args.dropout = stack_.dropout_of(layer_ - 1);
    stack_.run_kernel(gradient_kernel<T>, dim3(unsigned(rows.count)), kRowThreads, 0, args);
  }
  // All rows of it, for the call's input.
  void bottom_gradient() const {
    pack_input_weights();
    const InputWeights weights = input_weights();
    const int64_t width = p_.input_size, whole = weights.stride;
    S* const to = static_cast<S*>(f_.grad_input);
    stack_.multiply(p_.rows, whole, weights.depth, row_major(to_input(0), dgates_stride_),
                    row_major(weights.data, whole), whole == width ? to : grad_input_);
    if (whole != width) stack_.copy_matrix(grad_input_, whole, to, width, p_.rows, width);
  }

  const Backward& f_;
  Stack<S>& stack_;
  const Problem& p_;
  const int64_t units_, out_, depth_, dgates_stride_, dh_stride_;
  const ColumnSums<S> sums_;
  int* index_ = nullptr;
  S *one_hot_ = nullptr, *copy_, *previous_, *unprojected_;  // right operands, by rows
  S *product_, *grad_input_;                                 // in whole pieces
  S *dz_x_ = nullptr, *dz_h_ = nullptr, *dh_[2];
  T* terms_[2];
  std::vector<Memory> memory_;
  int layer_ = 0;  // the current layer
};

}  // namespace cuda
}  // namespace fastlstm

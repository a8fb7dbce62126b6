// What every backward pass does after a layer's steps, over all rows at once: the gradients of
// weights and input as large products, those of biases as sums in a fixed order. What goes to the
// layer below stays in the accumulation type.
#pragma once

#include "stack.cuh"

namespace fastlstm {
namespace cuda {

// One-hot rows and a large product for a vocabulary up to this; beyond, sums by index.
constexpr int64_t kOneHotColumns = 1024;

template <class S, bool kTensor>
class GradientPart : protected Stack<S, kTensor> {
  typedef Stack<S, kTensor> Base;

 protected:
  typedef Acc<S> T;
  using Base::active, Base::arena, Base::first, Base::map, Base::p, Base::padded, Base::plan;
  using Base::saved, Base::wide;

  GradientPart(const Backward& f, const Plan& plan, const Context* context)
      : Base(f.problem, f.saved, plan, context),
        f_(f),
        units_(p.hidden_size),
        out_(p.out_size),
        depth_(padded(4 * units_)),
        gates_wide_(p.directions * depth_) {
    const bool one_hot = !this->dense(0) && p.input_size <= kOneHotColumns;
    if (!this->dense(0)) index_ = arena.template take<int>(p.rows);
    if (one_hot) one_hot_ = arena.template take<S>(p.rows * p.input_size);
    copy_ = arena.template take<S>(p.rows * this->widest_copied_input());
    previous_ = arena.template take<S>(p.rows * out_);
    raw_ = arena.template take<S>(p.projected ? p.rows * units_ : 0);
    upper_input_ = arena.template take<T>(p.layers > plan.wave ? p.rows * wide : 0);
    if (p.directions == 2) {
      int64_t widest = p.layers > 1 ? wide : 0;
      if (f_.grad_input && p.input_size > widest) widest = p.input_size;
      stacked_ = arena.template take<S>(gates_wide_ * widest);
    }
    partial_ = arena.template take<T>(parts() * 4 * units_);
    dgates_ = dz_x_ = dz_h_ = arena.template take<S>(plan.wave * p.rows * gates_wide_);
    if (p.layer_norm) {
      dz_x_ = arena.template take<S>(p.rows * gates_wide_);
      dz_h_ = arena.template take<S>(p.rows * gates_wide_);
      for (int d = 0; d < p.directions; ++d)
        terms_[d] = arena.template take<T>(p.rows * 10 * units_);
    }
    for (int d = 0; d < p.directions; ++d) {
      dh_[d] = arena.template take<S>(p.projected ? p.rows * padded(out_) : 0);
      const bool stays = p.cell.zoneout_h > 0;
      dh_stays_[d] = stays ? arena.template take<T>(p.batch * units_) : nullptr;
    }
  }

  // `steps(top, layers)` turns the gradients of the outputs and last states of `layers` layers,
  // from `top` down, into their dgates (and, with a projection, dh_).
  template <class Steps>
  void run_layers(Steps&& steps) {
    this->fill_map();
    if (index_) this->fill_index(index_);
    // The padding of K.
    if (depth_ != 4 * units_) {
      const int64_t bytes = p.rows * gates_wide_ * int64_t(sizeof(S));
      this->zero(dgates_, plan.wave * bytes);
      if (p.layer_norm) this->zero(dz_x_, bytes);
      if (p.layer_norm) this->zero(dz_h_, bytes);
    }
    for (int top = p.layers - 1; top >= 0; top -= plan.wave) {
      const int layers = min_of(plan.wave, top + 1), lowest = top - layers + 1;
      steps(top, layers);
      for (int layer = top; layer >= lowest; --layer) weight_gradients(layer);
      if (lowest > 0 || f_.grad_input) input_gradient(lowest);
    }
  }

  // The layers of a wavefront each have their own.
  S* dgates(int layer, int d) const { return of_layer(dgates_, layer, d); }
  // What is multiplied by W_ih and the input, and by W_hh and h.
  S* to_input(int layer, int d) const { return of_layer(dz_x_, layer, d); }
  S* to_hidden(int layer, int d) const { return of_layer(dz_h_, layer, d); }
  int64_t before_of(int64_t t, int d) const { return d == 0 ? t - 1 : t + 1; }

  const Backward& f_;
  const int64_t units_, out_, depth_, gates_wide_;  // a direction's dgates, and both together
  S* dh_[2];
  T* dh_stays_[2];  // what zoneout hands to the h before the last step that ran, or null
  T* upper_input_;
  T* terms_[2];  // layer normalisation: what the gradients of gains and bias sum

 private:
  S* of_layer(S* all, int layer, int d) const {
    return all + (p.layers - 1 - layer) % plan.wave * p.rows * gates_wide_ + d * depth_;
  }
  int64_t parts() const { return (p.rows + kSumRows - 1) / kSumRows; }

  // to (m x n) = left^T (rows x m, at left_wide) times right (rows x n).
  void sum_product(void* to, const S* left, int64_t left_wide, int64_t m, const S* right,
                   int64_t right_wide, int64_t n) const {
    this->gemm({dtype_of<S>(),
                dtype_of<S>(),
                m,
                n,
                p.rows,
                {left, 1, left_wide},
                {right, right_wide, 1},
                to});
  }

  void weight_gradients(int layer) const {
    const CellGrads* grads = f_.grads + layer * p.directions;
    bool need_input = false;
    for (int d = 0; d < p.directions; ++d) need_input |= grads[d].w_ih != nullptr;
    int64_t x_wide = 0;
    const S* x = need_input && this->dense(layer) ? this->input(layer, copy_, &x_wide) : nullptr;
    for (int d = 0; d < p.directions; ++d) {
      const CellGrads& g = grads[d];
      if (g.w_ih && x)
        sum_product(g.w_ih, to_input(layer, d), gates_wide_, 4 * units_, x, x_wide,
                    this->input_width(layer));
      else if (g.w_ih)
        index_gradient(static_cast<S*>(g.w_ih), d);
      if (g.w_hh) recurrent_gradient(layer, d, g.w_hh);
      if (g.b_ih || g.b_hh)
        bias_gradient(layer, d, static_cast<S*>(g.b_ih), static_cast<S*>(g.b_hh));
      if (g.w_hr) projection_gradient(layer, d, g.w_hr);
      if (f_.grad_h0) first_hidden_gradient(layer, d);
      if (p.layer_norm) norm_gradients(g, d);
    }
  }

  void index_gradient(S* to, int d) const {
    if (one_hot_) {
      RowArgs<S> args{};
      args.kind = RowKind::one_hot;
      args.map = map;
      args.to = one_hot_;
      args.to_wide = p.input_size;
      args.width = int(p.input_size);
      args.index = index_;
      this->rows(args);
      return sum_product(to, to_input(0, d), gates_wide_, 4 * units_, one_hot_, p.input_size,
                         p.input_size);
    }
    const dim3 grid(blocks_of(p.input_size, kSumIndices), blocks_of(4 * units_, kSumColumns));
    this->run_kernel(index_sum_kernel<S>, grid, kSumColumns, sizeof(IndexSumShared<S>),
                     IndexSumArgs<S>{to_input(0, d), index_, to, p.rows, gates_wide_, p.input_size,
                                     int(4 * units_)});
  }

  void recurrent_gradient(int layer, int d, void* to) const {
    RowArgs<S> args{};
    args.kind = RowKind::previous;
    args.map = map;
    args.to = previous_;
    args.to_wide = out_;
    args.width = int(out_);
    args.from = this->layer_output(layer) + d * out_;
    args.place.stride_b = wide;
    args.h0 = part<S>(p.h0, layer * p.directions + d, p.batch * out_);
    args.direction = d;
    this->rows(args);
    sum_product(to, to_hidden(layer, d), gates_wide_, 4 * units_, previous_, out_, out_);
  }

  void bias_gradient(int layer, int d, S* to, S* also_to) const {
    sum_columns(dgates(layer, d), gates_wide_, 4 * units_, to, also_to);
  }

  // Of rows of From, in two launches.
  template <class From>
  void sum_columns(const From* from, int64_t from_wide, int64_t columns, S* to,
                   S* also_to = nullptr) const {
    const int n = int(columns);
    const dim3 grid(unsigned(parts()), blocks_of(n, 32));
    this->run_kernel(column_kernel<From, T>, grid, 32 * kSumWarps, kColumnShared<T>,
                     ColumnArgs<From, T>{from, partial_, nullptr, p.rows, from_wide, kSumRows, n});
    this->run_kernel(column_kernel<T, S>, dim3(1, grid.y), 32 * kSumWarps, kColumnShared<T>,
                     ColumnArgs<T, S>{partial_, to, also_to, parts(), columns, parts(), n});
  }

  void norm_gradients(const CellGrads& g, int d) const {
    int64_t at = 0;
    auto sum = [&](void* to, int64_t columns) {
      if (to) sum_columns(terms_[d] + at, 10 * units_, columns, static_cast<S*>(to));
      at += columns;
    };
    sum(g.norm_ih, 4 * units_);
    sum(g.norm_hh, 4 * units_);
    sum(g.norm_c, units_);
    sum(g.norm_c_bias, units_);
  }

  void projection_gradient(int layer, int d, void* to) const {
    const int64_t cell = layer * p.directions + d;
    RowArgs<S> args{};
    args.kind = RowKind::raw_h;
    args.map = map;
    args.to = raw_;
    args.to_wide = units_;
    args.width = int(units_);
    args.from = part<S>(saved.gates, cell, p.rows * 4 * units_);
    args.cells = part<T>(saved.cells, cell, p.rows * units_);
    this->rows(args);
    sum_product(to, dh_[d], padded(out_), out_, raw_, units_, units_);
  }

  // dgates of each sequence's first step, times W_hh. Sequences of one length share a step.
  void first_hidden_gradient(int layer, int d) const {
    const int64_t cell = layer * p.directions + d;
    S* to = part<S>(f_.grad_h0, cell, p.batch * out_);
    for (int64_t t = 0; t < p.steps; ++t) {
      const int64_t begin = active(before_of(t, d)), end = active(t);
      if (begin >= end) continue;
      this->gemm({dtype_of<S>(),
                  dtype_of<S>(),
                  end - begin,
                  out_,
                  4 * units_,
                  {to_hidden(layer, d) + (first[t] + begin) * gates_wide_, gates_wide_, 1},
                  {p.weights[cell].w_hh, out_, 1},
                  to + begin * out_});
    }
    if (dh_stays_[d])
      this->run_kernel(add_kernel<S>, dim3(blocks_of(p.batch * units_, kRowThreads)), kRowThreads,
                       0, AddArgs<S>{to, dh_stays_[d], p.batch * units_});
  }

  // dgates of both directions side by side, times their W_ih one above the other: one product,
  // rounded once.
  void input_gradient(int layer) const {
    if (!this->dense(layer)) return;
    const int64_t width = this->input_width(layer);
    const CellWeights* w = p.weights + layer * p.directions;
    const void* weights = w[0].w_ih;
    int64_t depth = 4 * units_;
    if (p.directions == 2) {
      for (int d = 0; d < 2; ++d)
        this->pack(PackArgs<S, S>{static_cast<const S*>(w[d].w_ih), stacked_ + d * depth_ * width,
                                  nullptr, width, 1, 4 * units_, depth_, width, int(width), 0});
      weights = stacked_;
      depth = gates_wide_;
    }
    void* to = layer == 0 ? f_.grad_input : static_cast<void*>(upper_input_);
    this->gemm({dtype_of<S>(),
                layer == 0 ? dtype_of<S>() : dtype_of<T>(),
                p.rows,
                width,
                depth,
                {to_input(layer, 0), gates_wide_, 1},
                {weights, width, 1},
                to});
    if (!this->dropped(layer)) return;
    GradientArgs<T> args{};
    args.map = map;
    args.gradient = upper_input_;
    args.width = int(width);
    args.dropout = this->dropout_of(layer - 1);
    this->run_kernel(gradient_kernel<T>, dim3(unsigned(p.rows)), kRowThreads, 0, args);
  }

  int* index_ = nullptr;
  S *one_hot_ = nullptr, *stacked_ = nullptr, *dgates_, *dz_x_, *dz_h_, *copy_, *previous_, *raw_;
  T* partial_;
};

}  // namespace cuda
}  // namespace fastlstm

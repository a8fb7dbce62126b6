// Backward pass of the stack on the CPU, layer by layer from the last.
//
// Per layer: (1) back through time: a task owns some sequences in one direction; each step turns
// the gradients of h and c into those of the four pre-activations (dgates, kept for all steps) and
// multiplies them by W_hh for the step before. (2) The input's gradient, dgates W_ih, over blocks
// of rows. (3) The weights' gradients, dgates^T [x, h_{t-1}], summed over all rows, in output
// tiles that each task keeps in its own cache (weight_grads.h). Sums have a fixed order that does
// not depend on the number of threads.
#pragma once

#include "weight_grads.h"

namespace fastlstm {
namespace {

template <class S>
class BackwardTask {
 public:
  typedef Acc<S> T;

  // grad_y: gradient of the layer's (undropped) output, (rows, directions * P), or null.
  BackwardTask(const Backward& f, const Rows& rows, const S* grad_y, const Panels<T>& hh,
               const Panels<T>& hr, const CellWork<T>& work, int layer, int direction,
               int64_t begin, int64_t end)
      : p_(f.problem),
        rows_(rows),
        hh_(hh),
        hr_(hr),
        work_(work),
        direction_(direction),
        begin_(begin),
        end_(end),
        units_(p_.hidden_size),
        h_wide_(spread<T>(p_.out_size)),
        c_wide_(padded<T>(units_)) {
    const int64_t index = int64_t(layer) * p_.directions + direction;
    const int64_t batch = end - begin, h_state = p_.batch * p_.out_size,
                  c_state = p_.batch * units_;
    gates_ = cell_part<S>(f.saved.gates, index, p_.rows * 4 * units_);
    cells_ = cell_part<T>(f.saved.cells, index, p_.rows * units_);
    grad_h0_ = cell_part<S>(f.grad_h0, index, h_state);
    grad_c0_ = cell_part<S>(f.grad_c0, index, c_state);
    grad_y_ = grad_y ? grad_y + direction * p_.out_size : nullptr;

    dh_.reset(batch * h_wide_);
    dc_.reset(batch * c_wide_);
    c0_.reset(batch * c_wide_);
    if (p_.projected) raw_dh_.reset(batch * c_wide_);
    fill(dh_, h_wide_, cell_part<S>(f.grad_h_n, index, h_state), p_.out_size);
    fill(dc_, c_wide_, cell_part<S>(f.grad_c_n, index, c_state), units_);
    fill(c0_, c_wide_, cell_part<S>(p_.c0, index, c_state), units_);
  }

  void run() {
    for (int64_t s = p_.steps - 1; s >= 0; --s) {
      const int64_t t = direction_ == 0 ? s : p_.steps - 1 - s;
      const int64_t active = max_of(0, min_of(end_, rows_.active(t)) - begin_);
      if (active == 0) continue;
      const int64_t first = rows_.at(t, begin_);
      if (grad_y_) add_grad_y(first, active);
      const T* dh = dh_.get();
      if (p_.projected) {
        for (int64_t b = 0; b < active; ++b)
          memcpy(work_.dh.get() + (first + b) * work_.dh_wide, dh_.get() + b * h_wide_,
                 size_t(p_.out_size) * sizeof(T));
        gemm_rows(raw_dh_.get(), c_wide_, dh_.get(), h_wide_, hr_.data.get(), active, p_.out_size,
                  units_, false);
        dh = raw_dh_.get();
      }
      const int64_t before = direction_ == 0 ? t - 1 : t + 1;
      for (int64_t b = 0; b < active; ++b) {
        const bool has_before = begin_ + b < rows_.active(before);
        const T* c_prev =
            has_before ? cells_ + rows_.at(before, begin_ + b) * units_ : c0_.get() + b * c_wide_;
        run_cell(first + b, c_prev, dh + b * (p_.projected ? c_wide_ : h_wide_),
                 dc_.get() + b * c_wide_);
      }
      gemm_rows(dh_.get(), h_wide_, work_.dgates.get() + first * work_.gates_wide, work_.gates_wide,
                hh_.data.get(), active, 4 * units_, p_.out_size, false);
    }
    finish(grad_h0_, dh_, h_wide_, p_.out_size);
    finish(grad_c0_, dc_, c_wide_, units_);
  }

 private:
  void fill(Buffer<T>& to, int64_t wide, const S* from, int64_t n) const {
    for (int64_t b = 0; b < end_ - begin_; ++b) {
      T* row = to.get() + b * wide;
      for (int64_t j = 0; j < wide; ++j) row[j] = 0;
      if (from) convert(row, from + (begin_ + b) * n, n);
    }
  }

  void finish(S* to, const Buffer<T>& from, int64_t wide, int64_t n) const {
    if (to == nullptr) return;
    for (int64_t b = 0; b < end_ - begin_; ++b)
      for (int64_t j = 0; j < n; ++j) from_acc(from[b * wide + j], to[(begin_ + b) * n + j]);
  }

  void add_grad_y(int64_t first, int64_t active) {
    const int64_t y_wide = p_.directions * p_.out_size;
    for (int64_t b = 0; b < active; ++b) {
      const S* from = grad_y_ + (first + b) * y_wide;
      T* to = dh_.get() + b * h_wide_;
      for (int64_t j = 0; j < p_.out_size; ++j) to[j] += to_acc(from[j]);
    }
  }

  void run_cell(int64_t row, const T* c_prev, const T* dh, T* dc) const {
    const S* gates = gates_ + row * 4 * units_;
    const T* c = cells_ + row * units_;
    T* out = work_.dgates.get() + row * work_.gates_wide;
    for (int64_t unit = 0; unit < units_; unit += kWidth<T>) {
      const int n = int(min_of(kWidth<T>, units_ - unit));
      const CellBackward<Vec<T>> d = cell_backward<Math<T>>(
          load_part(gates + unit, n), load_part(gates + units_ + unit, n),
          load_part(gates + 2 * units_ + unit, n), load_part(gates + 3 * units_ + unit, n),
          load_part(c_prev + unit, n), load_part(c + unit, n), load(dh + unit), load(dc + unit));
      store_part<T>(out + unit, d.a_i, n);
      store_part<T>(out + units_ + unit, d.a_f, n);
      store_part<T>(out + 2 * units_ + unit, d.a_g, n);
      store_part<T>(out + 3 * units_ + unit, d.a_o, n);
      store(dc + unit, d.c_prev);
    }
  }

  const Problem& p_;
  const Rows& rows_;
  const Panels<T>&hh_, &hr_;
  const CellWork<T>& work_;
  const int direction_;
  const int64_t begin_, end_, units_, h_wide_, c_wide_;
  const S *gates_, *grad_y_;
  const T* cells_;
  S *grad_h0_, *grad_c0_;
  Buffer<T> dh_, dc_, c0_, raw_dh_;  // dh: of h after projection; raw_dh: before it
};

// Gradient of a layer's input, with the lower layer's dropout applied: to (rows, width).
template <class S>
void input_gradient(const Problem& p, const Runtime& runtime, const Rows& rows, int layer,
                    const CellWork<Acc<S>>* work, int64_t width, S* to) {
  typedef Acc<S> T;
  Panels<T> ih[2];
  for (int d = 0; d < p.directions; ++d)
    ih[d].pack_plain(runtime, static_cast<const S*>(p.weights[layer * p.directions + d].w_ih),
                     4 * p.hidden_size, width);
  const Dropout<T> dropout(p, layer > 0 ? layer - 1 : p.layers);
  constexpr int64_t kBlock = 16 * kTileRows;
  const int64_t wide = spread<T>(width);
  parallel(runtime, ceil_div(p.rows, kBlock), [&](int64_t task) {
    const int64_t first = task * kBlock, count = min_of(kBlock, p.rows - first);
    Buffer<T> sum(count * wide);
    for (int d = 0; d < p.directions; ++d)
      gemm_rows(sum.get(), wide, work[d].dgates.get() + first * work[d].gates_wide,
                work[d].gates_wide, ih[d].data.get(), count, 4 * p.hidden_size, width, d > 0);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = first + r;
      if (dropout.active()) dropout.apply(sum.get() + r * wide, rows.t(row), rows.b(row), 0, width);
      for (int64_t j = 0; j < width; ++j) from_acc(sum[r * wide + j], to[row * width + j]);
    }
  });
}

template <class S>
void backward(const Backward& f, const Runtime& runtime) {
  typedef Acc<S> T;
  const Problem& p = f.problem;
  const Rows rows(p);
  const BatchSplit split(rows, p.rows, runtime.threads);
  CellWork<T> work[2];
  for (int d = 0; d < p.directions; ++d) work[d].reset(p);
  Buffer<S> grad_y;  // of the layer below the one at work
  const S* from_above = static_cast<const S*>(f.grad_output);
  for (int layer = p.layers - 1; layer >= 0; --layer) {
    {
      Panels<T> hh[2], hr[2];
      for (int d = 0; d < p.directions; ++d) {
        const CellWeights& w = p.weights[layer * p.directions + d];
        hh[d].pack_plain(runtime, static_cast<const S*>(w.w_hh), 4 * p.hidden_size, p.out_size);
        if (p.projected)
          hr[d].pack_plain(runtime, static_cast<const S*>(w.w_hr), p.out_size, p.hidden_size);
      }
      parallel(runtime, p.directions * split.count, [&](int64_t j) {
        const int d = int(j % p.directions);
        const int64_t part = j / p.directions;
        BackwardTask<S>(f, rows, from_above, hh[d], hr[d], work[d], layer, d, split.begin(part),
                        split.end(part))
            .run();
      });
    }
    weight_gradients<S>(f, runtime, rows, layer, work);
    if (layer > 0) {
      const int64_t width = p.directions * p.out_size;
      if (from_above != grad_y.get() || grad_y.get() == nullptr) grad_y.reset(p.rows * width);
      input_gradient<S>(p, runtime, rows, layer, work, width, grad_y.get());
      from_above = grad_y.get();
    } else if (f.grad_input) {
      input_gradient<S>(p, runtime, rows, 0, work, p.input_size, static_cast<S*>(f.grad_input));
    }
  }
}

}  // namespace
}  // namespace fastlstm

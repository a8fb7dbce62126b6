// Backward pass of the stack on the CPU, layer by layer from the last.
//
// A layer goes back through time in chunks of steps whose dgates (the gradients of the four
// pre-activations) stay in cache. Per chunk: (1) a task owns some sequences in one direction, as
// forward, and a team may work on it; each step turns the gradients of h and c into dgates and
// multiplies them by W_hh for the step before. (2) The input's gradient, dgates W_ih, over blocks
// of rows. (3) The weights' gradients, dgates^T [x, h_{t-1}], added to running sums
// (weight_grads.h). Workspace is one chunk and the sums, whatever T is; all sums have an order that
// does not depend on threads.
#pragma once

#include "weight_grads.h"

namespace fastlstm {
namespace {

template <class S>
class BackwardTask {
 public:
  typedef Acc<S> T;
  typedef Operand<S> E;

  // grad_y: gradient of the layer's (undropped) output, (rows, directions * P), or null.
  BackwardTask(const Backward& f, const Rows& rows, const S* grad_y, const Panels<E>& hh,
               const Panels<E>& hr, const NormWeights<S>& norm, const Chunk<E>& chunk, int layer,
               int direction, int64_t begin, int64_t end)
      : p_(f.problem),
        rows_(rows),
        norm_(norm),
        hh_(hh),
        hr_(hr),
        chunk_(chunk),
        direction_(direction),
        begin_(begin),
        end_(end),
        units_(p_.hidden_size),
        h_wide_(spread<T>(p_.out_size)),
        c_wide_(padded<T>(units_)),
        rules_(drawn_rules<T>(p_, layer, direction)) {
    const int64_t index = int64_t(layer) * p_.directions + direction;
    const int64_t batch = end - begin, h_state = p_.batch * p_.out_size,
                  c_state = p_.batch * units_;
    saved_wide_ = saved_per_unit(p_.layer_norm) * units_;
    gates_ = cell_part<S>(f.saved.gates, index, p_.rows * saved_wide_);
    cells_ = cell_part<T>(f.saved.cells, index, p_.rows * units_);
    grad_cells_ = cell_part<T>(f.grad_cells, index, p_.rows * units_);
    grad_h0_ = cell_part<S>(f.grad_h0, index, h_state);
    grad_c0_ = cell_part<S>(f.grad_c0, index, c_state);
    grad_y_ = grad_y ? grad_y + direction * p_.out_size : nullptr;

    dh_.reset(batch * h_wide_);
    dc_.reset(batch * c_wide_);
    c0_.reset(batch * c_wide_);
    if (p_.projected) raw_dh_.reset(batch * c_wide_);
    if (p_.layer_norm) scratch_.reset(batch * spread<T>(6 * units_));
    fill(dh_, h_wide_, cell_part<S>(f.grad_h_n, index, h_state), p_.out_size);
    fill(dc_, c_wide_, cell_part<S>(f.grad_c_n, index, c_state), units_);
    fill(c0_, c_wide_, cell_part<S>(p_.c0, index, c_state), units_);
  }

  // Steps [first, last) of this direction come next, the last one first.
  void begin(int64_t first, int64_t last) {
    last_step_ = last;
    team_.begin(last - first);
  }

  // Any number of threads may call this: they form a team.
  void run() {
    team_.work([&](int64_t j, int member) { go_back(last_step_ - 1 - j, member); }, [](int64_t) {});
  }

  void write_states() const {
    finish(grad_h0_, dh_, h_wide_, p_.out_size);
    finish(grad_c0_, dc_, c_wide_, units_);
  }

 private:
  E* dgates(int64_t row) const { return chunk_.row(chunk_.dgates, row); }
  E* projected_dh(int64_t row) const {
    return chunk_.dh.get() + (row - chunk_.first) * chunk_.dh_wide;
  }

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

  // One member's part of step s.
  void go_back(int64_t s, int member) {
    const int64_t t = direction_ == 0 ? s : p_.steps - 1 - s;
    const int64_t active = max_of(0, min_of(end_, rows_.active(t)) - begin_);
    if (active == 0) return;
    const int64_t first = rows_.at(t, begin_);
    auto share = [&](int64_t columns, auto&& f) {
      team_.share_ranges(member, panels_of<T>(columns), [&](int64_t begin, int64_t end) {
        f(begin, begin * kPanel<T>, min_of(columns, end * kPanel<T>) - begin * kPanel<T>);
      });
    };
    if (p_.projected) {
      share(p_.out_size, [&](int64_t, int64_t begin, int64_t n) {
        add_grad_y(first, active, begin, n);
        for (int64_t b = 0; b < active; ++b) {
          E* to = projected_dh(first + b) + begin;
          convert(to, dh_.get() + b * h_wide_ + begin, n);
        }
      });
      team_.meet();
    }
    if (p_.layer_norm)
      team_.share_ranges(member, active, [&](int64_t begin, int64_t end) {
        add_grad_y(first + begin, end - begin, 0, units_, begin);
        for (int64_t b = begin; b < end; ++b) run_normed(t, b, first + b);
      });
    else
      run_cells(t, first, active, share);
    if (s == 0 && !grad_h0_) return;
    team_.meet();
    // Zoneout left a part of dh there.
    const bool add = p_.cell.zoneout_h > 0;
    share(p_.out_size, [&](int64_t panel, int64_t begin, int64_t n) {
      gemm_rows(dh_.get() + begin, h_wide_, chunk_.row(chunk_.to_hidden(), first),
                chunk_.gates_wide, hh_.panel(panel), active, 4 * units_, n,
                add ? Start<T>{dh_.get() + begin, h_wide_} : Start<T>{});
    });
  }

  // c before row's step.
  const T* previous_cell(int64_t t, int64_t b) const {
    const int64_t before = direction_ == 0 ? t - 1 : t + 1;
    return begin_ + b < rows_.active(before) ? cells_ + rows_.at(before, begin_ + b) * units_
                                             : c0_.get() + b * c_wide_;
  }

  void run_normed(int64_t t, int64_t b, int64_t row) const {
    norm_backward<S>(norm_, gates_ + row * saved_wide_, previous_cell(t, b),
                     dh_.get() + b * h_wide_, dc_.get() + b * c_wide_,
                     grad_cells_ ? grad_cells_ + row * units_ : nullptr, rules_,
                     rules_.row(t, begin_ + b), units_, scratch_.get() + b * spread<T>(6 * units_),
                     dgates(row), chunk_.row(chunk_.dz_x, row), chunk_.row(chunk_.dz_h, row),
                     chunk_.terms.get() + (row - chunk_.first) * norm_terms(units_));
  }

  template <class Share>
  void run_cells(int64_t t, int64_t first, int64_t active, Share&& share) {
    share(units_, [&](int64_t panel, int64_t begin, int64_t n) {
      if (p_.projected)
        gemm_rows(raw_dh_.get() + begin, c_wide_, projected_dh(first), chunk_.dh_wide,
                  hr_.panel(panel), active, p_.out_size, n, {});
      else
        add_grad_y(first, active, begin, n);
      for (int64_t b = 0; b < active; ++b) {
        if (b + kRowsAhead < active) fetch(t, b + kRowsAhead, begin, n);
        const T* c_prev = previous_cell(t, b);
        T* dh = p_.projected ? raw_dh_.get() + b * c_wide_ : dh_.get() + b * h_wide_;
        if (rules_.plain)
          run_cell<false>(first + b, c_prev, dh, dc_.get() + b * c_wide_, begin, begin + n);
        else
          run_cell<true>(first + b, c_prev, dh, dc_.get() + b * c_wide_, begin, begin + n);
      }
    });
  }

  // What the cells of a later row read: a member's part of it is too short for the processor to see
  // that it comes.
  static constexpr int64_t kRowsAhead = 3;
  void fetch(int64_t t, int64_t b, int64_t begin, int64_t n) const {
    const S* gates = gates_ + rows_.at(t, begin_ + b) * 4 * units_ + begin;
    for (int g = 0; g < 4; ++g) fetch_line_by_line(gates + g * units_, n);
    fetch_line_by_line(previous_cell(t, b) + begin, n);
  }

  // Columns [begin, begin + n) of some rows, the first of which is sequence b's.
  void add_grad_y(int64_t first, int64_t rows, int64_t begin, int64_t n, int64_t b = 0) {
    if (grad_y_ == nullptr) return;
    const int64_t y_wide = p_.directions * p_.out_size;
    for (int64_t j = 0; j < rows; ++j) {
      const S* from = grad_y_ + (first + j) * y_wide + begin;
      T* to = dh_.get() + (b + j) * h_wide_ + begin;
      for (int64_t k = 0; k < n; ++k) to[k] += to_acc(from[k]);
    }
  }

  // Units [begin, end) of a row.
  template <bool kRules>
  void run_cell(int64_t row, const T* c_prev, T* dh, T* dc, int64_t begin, int64_t end) const {
    typedef Pick<kRules, Vec<T>, Twice<Vec<T>>> V;
    typedef Elements<V> Own;
    constexpr int kAll = kLanes<T, V>;
    const RuleRow drawn = kRules ? rules_.row(rows_.t(row), rows_.b(row)) : RuleRow{};
    const S* gates = gates_ + row * 4 * units_;
    const T* c = cells_ + row * units_;
    E* out = dgates(row);
    for (int64_t unit = begin; unit < end; unit += kAll) {
      const int n = int(min_of(kAll, end - unit));
      V dc_in = Own::read(dc + unit, kAll);
      if (grad_cells_) dc_in = dc_in + Own::read(grad_cells_ + row * units_ + unit, n);
      const V i = Own::read(gates + unit, n), f = Own::read(gates + units_ + unit, n),
              g = Own::read(gates + 2 * units_ + unit, n),
              o = Own::read(gates + 3 * units_ + unit, n), before = Own::read(c_prev + unit, n),
              after = Own::read(c + unit, n), dh_in = Own::read(dh + unit, kAll);
      CellBackward<V> d;
      if constexpr (kRules) {
        d = cell_backward<Math<T>>(i, f, g, o, before, after, dh_in, dc_in,
                                   rules_of(rules_, drawn, unit));
        if (!p_.projected) store(dh + unit, d.h_prev);
      } else {
        d = cell_backward<MathOf<T, V>>(i, f, g, o, before, after, dh_in, dc_in);
      }
      Own::write(out + unit, d.a_i, n);
      Own::write(out + units_ + unit, d.a_f, n);
      Own::write(out + 2 * units_ + unit, d.a_g, n);
      Own::write(out + 3 * units_ + unit, d.a_o, n);
      Own::write(dc + unit, d.c_prev, kAll);
    }
  }

  const Problem& p_;
  Team team_{0};
  int64_t last_step_ = 0;
  const Rows& rows_;
  const NormWeights<S>& norm_;
  const Panels<E>&hh_, &hr_;
  const Chunk<E>& chunk_;
  const int direction_;
  const int64_t begin_, end_, units_, h_wide_, c_wide_;
  const DrawnRules<T> rules_;
  int64_t saved_wide_;
  const S *gates_, *grad_y_;
  const T *cells_, *grad_cells_;
  S *grad_h0_, *grad_c0_;
  Buffer<T> dh_, dc_, c0_, raw_dh_;  // dh: of h after projection; raw_dh: before it
  Buffer<T> scratch_;                // of norm_backward
};

// Gradient of a layer's input, with the lower layer's dropout applied: to (rows, width).
template <class S>
class InputGrad {
 public:
  typedef Acc<S> T;
  typedef Operand<S> E;

  InputGrad(const Problem& p, const Runtime& runtime, const Rows& rows, int layer, S* to)
      : p_(p),
        runtime_(runtime),
        rows_(rows),
        dropout_(p, layer > 0 ? layer - 1 : p.layers),
        width_(layer > 0 ? p.directions * p.out_size : p.input_size),
        wide_(spread<T>(width_)),
        to_(to) {
    for (int d = 0; to && d < p.directions; ++d)
      ih_[d].pack_plain(runtime, static_cast<const S*>(p.weights[layer * p.directions + d].w_ih),
                        4 * p.hidden_size, width_);
    // The directions reach a row at different times: their sum waits in the accumulation type.
    if (to && p.directions == 2) {
      both_.reset(p.rows * wide_);
      for (int64_t j = 0; j < p.rows * wide_; ++j) both_[j] = 0;
    }
  }

  void add(const Chunk<E>& chunk, int direction) {
    if (to_ == nullptr) return;
    for_blocks(chunk.rows, [&](int64_t first, int64_t count) {
      Buffer<T> own(both_.get() ? 0 : count * wide_);
      T* sum = both_.get() ? both_.get() + (chunk.first + first) * wide_ : own.get();
      gemm_rows(sum, wide_, chunk.to_input().get() + first * chunk.gates_wide, chunk.gates_wide,
                ih_[direction].data.get(), count, 4 * p_.hidden_size, width_,
                both_.get() ? Start<T>{sum, wide_} : Start<T>{});
      if (both_.get() == nullptr) write_rows(sum, chunk.first + first, count);
    });
  }

  void write() {
    if (both_.get())
      for_blocks(p_.rows, [&](int64_t first, int64_t count) {
        write_rows(both_.get() + first * wide_, first, count);
      });
  }

 private:
  template <class F>
  void for_blocks(int64_t rows, F&& f) const {
    constexpr int64_t kBlock = 96;
    parallel(runtime_, ceil_div(rows, kBlock),
             [&](int64_t task) { f(task * kBlock, min_of(kBlock, rows - task * kBlock)); });
  }

  void write_rows(T* from, int64_t first, int64_t count) const {
    for (int64_t row = first; row < first + count; ++row, from += wide_) {
      if (dropout_.active()) dropout_.apply(from, rows_.t(row), rows_.b(row), 0, width_);
      for (int64_t j = 0; j < width_; ++j) from_acc(from[j], to_[row * width_ + j]);
    }
  }

  const Problem& p_;
  const Runtime& runtime_;
  const Rows& rows_;
  const Dropout<T> dropout_;
  const int64_t width_, wide_;
  S* to_;
  Panels<E> ih_[2];
  Buffer<T> both_;
};

// Sets the chunk of each direction to its rows of steps [first, last); returns the larger number.
template <class E>
int64_t set_chunk(const Rows& rows, Chunk<E>* chunk, const Problem& p, int64_t first,
                  int64_t last) {
  int64_t largest = 0;
  for (int d = 0; d < p.directions; ++d) {
    const int64_t begin = d == 0 ? first : p.steps - last, end = d == 0 ? last : p.steps - first;
    chunk[d].first = rows.at(begin, 0);
    chunk[d].rows = rows.at(end, 0) - chunk[d].first;
    largest = max_of(largest, chunk[d].rows);
  }
  return largest;
}

constexpr int64_t kChunkBytes = 8 << 20, kChunkLeastRows = 256;

// One layer. grad_y and grad_x may be the same: a row of grad_x is written after grad_y's is read.
template <class S>
void backward_layer(const Backward& f, const Runtime& runtime, const Rows& rows, int layer,
                    const S* grad_y, S* grad_x) {
  typedef Operand<S> E;
  const Problem& p = f.problem;
  const LayerInput<S> input(p, f.saved, rows, layer);
  Panels<E> hh[2], hr[2];
  Chunk<E> chunk[2];
  const int64_t most = max_of(kChunkLeastRows, kChunkBytes / Chunk<E>::row_bytes(p));
  List<WeightGrads<S>> weights(p.directions);
  List<NormWeights<S>> norms(p.directions);
  for (int d = 0; d < p.directions; ++d) {
    const CellWeights& w = p.weights[layer * p.directions + d];
    hh[d].pack_plain(runtime, static_cast<const S*>(w.w_hh), 4 * p.hidden_size, p.out_size);
    if (p.projected)
      hr[d].pack_plain(runtime, static_cast<const S*>(w.w_hr), p.out_size, p.hidden_size);
    chunk[d].reset(p, min_of(p.rows, max_of(most, p.batch)));
    weights.add(f, runtime, rows, input, layer, d);
    norms.add(p, w);
  }
  InputGrad<S> input_grad(p, runtime, rows, layer, grad_x);
  const int64_t work = p.directions * p.rows * 4 * p.hidden_size * p.out_size;
  const Division division(p, runtime.threads, work, sizeof(E));
  const BatchSplit split(rows, p.rows, division.parts);
  List<BackwardTask<S>> tasks(p.directions * split.count);
  for (int64_t j = 0; j < split.count; ++j)
    for (int d = 0; d < p.directions; ++d)
      tasks.add(f, rows, grad_y, hh[d], hr[d], norms[d], chunk[d], layer, d, split.begin(j),
                split.end(j));
  for (int64_t last = p.steps, first; last > 0; last = first) {
    first = last - 1;
    while (first > 0 && set_chunk(rows, chunk, p, first - 1, last) <= most) --first;
    set_chunk(rows, chunk, p, first, last);
    for (int64_t j = 0; j < tasks.count(); ++j) tasks[j].begin(first, last);
    run_teams(runtime, division, tasks.count(), [&](int64_t j) { tasks[j].run(); });
    for (int d = 0; d < p.directions; ++d) {
      input_grad.add(chunk[d], d);
      weights[d].add(chunk[d]);
    }
  }
  input_grad.write();
  for (int64_t j = 0; j < tasks.count(); ++j) tasks[j].write_states();
  for (int d = 0; d < p.directions; ++d) weights[d].write();
}

template <class S>
void backward(const Backward& f, const Runtime& runtime) {
  const Problem& p = f.problem;
  const Rows rows(p);
  Buffer<S> between(p.layers > 1 ? p.rows * p.directions * p.out_size : 0);
  for (int layer = p.layers - 1; layer >= 0; --layer) {
    const bool top = layer == p.layers - 1;
    backward_layer<S>(f, runtime, rows, layer,
                      top ? static_cast<const S*>(f.grad_output) : between.get(),
                      layer > 0 ? between.get() : static_cast<S*>(f.grad_input));
  }
}

}  // namespace
}  // namespace fastlstm

// Forward pass of the stack on the CPU.
//
// Per layer: weights are packed once into panels whose columns go unit block by unit block, and
// within a block gate by gate (i, f, g, o), so that the four pre-activations of a unit come from
// neighbouring panels. A task owns some sequences of the batch in one direction for all steps and
// never meets another task. It projects the input of a few steps at once (up to kAheadRows rows,
// so that W_ih is read once for them and the result stays in cache); then, step by step, each tile
// starts from that projection, adds h_{t-1} W_hh^T and runs the cell on the finished tile.
//
// Moves per step and task: W_hh once from cache (4HP elements); h and c stay in the task's scratch.
#pragma once

#include "layer.h"

namespace fastlstm {
namespace {

constexpr int64_t kAheadRows = 192;
// Index input gathers rows of a transposed W_ih, made where it is not larger than this many rows.
constexpr int64_t kTableRows = 4096;

template <class S>
struct ForwardCell {
  typedef Acc<S> T;

  ForwardCell(const Problem& p, const Runtime& runtime, const CellWeights& w, int64_t input_width,
              InputKind kind) {
    const int64_t units = p.hidden_size;
    const int64_t panels = 4 * panels_of<T>(units);
    // Row of W (4H rows) that stands in column j of a panel, or -1 in the padding.
    auto gate_row = [=](int64_t panel, int j) {
      const int64_t unit = panel / 4 * kPanel<T> + j;
      return unit < units ? panel % 4 * units + unit : int64_t(-1);
    };
    bias.reset(panels * kPanel<T>);
    const S *b_ih = static_cast<const S*>(w.b_ih), *b_hh = static_cast<const S*>(w.b_hh);
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int j = 0; j < kPanel<T>; ++j) {
        const int64_t row = gate_row(panel, j);
        bias[panel * kPanel<T> + j] =
            row < 0 || b_ih == nullptr ? T(0) : to_acc(b_ih[row]) + to_acc(b_hh[row]);
      }
    auto pack = [&](Panels<T>& to, const void* from, int64_t depth) {
      const S* weight = static_cast<const S*>(from);
      to.pack(runtime, panels, depth, [=](int64_t k, int64_t panel, int j) {
        const int64_t row = gate_row(panel, j);
        return row < 0 ? T(0) : to_acc(weight[row * depth + k]);
      });
    };
    pack(hh, w.w_hh, p.out_size);
    if (kind == InputKind::dense) {
      pack(ih, w.w_ih, input_width);
    } else {
      w_ih = static_cast<const S*>(w.w_ih);
      vocabulary = input_width;
      if (vocabulary <= kTableRows) {
        table.reset(vocabulary * panels * kPanel<T>);
        parallel(runtime, min_of(vocabulary, 4 * runtime.threads), [&](int64_t task) {
          const int64_t tasks = min_of(vocabulary, 4 * runtime.threads);
          for (int64_t x = vocabulary * task / tasks; x < vocabulary * (task + 1) / tasks; ++x)
            gather(table.get() + x * panels * kPanel<T>, x, units);
        });
      }
    }
    if (p.projected) hr.pack_transposed(runtime, static_cast<const S*>(w.w_hr), units, p.out_size);
  }

  // Pre-activations for index x: a column of W_ih, and the bias, in the panels' order.
  void gather(T* to, int64_t x, int64_t units) const {
    const int64_t blocks = panels_of<T>(units);
    for (int64_t block = 0; block < blocks; ++block)
      for (int g = 0; g < 4; ++g)
        for (int j = 0; j < kPanel<T>; ++j) {
          const int64_t at = (block * 4 + g) * kPanel<T> + j, unit = block * kPanel<T> + j;
          to[at] = bias[at];
          if (unit < units) to[at] += to_acc(w_ih[(g * units + unit) * vocabulary + x]);
        }
  }

  Panels<T> ih, hh, hr;
  Buffer<T> bias, table;
  const S* w_ih = nullptr;
  int64_t vocabulary = 0;
};

template <class S>
class ForwardTask {
 public:
  typedef Acc<S> T;

  ForwardTask(const Forward& f, const Rows& rows, const LayerInput<S>& input,
              const ForwardCell<S>& cell, int layer, int direction, int64_t begin, int64_t end)
      : p_(f.problem),
        rows_(rows),
        input_(input),
        cell_(cell),
        layer_(layer),
        direction_(direction),
        begin_(begin),
        end_(end),
        units_(p_.hidden_size),
        gates_wide_(4 * padded<T>(units_)),
        x_wide_(spread<T>(input.width)),
        h_wide_(spread<T>(max_of(units_, p_.out_size))) {
    const int64_t index = int64_t(layer) * p_.directions + direction;
    const int64_t batch = end - begin;
    h0_ = cell_part<S>(p_.h0, index, p_.batch * p_.out_size);
    h_n_ = cell_part<S>(f.h_n, index, p_.batch * p_.out_size);
    const S* c0 = cell_part<S>(p_.c0, index, p_.batch * units_);
    c_n_ = cell_part<S>(f.c_n, index, p_.batch * units_);
    gates_ = cell_part<S>(f.saved.gates, index, p_.rows * 4 * units_);
    cells_ = cell_part<T>(f.saved.cells, index, p_.rows * units_);
    y_wide_ = p_.directions * p_.out_size;
    y_ = layer == p_.layers - 1 ? static_cast<S*>(f.saved.output)
                                : static_cast<S*>(f.saved.hidden) + layer * p_.rows * y_wide_;
    y_ += direction * p_.out_size;

    for (Buffer<T>& h : h_) h.reset(batch * h_wide_);
    c_.reset(batch * padded<T>(units_));
    for (int64_t b = 0; b < batch; ++b) {
      T* c = c_.get() + b * padded<T>(units_);
      for (int64_t j = 0; j < padded<T>(units_); ++j) c[j] = 0;
      if (c0) convert(c, c0 + (begin + b) * units_, units_);
    }
    if (p_.projected) raw_h_.reset(batch * h_wide_);
    const int64_t most = max_of(kAheadRows, batch);
    start_.reset(most);
    if (input.kind == InputKind::dense) x_.reset(most * x_wide_);
    if (!cell.table.get()) ahead_.reset(most * gates_wide_);
  }

  void run() {
    int64_t entered = 0, ahead = 0, row = 0;  // rows entered; projected rows left, and the first
    for (int64_t s = 0; s < p_.steps; ++s) {
      const int64_t t = step(s), active = count(t);
      if (active == 0) {
        if (direction_ == 0) break;
        continue;
      }
      for (; entered < active; ++entered) enter(entered);
      if (ahead == 0) {
        ahead = project(s);
        row = 0;
      }
      advance(t, active, start_.get() + row);
      row += active;
      ahead -= active;
      const int64_t next = s + 1 < p_.steps ? count(step(s + 1)) : 0;
      for (int64_t b = next; b < active; ++b) leave(b);
    }
  }

 private:
  int64_t step(int64_t s) const { return direction_ == 0 ? s : p_.steps - 1 - s; }
  // How many of this task's sequences reach step t.
  int64_t count(int64_t t) const { return max_of(0, min_of(end_, rows_.active(t)) - begin_); }

  void enter(int64_t b) {
    T* h = h_[0].get() + b * h_wide_;
    for (int64_t j = 0; j < h_wide_; ++j) h[j] = 0;
    if (h0_) convert(h, h0_ + (begin_ + b) * p_.out_size, p_.out_size);
  }

  void leave(int64_t b) {
    const T *h = h_[0].get() + b * h_wide_, *c = c_.get() + b * padded<T>(units_);
    S *h_n = h_n_ + (begin_ + b) * p_.out_size, *c_n = c_n_ + (begin_ + b) * units_;
    for (int64_t j = 0; j < p_.out_size; ++j) from_acc(h[j], h_n[j]);
    for (int64_t j = 0; j < units_; ++j) from_acc(c[j], c_n[j]);
  }

  // Pre-activations from the input for as many steps from s on as fit; start_[r] points at row
  // r's. Returns the number of rows.
  int64_t project(int64_t s) {
    int64_t n = 0;
    for (; s < p_.steps; ++s) {
      const int64_t t = step(s), active = count(t);
      if (n > 0 && n + active > kAheadRows) break;
      for (int64_t b = 0; b < active; ++b, ++n) {
        const int64_t row = rows_.at(t, begin_ + b);
        T* own = ahead_.get() ? ahead_.get() + n * gates_wide_ : nullptr;
        if (input_.kind == InputKind::dense) {
          input_.load(x_.get() + n * x_wide_, row, 0, input_.width);
          memcpy(own, cell_.bias.get(), size_t(gates_wide_) * sizeof(T));
        } else if (own) {
          cell_.gather(own, input_.index(row), units_);
        }
        start_[n] = own ? own : cell_.table.get() + input_.index(row) * gates_wide_;
      }
    }
    if (input_.kind == InputKind::dense)
      gemm_rows(ahead_.get(), gates_wide_, x_.get(), x_wide_, cell_.ih.data.get(), n, input_.width,
                gates_wide_, true);
    return n;
  }

  // One time step of `active` sequences.
  void advance(int64_t t, int64_t active, const T* const* start) {
    for (int64_t block = 0; block < panels_of<T>(units_); ++block)
      for_row_blocks(active, [&](auto size, int64_t b) {
        run_tile<decltype(size)::value>(t, b, block, start + b);
      });
    if (p_.projected) project_h(t, active);
    Buffer<T>::swap(h_[0], h_[1]);
    // A sequence that has ended by the next step keeps its state for leave(), called right after.
  }

  template <int M>
  void run_tile(int64_t t, int64_t b, int64_t block, const T* const* start) {
    // Few rows: several gates at once, for enough independent sums to fill the FMA pipeline.
    constexpr int G = M * 4 <= kTileRows ? 4 : M * 2 <= kTileRows ? 2 : 1;
    alignas(64) T pre[4][M][kPanel<T>];
    const int64_t depth = cell_.hh.depth, panel = depth * kPanel<T>;
    for (int g = 0; g < 4; g += G) {
      Tile<T, G, M> acc;
      for (int j = 0; j < G; ++j)
        for (int m = 0; m < M; ++m)
          for (int v = 0; v < kPanelVecs; ++v)
            acc[j][m][v] = load(start[m] + (block * 4 + g + j) * kPanel<T> + v * kWidth<T>);
      tile_fma<T, G, M, false>(h_[0].get() + b * h_wide_, h_wide_,
                               cell_.hh.data.get() + (block * 4 + g) * panel, panel, depth, acc);
      for (int j = 0; j < G; ++j)
        for (int m = 0; m < M; ++m)
          for (int v = 0; v < kPanelVecs; ++v) store(&pre[g + j][m][v * kWidth<T>], acc[j][m][v]);
    }
    for (int m = 0; m < M; ++m) {
      const int64_t row = rows_.at(t, begin_ + b + m);
      for (int v = 0; v < kPanelVecs; ++v) {
        const int64_t unit = block * kPanel<T> + v * kWidth<T>;
        const int n = int(min_of(kWidth<T>, units_ - unit));
        if (n <= 0) break;
        T* c = c_.get() + (b + m) * padded<T>(units_) + unit;
        const int at = v * kWidth<T>;
        const CellForward<Vec<T>> out =
            cell_forward<Math<T>>(load(&pre[0][m][at]), load(&pre[1][m][at]), load(&pre[2][m][at]),
                                  load(&pre[3][m][at]), load(c));
        store(c, out.c);
        if (p_.projected) {
          store(raw_h_.get() + (b + m) * h_wide_ + unit, out.h);
        } else {
          // The recurrence sees h as the output holds it: rounded to the storage type.
          store(h_[1].get() + (b + m) * h_wide_ + unit, round_to<S>(out.h));
          store_part<S>(y_ + row * y_wide_ + unit, out.h, n);
        }
        if (gates_) {
          S* gates = gates_ + row * 4 * units_ + unit;
          store_part<S>(gates, out.i, n);
          store_part<S>(gates + units_, out.f, n);
          store_part<S>(gates + 2 * units_, out.g, n);
          store_part<S>(gates + 3 * units_, out.o, n);
          store_part<T>(cells_ + row * units_ + unit, out.c, n);
        }
      }
    }
  }

  // h = W_hr (o * tanh(c))
  void project_h(int64_t t, int64_t active) {
    gemm_rows(h_[1].get(), h_wide_, raw_h_.get(), h_wide_, cell_.hr.data.get(), active, units_,
              p_.out_size, false);
    for (int64_t b = 0; b < active; ++b) {
      T* h = h_[1].get() + b * h_wide_;
      S* y = y_ + rows_.at(t, begin_ + b) * y_wide_;
      for (int64_t j = 0; j < p_.out_size; ++j) {
        from_acc(h[j], y[j]);
        h[j] = to_acc(y[j]);
      }
    }
  }

  const Problem& p_;
  const Rows& rows_;
  const LayerInput<S>& input_;
  const ForwardCell<S>& cell_;
  const int layer_, direction_;
  const int64_t begin_, end_, units_, gates_wide_, x_wide_, h_wide_;
  int64_t y_wide_;
  const S* h0_;
  S *h_n_, *c_n_, *gates_, *y_;
  T* cells_;
  Buffer<T> h_[2];  // h before and after the step
  Buffer<T> c_, raw_h_, x_, ahead_;
  Buffer<const T*> start_;
};

template <class S>
void forward(const Forward& f, const Runtime& runtime) {
  const Problem& p = f.problem;
  const Rows rows(p);
  const BatchSplit split(rows, p.rows, runtime.threads);
  for (int layer = 0; layer < p.layers; ++layer) {
    const LayerInput<S> input(p, f.saved, rows, layer);
    const CellWeights* w = p.weights + layer * p.directions;
    const ForwardCell<S> first(p, runtime, w[0], input.width, input.kind);
    if (p.directions == 1) {
      parallel(runtime, split.count, [&](int64_t j) {
        ForwardTask<S>(f, rows, input, first, layer, 0, split.begin(j), split.end(j)).run();
      });
    } else {
      const ForwardCell<S> second(p, runtime, w[1], input.width, input.kind);
      parallel(runtime, 2 * split.count, [&](int64_t j) {
        const int d = int(j % 2);
        ForwardTask<S>(f, rows, input, d ? second : first, layer, d, split.begin(j / 2),
                       split.end(j / 2))
            .run();
      });
    }
  }
}

}  // namespace
}  // namespace fastlstm

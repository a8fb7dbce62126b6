// Forward pass of the stack on the CPU.
//
// Per layer: weights are packed once into panels whose columns go unit block by unit block, and
// within a block gate by gate (i, f, g, o), so that the four pre-activations of a unit come from
// neighbouring panels. A task owns some sequences of the batch in one direction for all steps and
// never meets another task; where there are more threads than tasks, a team works on each and
// divides the units (Division in layer.h). A task projects the input of a few steps at once (up to
// kAheadRows rows, so that W_ih is read once for them and the result stays in cache); then, step by
// step, each tile starts from that projection, adds h_{t-1} W_hh^T and runs the cell on the
// finished tile.
//
// Few rows (a step of a stream) would not pay for packing: there the weights are read as they
// stand, a product of rows at a time, and the units of a step are divided among the threads.
//
// Moves per step and task: W_hh once from cache (4HP elements); h and c stay in the task's scratch.
#pragma once

#include "norm.h"

namespace fastlstm {
namespace {

constexpr int64_t kAheadRows = 192;
// Index input gathers rows of a transposed W_ih, made where it is not larger than this many rows.
constexpr int64_t kTableRows = 4096;
// At most so many rows read the weights where they stand; packing costs about as much as three.
constexpr int64_t kDirectRows = 8;
constexpr int kDirectTile = 4;  // of them at a time
FASTLSTM_INLINE bool runs_direct(const Problem& p) {
  return !p.projected && !p.layer_norm && p.rows <= kDirectRows;
}

template <class S>
struct ForwardCell {
  typedef Acc<S> T;
  typedef Operand<S> E;

  ForwardCell(const Problem& p, const Runtime& runtime, const CellWeights& w, int64_t input_width,
              InputKind kind)
      : norm(p, w) {
    const int64_t units = p.hidden_size;
    if (p.layer_norm) {
      pack_plain_rows(p, runtime, w, input_width, kind);
      return;
    }
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
    auto pack = [&](Panels<E>& to, const void* from, int64_t depth) {
      to.pack_columns(runtime, panels, depth, [=](int64_t panel, int j) {
        const int64_t row = gate_row(panel, j);
        return row < 0 ? nullptr : static_cast<const S*>(from) + row * depth;
      });
    };
    direct = runs_direct(p);
    w_ih = static_cast<const S*>(w.w_ih);
    w_hh = static_cast<const S*>(w.w_hh);
    vocabulary = input_width;
    if (!direct) pack(hh, w.w_hh, p.out_size);
    if (kind == InputKind::dense) {
      if (!direct) pack(ih, w.w_ih, input_width);
    } else {
      if (vocabulary <= min_of(kTableRows, p.rows)) {
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

  // For norm.h: rows of products and the bias in the weights' order.
  void pack_plain_rows(const Problem& p, const Runtime& runtime, const CellWeights& w,
                       int64_t input_width, InputKind kind) {
    const int64_t gates = 4 * p.hidden_size;
    const S *b_ih = static_cast<const S*>(w.b_ih), *b_hh = static_cast<const S*>(w.b_hh);
    bias.reset(gates);
    for (int64_t j = 0; j < gates; ++j) bias[j] = b_ih ? to_acc(b_ih[j]) + to_acc(b_hh[j]) : T(0);
    w_ih = static_cast<const S*>(w.w_ih);
    vocabulary = input_width;
    hh.pack_transposed(runtime, static_cast<const S*>(w.w_hh), p.out_size, gates);
    if (kind == InputKind::dense) ih.pack_transposed(runtime, w_ih, input_width, gates);
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

  const NormWeights<S> norm;
  Panels<E> ih, hh, hr;
  Buffer<T> bias, table;
  bool direct = false;
  const S *w_ih = nullptr, *w_hh = nullptr;
  int64_t vocabulary = 0;
};

template <class S>
class ForwardTask {
 public:
  typedef Acc<S> T;
  typedef Operand<S> E;

  ForwardTask(const Forward& f, const Runtime& runtime, const Rows& rows,
              const LayerInput<S>& input, const ForwardCell<S>& cell, int layer, int direction,
              int64_t begin, int64_t end)
      : p_(f.problem),
        runtime_(runtime),
        team_(f.problem.steps),
        rows_(rows),
        input_(input),
        cell_(cell),
        layer_(layer),
        direction_(direction),
        begin_(begin),
        end_(end),
        units_(p_.hidden_size),
        gates_wide_(p_.layer_norm ? spread<T>(4 * units_) : 4 * padded<T>(units_)),
        x_wide_(spread<E>(input.width)),
        h_wide_(spread<E>(max_of(units_, p_.out_size))),
        rules_(drawn_rules<T>(p_, layer, direction)) {
    const int64_t index = int64_t(layer) * p_.directions + direction;
    const int64_t batch = end - begin;
    h0_ = cell_part<S>(p_.h0, index, p_.batch * p_.out_size);
    h_n_ = cell_part<S>(f.h_n, index, p_.batch * p_.out_size);
    const S* c0 = cell_part<S>(p_.c0, index, p_.batch * units_);
    c_n_ = cell_part<S>(f.c_n, index, p_.batch * units_);
    saved_wide_ = saved_per_unit(p_.layer_norm) * units_;
    gates_ = cell_part<S>(f.saved.gates, index, p_.rows * saved_wide_);
    cells_ = cell_part<T>(f.saved.cells, index, p_.rows * units_);
    y_wide_ = p_.directions * p_.out_size;
    y_ = layer == p_.layers - 1 ? static_cast<S*>(f.saved.output)
                                : static_cast<S*>(f.saved.hidden) + layer * p_.rows * y_wide_;
    y_ += direction * p_.out_size;

    // Zeros: what stands beyond a row's elements is multiplied too (gemm.h).
    for (Buffer<E>& h : h_) h.reset_to_zero(batch * h_wide_);
    c_.reset(batch * padded<T>(units_));
    for (int64_t b = 0; b < batch; ++b) {
      T* c = c_.get() + b * padded<T>(units_);
      for (int64_t j = 0; j < padded<T>(units_); ++j) c[j] = 0;
      if (c0) convert(c, c0 + (begin + b) * units_, units_);
    }
    if (p_.projected) {
      raw_h_.reset_to_zero(batch * h_wide_);
      projected_.reset(batch * h_wide_);
    }
    if (p_.layer_norm) {
      z_.reset(batch * gates_wide_);
      rows_h_.reset(batch * 2 * c_wide());
    }
    const int64_t most = max_of(kAheadRows, batch);
    start_.reset(most);
    ahead_row_.reset(most);
    if (input.kind == InputKind::dense) x_.reset_to_zero(most * x_wide_);
    if (!cell.table.get()) ahead_.reset(most * gates_wide_);
    enter(0);
  }

  // Any number of threads may call this: they form a team.
  void run() {
    team_.work([&](int64_t s, int member) { advance(s, member); }, [&](int64_t s) { leave(s); });
  }

 private:
  int64_t c_wide() const { return padded<T>(units_); }
  int64_t time(int64_t s) const { return direction_ == 0 ? s : p_.steps - 1 - s; }
  // How many of this task's sequences take part in step s.
  int64_t count(int64_t s) const {
    return s < p_.steps ? max_of(0, min_of(end_, rows_.active(time(s))) - begin_) : 0;
  }

  // Before step s: the states of the sequences that begin with it, and the rows to project.
  void enter(int64_t s) {
    for (; entered_ < count(s); ++entered_) {
      const S* from = h0_ ? h0_ + (begin_ + entered_) * p_.out_size : nullptr;
      if (from) convert(h_[0].get() + entered_ * h_wide_, from, p_.out_size);
    }
    projects_ = count(s) > 0 && row_ == ahead_rows_;
    if (!projects_) return;
    row_ = ahead_rows_ = 0;
    for (; s < p_.steps; ++s) {
      const int64_t active = count(s);
      if (ahead_rows_ > 0 && ahead_rows_ + active > kAheadRows) break;
      for (int64_t b = 0; b < active; ++b)
        ahead_row_[ahead_rows_++] = rows_.at(time(s), begin_ + b);
    }
  }

  // After step s: its h is the next step's, and the states of the sequences that end with it.
  void leave(int64_t s) {
    const int64_t active = count(s);
    Buffer<E>::swap(h_[0], h_[1]);
    for (int64_t b = count(s + 1); b < active; ++b) {
      convert(h_n_ + (begin_ + b) * p_.out_size, h_[0].get() + b * h_wide_, p_.out_size);
      convert(c_n_ + (begin_ + b) * units_, c_.get() + b * padded<T>(units_), units_);
    }
    row_ += active;
    enter(s + 1);
  }

  // Pre-activations from the input for the rows ahead; start_[r] points at row r's.
  void project(int member) {
    const bool dense = input_.kind == InputKind::dense;
    team_.share_ranges(member, ahead_rows_, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        T* own = ahead_.get() ? ahead_.get() + n * gates_wide_ : nullptr;
        if (dense) {
          E* x = x_.get() + n * x_wide_;
          input_.load(x, ahead_row_[n], 0, input_.width);
          if (cell_.direct) memcpy(own, cell_.bias.get(), size_t(gates_wide_) * sizeof(T));
        } else if (p_.layer_norm) {
          const S* column = cell_.w_ih + input_.index(ahead_row_[n]);
          for (int64_t j = 0; j < 4 * units_; ++j) own[j] = to_acc(column[j * cell_.vocabulary]);
        } else if (own) {
          cell_.gather(own, input_.index(ahead_row_[n]), units_);
        }
        start_[n] = own ? own : cell_.table.get() + input_.index(ahead_row_[n]) * gates_wide_;
      }
    });
    team_.meet();
    if (dense && !cell_.direct) {
      const int64_t panels = p_.layer_norm ? panels_of<T>(4 * units_) : gates_wide_ / kPanel<T>;
      team_.share_ranges(member, panels, [&](int64_t first, int64_t last) {
        gemm_rows(ahead_.get() + first * kPanel<T>, gates_wide_, x_.get(), x_wide_,
                  cell_.ih.panel(first), ahead_rows_, input_.width, (last - first) * kPanel<T>,
                  p_.layer_norm ? Start<T>{} : Start<T>{cell_.bias.get() + first * kPanel<T>, 0});
      });
      team_.meet();
    }
    if (p_.layer_norm) normalise_input(member);
  }

  void normalise_input(int member) {
    const int64_t count = 4 * units_;
    team_.share_ranges(member, ahead_rows_, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        T* own = ahead_.get() + n * gates_wide_;
        if (gates_) convert(gates_ + ahead_row_[n] * saved_wide_ + count, own, count);
        write_normed(own, own, cell_.norm.ih.get(), cell_.bias.get(), count);
      }
    });
    team_.meet();
  }

  // One member's part of step s.
  void advance(int64_t s, int member) {
    const int64_t t = time(s), active = count(s);
    if (active == 0) return;
    if (projects_) project(member);
    if (p_.layer_norm) return advance_normed(t, active, member);
    const int64_t blocks = panels_of<T>(units_);
    if (cell_.direct) {
      // So few steps that a team would hardly have met: threads for each of them.
      const int64_t work = 4 * active * units_ * (units_ + input_.width);
      parallel_if_worth(runtime_, work, blocks, [&](int64_t block) {
        for_even_blocks(active, kDirectTile, [&](int rows, int64_t b) {
          with_rows<kDirectTile>(
              rows, [&](auto size) { run_direct<decltype(size)::value>(t, b, block); });
        });
      });
    } else {
      team_.share(member, blocks, [&](int64_t block) {
        for_row_blocks(active, [&](int rows, int64_t b) { run_tile(t, b, block, rows); });
      });
    }
    if (p_.projected) project_h(t, active, member);
  }

  // The same with layer normalisation: whole rows of W_hh h first.
  void advance_normed(int64_t t, int64_t active, int member) {
    const int64_t count = 4 * units_;
    team_.share_ranges(member, panels_of<T>(count), [&](int64_t first, int64_t last) {
      gemm_rows(z_.get() + first * kPanel<T>, gates_wide_, h_[0].get(), h_wide_,
                cell_.hh.panel(first), active, units_, (last - first) * kPanel<T>, {});
    });
    team_.meet();
    team_.share_ranges(member, active, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        const int64_t row = rows_.at(t, begin_ + b);
        const T* z = z_.get() + b * gates_wide_;
        T *h = rows_h_.get() + b * 2 * c_wide(), *c = c_.get() + b * c_wide();
        S* saved = gates_ ? gates_ + row * saved_wide_ : nullptr;
        norm_forward<S>(cell_.norm, ahead_.get() + (row_ + b) * gates_wide_, z, c, h + c_wide(), h,
                        h_[0].get() + b * h_wide_, rules_, rules_.row(t, begin_ + b), units_,
                        saved);
        S* y = y_ + row * y_wide_;
        convert(y, h, units_);
        convert(h_[1].get() + b * h_wide_, y, units_);  // as the output holds it
        if (!saved) continue;
        convert(saved + 2 * count, z, count);
        convert(cells_ + row * units_, c, units_);
      }
    });
  }

  void run_tile(int64_t t, int64_t b, int64_t block, int rows) {
    alignas(64) T pre[4][kTileRows][kPanel<T>];
    multiply_gates(pre, h_[0].get() + b * h_wide_, h_wide_, cell_.hh.panel(block * 4),
                   cell_.hh.stored * kPanel<T>, cell_.hh.depth, rows);
    run_cells(t, b, block, pre, rows);
  }

  // The same from weights as they stand.
  template <int M>
  void run_direct(int64_t t, int64_t b, int64_t block) {
    static_assert(kDirectTile <= kTileRows, "rows of a block");
    // Rows of weights at a time.
    constexpr int R = 2 * kDirectTile / M < kPanel<T> ? 2 * kDirectTile / M : kPanel<T>;
    alignas(64) T pre[4][kTileRows][kPanel<T>];
    const int64_t first = block * kPanel<T>, depth = units_;
    const int n = int(min_of(kPanel<T>, units_ - first));
    for (int g = 0; g < 4; ++g) {
      for (int m = 0; m < M; ++m) memset(pre[g][m], 0, sizeof pre[g][m]);
      auto add = [&](auto count, int j) {
        constexpr int N = decltype(count)::value;
        T sums[N][M] = {};
        const int64_t row = g * units_ + first + j;
        row_products<S, N, M>(sums, cell_.w_hh + row * depth, depth, h_[0].get() + b * h_wide_,
                              h_wide_, depth);
        if (input_.kind == InputKind::dense)
          row_products<S, N, M>(sums, cell_.w_ih + row * input_.width, input_.width,
                                x_.get() + (row_ + b) * x_wide_, x_wide_, input_.width);
        for (int r = 0; r < N; ++r)
          for (int m = 0; m < M; ++m) pre[g][m][j + r] += sums[r][m];
      };
      int j = 0;
      for (; j + R <= n; j += R) add(Int<R>{}, j);
      for (; j < n; ++j) add(Int<1>{}, j);
    }
    run_cells(t, b, block, pre, M);
  }

  // The cells of a block of units and some sequences, from h's part of their pre-activations.
  void run_cells(int64_t t, int64_t b, int64_t block, const T (*pre)[kTileRows][kPanel<T>],
                 int rows) {
    if (rules_.plain)
      run_cells_by<false>(t, b, block, pre, rows);
    else
      run_cells_by<true>(t, b, block, pre, rows);
  }

  template <bool kRules>
  void run_cells_by(int64_t t, int64_t b, int64_t block, const T (*pre)[kTileRows][kPanel<T>],
                    int rows) {
    typedef Pick<kRules, Vec<T>, Twice<Vec<T>>> V;
    typedef Elements<V> Own;
    constexpr int kAll = kLanes<T, V>;
    for (int m = 0; m < rows; ++m) {
      const int64_t row = rows_.at(t, begin_ + b + m);
      const T* start = start_[row_ + b + m] + block * 4 * kPanel<T>;
      const RuleRow drawn = kRules ? rules_.row(t, begin_ + b + m) : RuleRow{};
      for (int at = 0; at < kPanel<T>; at += kAll) {
        const int64_t unit = block * kPanel<T> + at;
        const int n = int(min_of(kAll, units_ - unit));
        if (n <= 0) break;
        T* c = c_.get() + (b + m) * padded<T>(units_) + unit;
        auto gate = [&](int g) {
          return Own::read(start + g * kPanel<T> + at, kAll) + Own::read(&pre[g][m][at], kAll);
        };
        const V a_i = gate(0), a_f = gate(1), a_g = gate(2), a_o = gate(3);
        const V before = Own::read(c, kAll);
        CellForward<V> out;
        if constexpr (kRules) {
          const V h = load_as<E>(h_[0].get() + (b + m) * h_wide_ + unit);
          out = cell_forward<Math<T>>(a_i, a_f, a_g, a_o, before, h, rules_of(rules_, drawn, unit));
        } else {
          out = cell_forward<MathOf<T, V>>(a_i, a_f, a_g, a_o, before);
        }
        Own::write(c, out.c, kAll);
        if (p_.projected) {
          Own::write(raw_h_.get() + (b + m) * h_wide_ + unit, out.h, kAll);
        } else {
          // The recurrence sees h as the output holds it: rounded to the storage type.
          Own::write(h_[1].get() + (b + m) * h_wide_ + unit, Own::template rounded<S>(out.h), kAll);
          Own::write(y_ + row * y_wide_ + unit, out.h, n);
        }
        if (gates_) {
          S* gates = gates_ + row * 4 * units_ + unit;
          Own::write(gates, out.i, n);
          Own::write(gates + units_, out.f, n);
          Own::write(gates + 2 * units_, out.g, n);
          Own::write(gates + 3 * units_, out.o, n);
          Own::write(cells_ + row * units_ + unit, out.c, n);
        }
      }
    }
  }

  // h = W_hr (o * tanh(c))
  void project_h(int64_t t, int64_t active, int member) {
    team_.meet();
    team_.share_ranges(member, panels_of<T>(p_.out_size), [&](int64_t first, int64_t last) {
      const int64_t begin = first * kPanel<T>, n = min_of(p_.out_size, last * kPanel<T>) - begin;
      gemm_rows(projected_.get() + begin, h_wide_, raw_h_.get(), h_wide_, cell_.hr.panel(first),
                active, units_, n, {});
      for (int64_t b = 0; b < active; ++b) {
        E* h = h_[1].get() + b * h_wide_ + begin;
        S* y = y_ + rows_.at(t, begin_ + b) * y_wide_ + begin;
        convert(y, projected_.get() + b * h_wide_ + begin, n);
        convert(h, y, n);
      }
    });
  }

  const Problem& p_;
  const Runtime& runtime_;
  Team team_;
  const Rows& rows_;
  const LayerInput<S>& input_;
  const ForwardCell<S>& cell_;
  const int layer_, direction_;
  const int64_t begin_, end_, units_, gates_wide_, x_wide_, h_wide_;
  const DrawnRules<T> rules_;
  int64_t y_wide_, saved_wide_;
  const S* h0_;
  S *h_n_, *c_n_, *gates_, *y_;
  T* cells_;
  Buffer<E> h_[2];  // h before and after the step
  Buffer<E> raw_h_, x_;
  Buffer<T> c_, projected_, ahead_;
  Buffer<T> z_, rows_h_;  // layer norm: W_hh h; rows of norm_forward
  Buffer<const T*> start_;
  Buffer<int64_t> ahead_row_;
  // Sequences that have begun; rows ahead, the first of them that the step reads, and whether it
  // projects them before.
  int64_t entered_ = 0, ahead_rows_ = 0, row_ = 0;
  bool projects_ = false;
};

template <class S>
void forward(const Forward& f, const Runtime& runtime) {
  const Problem& p = f.problem;
  const Rows rows(p);
  for (int layer = 0; layer < p.layers; ++layer) {
    const LayerInput<S> input(p, f.saved, rows, layer);
    const int64_t work = p.directions * p.rows * 4 * p.hidden_size * (p.hidden_size + input.width);
    const Division division(p, runs_direct(p) ? 1 : runtime.threads, work, sizeof(Operand<S>));
    const BatchSplit split(rows, p.rows, division.parts);
    List<ForwardCell<S>> cells(p.directions);
    for (int d = 0; d < p.directions; ++d)
      cells.add(p, runtime, p.weights[layer * p.directions + d], input.width, input.kind);
    List<ForwardTask<S>> tasks(split.count * p.directions);
    for (int64_t j = 0; j < split.count; ++j)
      for (int d = 0; d < p.directions; ++d)
        tasks.add(f, runtime, rows, input, cells[d], layer, d, split.begin(j), split.end(j));
    run_teams(runtime, division, tasks.count(), [&](int64_t j) { tasks[j].run(); });
  }
}

}  // namespace
}  // namespace fastlstm

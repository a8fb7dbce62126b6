// Backward pass of the stack on the CPU, layer by layer from the last.
//
// A layer goes back through time in chunks of steps, whose dgates (the gradients of the four
// pre-activations) stay in cache. For each chunk:
//   1. Its steps. As in forward, a task has some sequences in one direction, and a team may work on
//      it. A step turns the gradients of h and c into dgates and multiplies them by W_hh, which
//      gives the gradient of h of the step before.
//   2. The gradients of the input and of the weights (gradient_part.h).
// The workspace is one chunk and the sums of gradients, whatever T is. The order of every sum is
// independent of threads.
#pragma once

#include "division.h"
#include "gradient_part.h"

namespace fastlstm {
namespace {

// The weights of a pseudo-layer as the steps backward read them.
template <class S>
struct BackwardWeights {
  BackwardWeights(const Problem& p, const Runtime& runtime, const LayerWeights& weights)
      : norm(p, weights) {
    hh.pack_row_major(runtime, static_cast<const S*>(weights.w_hh), 4 * p.hidden_size, p.out_size);
    if (p.projected)
      hr.pack_row_major(runtime, static_cast<const S*>(weights.w_hr), p.out_size, p.hidden_size);
  }

  Panels<Operand<S>> hh, hr;
  NormWeights<S> norm;
};

template <class S>
class BackwardTask {
 public:
  typedef Acc<S> T;
  typedef Operand<S> E;

  // grad_y: gradient of the layer's output before dropout, (rows, directions * P), or null.
  BackwardTask(const Backward& f, const Rows& rows, const S* grad_y,
               const BackwardWeights<S>& weights, const Chunk<E>& chunk,
               const PseudoLayer<S>& layer, const Sequences& sequences)
      : p_(f.problem),
        rows_(rows),
        weights_(weights),
        chunk_(chunk),
        layer_(layer),
        sequences_(sequences),
        units_(p_.hidden_size),
        h_stride_(row_stride<T>(p_.out_size)),
        c_stride_(padded<T>(units_)),
        rules_(drawn_rules<T>(p_, layer.layer, layer.direction)),
        grad_y_(grad_y ? grad_y + layer.direction * p_.out_size : nullptr),
        grad_cell_states_(layer.template part<T>(f.grad_cell_states, p_.rows * units_)),
        grad_h0_(layer.states(f.grad_h0, p_.out_size)),
        grad_c0_(layer.states(f.grad_c0, units_)) {
    const int64_t batch = sequences.count();
    if (p_.projected) unprojected_dh_.reset(batch * c_stride_);
    if (p_.layer_norm) norm_scratch_.reset(batch * norm_scratch_stride());
    load_states(dh_, h_stride_, layer.states(f.grad_h_n, p_.out_size), p_.out_size);
    load_states(dc_, c_stride_, layer.states(f.grad_c_n, units_), units_);
    load_states(c0_, c_stride_, layer.states(p_.c0, units_), units_);
  }

  // Steps [first, last) of this direction are next, the last one first, by so many threads.
  void begin_chunk(int64_t first, int64_t last, int64_t members) {
    last_step_ = last;
    team_.begin(last - first, members);
  }

  // Any number of threads may call this: they form a team.
  void run() {
    team_.run([&](int64_t j, Team::Member& member) { run_step(last_step_ - 1 - j, member); });
  }

  // After all steps.
  void write_states() const {
    write_states(grad_h0_, dh_, h_stride_, p_.out_size);
    write_states(grad_c0_, dc_, c_stride_, units_);
  }

 private:
  int64_t norm_scratch_stride() const { return row_stride<T>(norm_scratch(units_)); }

  // Rows of n elements for each sequence, zero-padded to the stride; zeros where `from` is null.
  void load_states(Buffer<T>& to, int64_t stride, const S* from, int64_t n) const {
    to.reset(sequences_.count() * stride);
    for (int64_t b = 0; b < sequences_.count(); ++b) {
      T* row = to.get() + b * stride;
      for (int64_t j = 0; j < stride; ++j) row[j] = 0;
      if (from) convert(row, from + (sequences_.begin + b) * n, n);
    }
  }
  void write_states(S* to, const Buffer<T>& from, int64_t stride, int64_t n) const {
    if (to == nullptr) return;
    for (int64_t b = 0; b < sequences_.count(); ++b)
      for (int64_t j = 0; j < n; ++j)
        from_acc(from[b * stride + j], to[(sequences_.begin + b) * n + j]);
  }

  // Calls f(panel, first column, number of columns) for ranges of columns that are this member's.
  template <class F>
  void share_columns(Team::Member& member, int64_t columns, F&& f) {
    team_.share_ranges(member, panels_of<T>(columns), [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kPanel<T>;
      f(begin, first, min_of(columns, end * kPanel<T>) - first);
    });
  }

  // One member's share of step s.
  void run_step(int64_t s, Team::Member& member) {
    const int64_t t = layer_.time(s);
    const int64_t active = max_of(0, min_of(sequences_.end, rows_.active(t)) - sequences_.begin);
    if (active == 0) return;
    const int64_t first = rows_.at(t, sequences_.begin);
    if (p_.projected) {
      share_columns(member, p_.out_size, [&](int64_t, int64_t begin, int64_t n) {
        add_grad_y(first, active, begin, n);
        for (int64_t b = 0; b < active; ++b)
          convert(chunk_.dh_row(first + b) + begin, dh_.get() + b * h_stride_ + begin, n);
      });
    }
    if (p_.layer_norm)
      team_.share_ranges(member, active, [&](int64_t begin, int64_t end) {
        add_grad_y(first + begin, end - begin, 0, units_, begin);
        for (int64_t b = begin; b < end; ++b) run_normed(t, b, first + b);
      });
    else
      share_columns(member, units_, [&](int64_t panel, int64_t begin, int64_t n) {
        run_cells(t, first, active, panel, begin, n);
      });
    if (s == 0 && !grad_h0_) return;
    // Zoneout's part of the gradient of h is already in dh.
    const bool add = p_.cell.zoneout_h > 0;
    share_columns(member, p_.out_size, [&](int64_t panel, int64_t begin, int64_t n) {
      T* dh = dh_.get() + begin;
      gemm_rows(dh, h_stride_, chunk_.gates_row(chunk_.to_hidden(), first), chunk_.gates_stride,
                weights_.hh.panel(panel), active, 4 * units_, n,
                add ? Addend<T>{dh, h_stride_} : Addend<T>{});
    });
  }

  // c of sequence b before step t.
  const T* previous_cell_state(int64_t t, int64_t b) const {
    const int64_t before = layer_.before(t), sequence = sequences_.begin + b;
    return sequence < rows_.active(before)
               ? layer_.cell_states + rows_.at(before, sequence) * units_
               : c0_.get() + b * c_stride_;
  }

  void run_normed(int64_t t, int64_t b, int64_t row) const {
    NormBackwardRow<S> args;
    args.saved = layer_.gates + row * layer_.gates_stride;
    args.c_prev = previous_cell_state(t, b);
    args.grad_c = grad_cell_states_ ? grad_cell_states_ + row * units_ : nullptr;
    args.dh = dh_.get() + b * h_stride_;
    args.dc = dc_.get() + b * c_stride_;
    args.scratch = norm_scratch_.get() + b * norm_scratch_stride();
    args.da = chunk_.gates_row(chunk_.dgates, row);
    args.dz_x = chunk_.gates_row(chunk_.dz_x, row);
    args.dz_h = chunk_.gates_row(chunk_.dz_h, row);
    args.terms = chunk_.terms.get() + (row - chunk_.first) * norm_terms(units_);
    args.keys = rules_.row(t, sequences_.begin + b);
    norm_backward(weights_.norm, rules_, units_, args);
  }

  // Units [begin, begin + n) of all rows of the step. panel: where they begin in W_hr.
  void run_cells(int64_t t, int64_t first, int64_t active, int64_t panel, int64_t begin,
                 int64_t n) {
    if (p_.projected)
      gemm_rows(unprojected_dh_.get() + begin, c_stride_, chunk_.dh_row(first), chunk_.dh_stride,
                weights_.hr.panel(panel), active, p_.out_size, n, {});
    else
      add_grad_y(first, active, begin, n);
    for (int64_t b = 0; b < active; ++b) {
      if (b + kPrefetchRows < active) prefetch_row(t, b + kPrefetchRows, begin, n);
      const T* c_prev = previous_cell_state(t, b);
      T* dh = p_.projected ? unprojected_dh_.get() + b * c_stride_ : dh_.get() + b * h_stride_;
      T* dc = dc_.get() + b * c_stride_;
      if (rules_.plain)
        run_row<false>(first + b, c_prev, dh, dc, begin, begin + n);
      else
        run_row<true>(first + b, c_prev, dh, dc, begin, begin + n);
    }
  }

  // Prefetches what the cells of a later row read: a member's part of a row is too short for the
  // hardware prefetcher.
  static constexpr int64_t kPrefetchRows = 3;
  void prefetch_row(int64_t t, int64_t b, int64_t begin, int64_t n) const {
    const S* gates =
        layer_.gates + rows_.at(t, sequences_.begin + b) * kSavedGates * units_ + begin;
    for (int g = 0; g < 4; ++g) prefetch(gates + g * units_, n);
    prefetch(previous_cell_state(t, b) + begin, n);
  }

  // Adds columns [begin, begin + n) of `rows` rows to dh. The first row is sequence b's.
  void add_grad_y(int64_t first, int64_t rows, int64_t begin, int64_t n, int64_t b = 0) {
    if (grad_y_ == nullptr) return;
    for (int64_t j = 0; j < rows; ++j) {
      const S* from = grad_y_ + (first + j) * layer_.output_stride + begin;
      T* to = dh_.get() + (b + j) * h_stride_ + begin;
      for (int64_t k = 0; k < n; ++k) to[k] += to_acc(from[k]);
    }
  }

  // Units [begin, end) of a row: dh and dc to dgates and the dc of the step before.
  template <bool kRules>
  void run_row(int64_t row, const T* c_prev, T* dh, T* dc, int64_t begin, int64_t end) const {
    typedef CellVector<T, kRules> V;
    typedef Elements<V> At;
    constexpr int kUnits = kLanes<T, V>;
    const RuleRow keys = kRules ? rules_.row(rows_.t(row), rows_.b(row)) : RuleRow{};
    const S* gates = layer_.gates + row * kSavedGates * units_;
    const T* c = layer_.cell_states + row * units_;
    E* dgates = chunk_.gates_row(chunk_.dgates, row);
    for (int64_t unit = begin; unit < end; unit += kUnits) {
      const int n = int(min_of(kUnits, end - unit));
      V dc_in = At::read(dc + unit, kUnits);
      if (grad_cell_states_) dc_in = dc_in + At::read(grad_cell_states_ + row * units_ + unit, n);
      const Gates<V> x = load_gates<V>(gates + unit, units_, n);
      const V before = At::read(c_prev + unit, n), after = At::read(c + unit, n),
              dh_in = At::read(dh + unit, kUnits);
      CellBackward<V> d;
      if constexpr (kRules) {
        d = cell_backward<Math<T>>(x.i, x.f, x.g, x.o, before, after, dh_in, dc_in,
                                   rules_of(rules_, keys, unit));
        if (!p_.projected) store(dh + unit, d.h_prev);
      } else {
        d = cell_backward<MathOf<T, V>>(x.i, x.f, x.g, x.o, before, after, dh_in, dc_in);
      }
      store_gates<V>(dgates + unit, units_, n, {d.a_i, d.a_f, d.a_g, d.a_o});
      At::write(dc + unit, d.c_prev, kUnits);
    }
  }

  const Problem& p_;
  Team team_{0, 1};
  int64_t last_step_ = 0;
  const Rows& rows_;
  const BackwardWeights<S>& weights_;
  const Chunk<E>& chunk_;
  const PseudoLayer<S> layer_;
  const Sequences sequences_;
  const int64_t units_, h_stride_, c_stride_;
  const DrawnRules<T> rules_;
  const S* const grad_y_;
  const T* const grad_cell_states_;
  S *const grad_h0_, *const grad_c0_;
  Buffer<T> dh_, dc_, c0_;
  Buffer<T> unprojected_dh_;  // with a projection: the gradient of h before it
  Buffer<T> norm_scratch_;
};

// One layer. grad_y and grad_x may be the same: a row of grad_x is written after grad_y's is read.
template <class S>
void backward_layer(const Backward& f, const Runtime& runtime, const Rows& rows, int layer,
                    const S* grad_y, S* grad_x) {
  const Problem& p = f.problem;
  const LayerInput<S> input(p, f.saved, rows, layer);
  List<BackwardWeights<S>> weights(p.directions);
  for (int d = 0; d < p.directions; ++d)
    weights.add(p, runtime, p.weights[layer * p.directions + d]);
  GradientPart<S> gradients(f, runtime, rows, input, layer, grad_x);
  const int64_t work = p.directions * p.rows * 4 * p.hidden_size * p.out_size;
  const Division division(p, kCosts, runtime.threads, work, sizeof(Operand<S>));
  const BatchSplit split(rows, p.rows, division.parts);
  List<BackwardTask<S>> tasks(p.directions * split.count);
  for (int64_t j = 0; j < split.count; ++j)
    for (int d = 0; d < p.directions; ++d)
      tasks.add(f, rows, grad_y, weights[d], gradients.chunk(d),
                PseudoLayer<S>(p, f.saved, layer, d), split.part(j));
  for (int64_t last = p.steps, first; last > 0; last = first) {
    first = gradients.begin_chunk(last);
    for (int64_t j = 0; j < tasks.count(); ++j) tasks[j].begin_chunk(first, last, division.members);
    run_teams(runtime, division, tasks.count(), [&](int64_t j) { tasks[j].run(); });
    gradients.add_chunk();
  }
  gradients.write();
  for (int64_t j = 0; j < tasks.count(); ++j) tasks[j].write_states();
}

template <class S>
void backward(const Backward& f, const Runtime& runtime) {
  const Problem& p = f.problem;
  const Rows rows(p);
  // Between two layers: the gradient of the lower one's output.
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

// Forward pass of the stack on the CPU, layer by layer.
//
// A task runs all steps of some sequences of the batch in one direction; a team of threads may work
// on it (division.h). It computes the input's part of the pre-activations of a few steps at once
// (input_part.h). Then, step by step, each tile of units and sequences multiplies h_{t-1} by W_hh
// and runs the cells on the result while it is in cache (forward_cells.h).
//
// Memory traffic of a step and task: W_hh once from cache (4HP elements); h and c stay in the
// task's scratch.
#pragma once

#include "division.h"
#include "forward_cells.h"
#include "gemm.h"
#include "input_part.h"
#include "packed_stack.h"
#include "row_products.h"

namespace fastlstm {
namespace {

template <class S>
class ForwardTask {
 public:
  typedef Acc<S> T;
  typedef Operand<S> E;

  ForwardTask(const Forward& f, const Runtime& runtime, const Rows& rows,
              const LayerInput<S>& input, const ForwardWeights<S>& weights,
              const PseudoLayer<S>& layer, const Sequences& sequences, int64_t members)
      : p_(f.problem),
        runtime_(runtime),
        rows_(rows),
        layer_(layer),
        sequences_(sequences),
        units_(p_.hidden_size),
        input_width_(input.dense() ? input.width : 0),
        weights_(weights),
        input_part_(p_, input, weights, sequences.count(), saved_input_part(), layer.gates_stride),
        cells_(f, rows, layer, sequences),
        team_(p_.steps, members) {
    if (p_.projected) product_.reset(sequences.count() * cells_.h_stride());
    if (p_.layer_norm) product_.reset(sequences.count() * weights.gates_stride);
    begin_step(0);
  }

  // Any number of threads may call this: they form a team.
  void run() {
    team_.run([&](int64_t s, Team::Member& member) { run_step(s, member); });
  }

 private:
  // With layer normalisation W_ih x is saved behind the gates (lstm.h).
  S* saved_input_part() const {
    return layer_.gates && p_.layer_norm ? layer_.gates + kSavedGates * units_ : nullptr;
  }

  // How many of this task's sequences take part in step s: the first ones, as they are the longest.
  int64_t count(int64_t s) const {
    if (s >= p_.steps) return 0;
    return max_of(0, min_of(sequences_.end, rows_.active(layer_.time(s))) - sequences_.begin);
  }

  // Before step s: the sequences that begin with it, and the rows of the input to be multiplied.
  void begin_step(int64_t s) {
    for (; begun_ < count(s); ++begun_) cells_.begin_sequence(s, begun_);
    if (count(s) == 0 || s < input_part_.last_step()) return;
    input_part_.begin(s);
    for (; s < p_.steps && input_part_.fits(count(s)); ++s)
      input_part_.add_step(rows_.at(layer_.time(s), sequences_.begin), count(s));
  }

  // Whether a sequence begins or ends between step s and the next, or more input is multiplied.
  bool changes(int64_t s) const {
    return count(s + 1) != count(s) || (count(s) > 0 && s + 1 == input_part_.last_step());
  }
  // After step s: the sequences that end with it, and what comes before the next.
  void end_step(int64_t s) {
    for (int64_t b = count(s + 1); b < count(s); ++b) cells_.end_sequence(s, b);
    begin_step(s + 1);
  }

  // One member's share of step s.
  void run_step(int64_t s, Team::Member& member) {
    const bool ends = changes(s);  // end_step() alters what this reads
    if (count(s) > 0) run_active(s, count(s), member);
    if (ends) team_.share(member, 1, [&](int64_t) { end_step(s); });
  }

  void run_active(int64_t s, int64_t active, Team::Member& member) {
    if (s == input_part_.first_step()) input_part_.multiply_input(team_, member);
    if (p_.layer_norm) return run_normed(s, active, member);
    if (weights_.direct) return run_direct(s, active);
    team_.share(member, panels_of<T>(units_), [&](int64_t block) {
      for_row_blocks(active, [&](int rows, int64_t b) { run_tile(s, b, rows, block); });
    });
    if (p_.projected) project_h(s, active, member);
  }

  // A tile of gates and its cells.
  void run_tile(int64_t s, int64_t b, int rows, int64_t block) {
    GateTile<T> tile;
    multiply_h(s, b, rows, weights_.hh, block, tile);
    run_cells(s, b, rows, block, tile);
  }

  // h's part of a tile. block: of hh, which may hold one block alone.
  void multiply_h(int64_t s, int64_t b, int rows, const Panels<E>& hh, int64_t block,
                  GateTile<T>& tile) const {
    multiply_gates(tile.gates, cells_.h(s, b), cells_.h_stride(), hh.panel(block * 4),
                   hh.stored * kPanel<T>, hh.depth, rows);
  }

  void run_cells(int64_t s, int64_t b, int rows, int64_t block, GateTile<T>& tile) {
    for (int m = 0; m < rows; ++m)
      tile.input_part[m] = input_part_.start(s, b + m) + block * 4 * kPanel<T>;
    cells_.run(s, b, rows, block, tile);
  }

  // The same from weights as they are in memory. A team does not pay for so few steps: instead the
  // units of each step are divided among threads.
  static constexpr int kDirectTile = 4, kMostDirectRows = 4;  // rows
  void run_direct(int64_t s, int64_t active) {
    const int64_t weights = 4 * units_ * (units_ + input_width_);
    const EvenTeam team(kCosts, worthwhile_threads(runtime_.threads, weights * active), weights,
                        active, sizeof(S), 1);
    const Runtime runtime = {int(team.members), runtime_.parallel};
    parallel(runtime, panels_of<T>(units_), [&](int64_t block) {
      if (active > kMostDirectRows) return run_block(s, active, block);
      for_even_blocks(active, kDirectTile, [&](int rows, int64_t b) {
        with_rows<kDirectTile>(
            rows, [&](auto size) { run_direct_tile<decltype(size)::value>(s, b, block); });
      });
    });
  }

  // A block of units whose weights are packed for this step alone: they stay in the core's cache.
  void run_block(int64_t s, int64_t active, int64_t block) {
    constexpr int64_t kGates = 4 * kPanel<T>;
    Panels<E> hh, ih;
    weights_.pack_block(hh, weights_.w_hh, units_, block);
    Buffer<T> input_part(active * kGates);
    if (input_width_ > 0) {
      weights_.pack_block(ih, weights_.w_ih, input_width_, block);
      gemm_rows(input_part.get(), kGates, input_part_.x(s, 0), input_part_.x_stride(), ih.panel(0),
                active, input_width_, kGates, Addend<T>{weights_.bias.get() + block * kGates, 0});
    }
    for_row_blocks(active, [&](int rows, int64_t b) {
      GateTile<T> tile;
      multiply_h(s, b, rows, hh, 0, tile);
      if (input_width_ == 0) return run_cells(s, b, rows, block, tile);
      for (int m = 0; m < rows; ++m) tile.input_part[m] = input_part.get() + (b + m) * kGates;
      cells_.run(s, b, rows, block, tile);
    });
  }

  template <int M>
  void run_direct_tile(int64_t s, int64_t b, int64_t block) {
    static_assert(kDirectTile <= kTileRows, "a tile has so many rows");
    // How many rows of weights are multiplied at once: enough sums to hide the latency.
    constexpr int kRows = (2 * kDirectTile + M - 1) / M, R = kRows < kPanel<T> ? kRows : kPanel<T>;
    GateTile<T> tile;
    const int64_t first = block * kPanel<T>, depth = units_;
    const int n = int(min_of(kPanel<T>, units_ - first));
    for (int g = 0; g < 4; ++g) {
      for (int m = 0; m < M; ++m) memset(tile.gates[g][m], 0, sizeof tile.gates[g][m]);
      auto multiply = [&](auto count, int j) {
        constexpr int N = decltype(count)::value;
        T sums[N][M] = {};
        const int64_t row = g * units_ + first + j;
        row_products<S, N, M>(sums, weights_.w_hh + row * depth, depth, cells_.h(s, b),
                              cells_.h_stride(), depth);
        if (input_width_ > 0)
          row_products<S, N, M>(sums, weights_.w_ih + row * input_width_, input_width_,
                                input_part_.x(s, b), input_part_.x_stride(), input_width_);
        for (int r = 0; r < N; ++r)
          for (int m = 0; m < M; ++m) tile.gates[g][m][j + r] += sums[r][m];
      };
      int j = 0;
      for (; j + R <= n; j += R) multiply(Int<R>{}, j);
      for (; j < n; ++j) multiply(Int<1>{}, j);
    }
    run_cells(s, b, M, block, tile);
  }

  // With a projection: h = W_hr (o * tanh(c)).
  void project_h(int64_t s, int64_t active, Team::Member& member) {
    const int64_t stride = cells_.h_stride();
    team_.share_ranges(member, panels_of<T>(p_.out_size), [&](int64_t first, int64_t last) {
      const int64_t begin = first * kPanel<T>, n = min_of(p_.out_size, last * kPanel<T>) - begin;
      T* product = product_.get() + begin;
      gemm_rows(product, stride, cells_.unprojected_h(), stride, weights_.hr.panel(first), active,
                units_, n, {});
      for (int64_t b = 0; b < active; ++b) cells_.write_h(s, b, begin, product + b * stride, n);
    });
  }

  // With layer normalisation: W_hh h of whole rows first, for their moments.
  void run_normed(int64_t s, int64_t active, Team::Member& member) {
    const int64_t stride = weights_.gates_stride;
    team_.share_ranges(member, panels_of<T>(4 * units_), [&](int64_t first, int64_t last) {
      gemm_rows(product_.get() + first * kPanel<T>, stride, cells_.h(s, 0), cells_.h_stride(),
                weights_.hh.panel(first), active, units_, (last - first) * kPanel<T>, {});
    });
    team_.share_ranges(member, active, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b)
        cells_.run_normed(weights_.norm, s, b, input_part_.start(s, b),
                          product_.get() + b * stride);
    });
  }

  const Problem& p_;
  const Runtime& runtime_;
  const Rows& rows_;
  const PseudoLayer<S> layer_;
  const Sequences sequences_;
  const int64_t units_, input_width_;  // input_width_: 0 for index input
  const ForwardWeights<S>& weights_;
  InputPart<S> input_part_;
  ForwardCells<S> cells_;
  Team team_;
  Buffer<T> product_;  // of a projection, W_hr (o * tanh(c)); with layer normalisation, W_hh h
  int64_t begun_ = 0;  // sequences that have begun
};

template <class S>
void forward(const Forward& f, const Runtime& runtime) {
  const Problem& p = f.problem;
  const Rows rows(p);
  const auto* packed = static_cast<const PackedStack<S>*>(f.packed);
  const bool direct = packed == nullptr && runs_direct(p);
  for (int layer = 0; layer < p.layers; ++layer) {
    const LayerInput<S> input(p, f.saved, rows, layer);
    const int64_t work = p.directions * p.rows * 4 * p.hidden_size * (p.hidden_size + input.width);
    const Division division(p, kCosts, direct ? 1 : runtime.threads, work, sizeof(Operand<S>));
    const BatchSplit split(rows, p.rows, division.parts);
    List<ForwardWeights<S>> weights(p.directions);
    for (int d = 0; d < p.directions && packed == nullptr; ++d)
      weights.add(p, runtime, p.weights[layer * p.directions + d], input.width, input.dense(),
                  direct);
    List<ForwardTask<S>> tasks(split.count * p.directions);
    for (int64_t j = 0; j < split.count; ++j)
      for (int d = 0; d < p.directions; ++d)
        tasks.add(f, runtime, rows, input,
                  packed ? packed->layers[layer * p.directions + d] : weights[d],
                  PseudoLayer<S>(p, f.saved, layer, d), split.part(j), division.members);
    run_teams(runtime, division, tasks.count(), [&](int64_t j) { tasks[j].run(); });
  }
}

}  // namespace
}  // namespace fastlstm

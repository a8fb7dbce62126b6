// Draws text from a stack and its decoder on the CPU: a step is one product of every weight matrix
// with the states of the batch (1 to 64 rows).
//
// A team of threads shares each step. A member takes panels of every matrix (64 columns: 16 units
// with their four gates), in the order of the layers; after every layer all meet. A panel is
// read once from its first k to its last, its sums stay in registers, and the cells run on them at
// once. Each column is summed by one thread in a fixed order, so results do not depend on the
// number of threads.
//
// Memory traffic of a step: every weight once from cache (2 x 512: 12.6 MB in fp32, a half or a
// quarter of that in bf16 or int8). That bounds batch 1. Larger batches read the weights once for
// kPassRows rows.
#pragma once

#include "blocks.h"
#include "cell_vectors.h"
#include "cost_model.h"
#include "draw.h"
#include "generate_product.h"
#include "runtime.h"
#include "team.h"

namespace fastlstm {
namespace {

template <class Store>
class Generator {
 public:
  typedef typename Store::T T;

  Generator(const Generate& g, Team& team)
      : g_(g),
        team_(team),
        units_(round_up(g.hidden_size, kGenerateUnits)),
        h_stride_(max_of(units_, g.projected ? round_up(g.out_size, kGenerateColumns) : 0)),
        logits_stride_(round_up(g.vocabulary, kGenerateColumns)),
        rows_(g.layers * g.batch),
        unprojected_h_(g.projected ? g.batch * h_stride_ : 0),
        c_(rows_ * units_),
        logits_(g.batch * logits_stride_),
        order_(g.batch * g.vocabulary),
        plain_(plain(g.cell)),
        rules_(expected_rules(g.cell)) {
    // Cells read columns beyond those that a projection writes.
    for (Buffer<T>& h : h_) h.reset_to_zero(rows_ * h_stride_);
    load_states(h_[0].get(), h_stride_, g.h0, g.out_size);
    load_states(c_.get(), units_, g.c0, g.hidden_size);
  }

  // What a member multiplies, as its products read it: the layer's input from below, and h before
  // the step or, in a projection and in the decoder, its operand.
  struct Operands {
    explicit Operands(const Generator& g)
        : input(g.g_.batch, g.h_stride_), h(g.g_.batch, g.h_stride_) {}
    typename Store::Rows input, h;
  };

  // One member's share of step s.
  void run_step(int64_t s, Team::Member& member, Operands& x) {
    const T* input = nullptr;  // h of the layer below
    for (int layer = 0; layer < g_.layers; ++layer) {
      const T* h = h_[s % 2].get() + layer * g_.batch * h_stride_;
      T* new_h = h_[(s + 1) % 2].get() + layer * g_.batch * h_stride_;
      T* unprojected = g_.projected ? unprojected_h_.get() : new_h;
      if (layer > 0) x.input.read(input, h_stride_, g_.batch, g_.out_size);
      x.h.read(h, h_stride_, g_.batch, g_.out_size);
      share(member, units_ / kGenerateUnits, [&](auto rows, int64_t panel, int64_t b) {
        run_cells<decltype(rows)::value>(s, layer, panel, b, x, h, unprojected);
      });
      if (g_.projected) {
        x.h.read(unprojected, h_stride_, g_.batch, g_.hidden_size);
        multiply(member, g_.weights[layer].hr, g_.out_size, nullptr, x.h, new_h, h_stride_);
      }
      input = new_h;
    }
    const int64_t drawn = s + 1 - g_.prime_steps;
    if (drawn < 0) return;
    x.h.read(input, h_stride_, g_.batch, g_.out_size);
    multiply(member, g_.decoder, g_.vocabulary, static_cast<const T*>(g_.decoder_bias), x.h,
             logits_.get(), logits_stride_);
    team_.share(member, g_.batch, [&](int64_t b) {
      g_.tokens[drawn * g_.batch + b] =
          draw(g_, logits_.get() + b * logits_stride_, order_.get() + b * g_.vocabulary, drawn, b);
    });
  }

  // Writes the states after `steps` steps.
  void write_states(int64_t steps) const {
    write_states(h_[steps % 2].get(), h_stride_, g_.h_n, g_.out_size);
    write_states(c_.get(), units_, g_.c_n, g_.hidden_size);
  }

 private:
  // As in evaluation: zoneout's expectation, no recurrent dropout.
  static CellRules<Vec<T>> expected_rules(const CellOptions& options) {
    CellRules<Vec<T>> rules;
    rules.update = Math<T>::one();
    rules.clip = Vec<T>{} + (options.clip > 0 ? T(options.clip) : T(INFINITY));
    rules.new_c = Vec<T>{} + T(1 - options.zoneout_c);
    rules.new_h = Vec<T>{} + T(1 - options.zoneout_h);
    return rules;
  }

  // States of all layers: (rows, n) outside, and rows that are padded to the stride here.
  void load_states(T* to, int64_t stride, const void* from, int64_t n) const {
    for (int64_t row = 0; row < rows_; ++row)
      for (int64_t j = 0; j < stride; ++j)
        to[row * stride + j] = from && j < n ? static_cast<const T*>(from)[row * n + j] : T(0);
  }
  void write_states(const T* from, int64_t stride, void* to, int64_t n) const {
    for (int64_t row = 0; row < rows_; ++row)
      for (int64_t j = 0; j < n; ++j) static_cast<T*>(to)[row * n + j] = from[row * stride + j];
  }

  // Calls f(Int<M>{}, panel, b) for this member's share of the panels and all rows, M rows from b
  // on.
  template <class F>
  void share(Team::Member& member, int64_t panels, F&& f) const {
    team_.share(member, panels, [&](int64_t panel) {
      for_even_blocks(g_.batch, kPassRows, [&](int rows, int64_t b) {
        with_rows<kPassRows>(rows, [&](auto size) { f(size, panel, b); });
      });
    });
  }

  // The gates and the cells of one panel, for M rows from b on.
  template <int M>
  void run_cells(int64_t s, int layer, int64_t panel, int64_t b, const Operands& x, const T* h,
                 T* new_h) {
    const GenerateLayer& w = g_.weights[layer];
    alignas(64) T sums[M][kGenerateColumns];
    for (int m = 0; m < M; ++m) {
      const T* start = layer == 0 ? static_cast<const T*>(g_.table) + token(s, b + m) * 4 * units_
                                  : static_cast<const T*>(w.bias);
      memcpy(sums[m], start + panel * kGenerateColumns, sizeof sums[m]);
    }
    if (layer > 0) add_product<Store, M>(sums, w.ih, panel, x.input, b);
    add_product<Store, M>(sums, w.hh, panel, x.h, b);
    for (int m = 0; m < M; ++m)
      for (int64_t j = 0; j < kGenerateUnits; j += kWidth<T>) {
        const int64_t unit = panel * kGenerateUnits + j;
        T* c = c_.get() + (layer * g_.batch + b + m) * units_ + unit;
        const Gates<Vec<T>> a = load_gates<Vec<T>>(sums[m] + j, kGenerateUnits, kWidth<T>);
        CellForward<Vec<T>> out;
        if (plain_)
          out = cell_forward<Math<T>>(a.i, a.f, a.g, a.o, load(c));
        else
          out = cell_forward<Math<T>>(a.i, a.f, a.g, a.o, load(c),
                                      load(h + (b + m) * h_stride_ + unit), rules_);
        store(c, out.c);
        store(new_h + (b + m) * h_stride_ + unit, out.h);
      }
  }

  // to = W x + bias, for all rows and this member's share of the n columns.
  template <class To>
  void multiply(Team::Member& member, const PackedMatrix& w, int64_t n, const T* bias,
                const typename Store::Rows& x, To* to, int64_t stride) const {
    share(member, ceil_div(n, kGenerateColumns), [&](auto rows, int64_t panel, int64_t b) {
      constexpr int M = decltype(rows)::value;
      alignas(64) T sums[M][kGenerateColumns] = {};
      if (bias)
        for (int m = 0; m < M; ++m)
          memcpy(sums[m], bias + panel * kGenerateColumns, sizeof sums[m]);
      add_product<Store, M>(sums, w, panel, x, b);
      for (int m = 0; m < M; ++m)
        for (int64_t j = 0; j < kGenerateColumns; ++j)
          to[(b + m) * stride + panel * kGenerateColumns + j] = To(sums[m][j]);
    });
  }

  // What row b reads in step s: of the prime, then what was drawn.
  int64_t token(int64_t s, int64_t b) const {
    const int64_t drawn = s - g_.prime_steps;
    return drawn < 0 ? g_.prime[s * g_.batch + b] : g_.tokens[drawn * g_.batch + b];
  }

  const Generate& g_;
  Team& team_;
  const int64_t units_, h_stride_, logits_stride_;  // widths, padded to whole panels
  const int64_t rows_;                              // of the states: layers * batch
  Buffer<T> h_[2];                                  // before even steps, and before odd ones
  Buffer<T> unprojected_h_, c_;
  Buffer<double> logits_;
  Buffer<int64_t> order_;
  const bool plain_;
  const CellRules<Vec<T>> rules_;
};

template <class Store>
void generate(const Generate& g, const Runtime& runtime) {
  const int64_t steps = g.prime_steps + g.length - 1;
  const int64_t recurrent =
      4 * g.hidden_size * g.out_size + (g.projected ? g.hidden_size : 0) * g.out_size;
  const int64_t weights = g.layers * recurrent * 2 + g.vocabulary * g.out_size;
  const int64_t weight_bytes = int64_t(sizeof(typename Store::Word)) / Store::kPerWord;
  const int64_t barriers = g.layers * (g.projected ? 2 : 1) + 2;  // of a step
  const int64_t most = min_of(runtime.threads, 1 + weights * g.batch / kWorkPerThread);
  const int64_t workers = EvenTeam(kCosts, most, weights, g.batch, weight_bytes, barriers).members;
  Team team(steps, workers);
  Generator<Store> generator(g, team);
  parallel(runtime, workers, [&](int64_t) {
    typename Generator<Store>::Operands x(generator);
    team.run([&](int64_t s, Team::Member& member) { generator.run_step(s, member, x); });
  });
  generator.write_states(steps);
}

}  // namespace
}  // namespace fastlstm

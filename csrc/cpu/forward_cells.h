// The cells of a task: its sequences' states, and the steps from pre-activations to new states.
#pragma once

#include "cell_vectors.h"
#include "division.h"
#include "forward_weights.h"
#include "gemm.h"
#include "norm.h"
#include "pseudo_layer.h"

namespace fastlstm {
namespace {

// The pre-activations of a block of kPanel units, for up to kTileRows rows: h's part, and where
// each row's input part is.
template <class T>
struct GateTile {
  alignas(64) T gates[4][kTileRows][kPanel<T>];
  const T* input_part[kTileRows];
};

// Sequences are counted from the task's first one.
template <class S>
class ForwardCells {
 public:
  typedef Acc<S> T;
  typedef Operand<S> E;

  ForwardCells(const Forward& f, const Rows& rows, const PseudoLayer<S>& layer,
               const Sequences& sequences)
      : rows_(rows),
        layer_(layer),
        sequences_(sequences),
        units_(f.problem.hidden_size),
        out_(f.problem.out_size),
        projected_(f.problem.projected),
        h_stride_(row_stride<E>(max_of(units_, out_))),
        c_stride_(padded<T>(units_)),
        rules_(drawn_rules<T>(f.problem, layer.layer, layer.direction)),
        h0_(layer.states(f.problem.h0, out_)),
        h_n_(layer.states(f.h_n, out_)),
        c_n_(layer.states(f.c_n, units_)) {
    const int64_t batch = sequences.count();
    // Zeros: the padding of a row is multiplied too (panels.h).
    for (Buffer<E>& h : h_) h.reset_to_zero(batch * h_stride_);
    if (projected_) unprojected_h_.reset_to_zero(batch * h_stride_);
    if (f.problem.layer_norm) norm_scratch_.reset(batch * 2 * c_stride_);
    c_.reset(batch * c_stride_);
    const S* c0 = layer.states(f.problem.c0, units_);
    for (int64_t b = 0; b < batch; ++b) {
      T* c = c_.get() + b * c_stride_;
      for (int64_t j = 0; j < c_stride_; ++j) c[j] = 0;
      if (c0) convert(c, c0 + (sequences.begin + b) * units_, units_);
    }
  }

  // Loads the initial h of a sequence whose first step is s.
  void begin_sequence(int64_t s, int64_t b) {
    if (h0_) convert(h_[s % 2].get() + b * h_stride_, h0_ + (sequences_.begin + b) * out_, out_);
  }
  // Writes the states of a sequence whose last step is s.
  void end_sequence(int64_t s, int64_t b) const {
    const int64_t sequence = sequences_.begin + b;
    convert(h_n_ + sequence * out_, h(s + 1, b), out_);
    convert(c_n_ + sequence * units_, c_.get() + b * c_stride_, units_);
  }

  // h before step s, and (with a projection) o * tanh(c) of the step.
  const E* h(int64_t s, int64_t b) const { return h_[s % 2].get() + b * h_stride_; }
  const E* unprojected_h() const { return unprojected_h_.get(); }
  int64_t h_stride() const { return h_stride_; }

  // The new states of `count` rows from sequence b on, units of a block.
  void run(int64_t s, int64_t b, int count, int64_t block, const GateTile<T>& tile) {
    if (rules_.plain)
      run_with<false>(s, b, count, block, tile);
    else
      run_with<true>(s, b, count, block, tile);
  }

  // With layer normalisation, the new states of sequence b, all units. z: its W_hh h.
  void run_normed(const NormWeights<S>& weights, int64_t s, int64_t b, const T* input_part,
                  const T* z) {
    const int64_t t = layer_.time(s), row = rows_.at(t, sequences_.begin + b);
    NormForwardRow<S> args;
    args.input_part = input_part;
    args.z = z;
    args.h_prev = h(s, b);
    args.c = c_.get() + b * c_stride_;
    args.h = norm_scratch_.get() + b * 2 * c_stride_;
    args.o = args.h + c_stride_;
    args.saved = layer_.gates ? layer_.gates + row * layer_.gates_stride : nullptr;
    args.keys = rules_.row(t, sequences_.begin + b);
    norm_forward(weights, rules_, units_, args);
    write_h(s, b, 0, args.h, units_);
    if (args.saved == nullptr) return;
    const int64_t gates = 4 * units_;
    convert(args.saved + 2 * gates, z, gates);
    convert(layer_.cell_states + row * units_, args.c, units_);
  }

  // Units [first, first + n) of a sequence's new h: to the output and, rounded to its type as the
  // recurrence reads it, to the next step.
  void write_h(int64_t s, int64_t b, int64_t first, const T* h, int64_t n) {
    S* y = layer_.output + rows_.at(layer_.time(s), sequences_.begin + b) * layer_.output_stride +
           first;
    convert(y, h, n);
    convert(h_[(s + 1) % 2].get() + b * h_stride_ + first, y, n);
  }

 private:
  template <bool kRules>
  void run_with(int64_t s, int64_t b, int count, int64_t block, const GateTile<T>& tile) {
    const int64_t t = layer_.time(s);
    E* const new_h = h_[(s + 1) % 2].get();
    typedef CellVector<T, kRules> V;
    typedef Elements<V> At;
    constexpr int kUnits = kLanes<T, V>;
    for (int m = 0; m < count; ++m) {
      const int64_t sequence = sequences_.begin + b + m, row = rows_.at(t, sequence);
      const T* from_input = tile.input_part[m];
      const RuleRow keys = kRules ? rules_.row(t, sequence) : RuleRow{};
      for (int at = 0; at < kPanel<T>; at += kUnits) {
        const int64_t unit = block * kPanel<T> + at;
        const int n = int(min_of(kUnits, units_ - unit));
        if (n <= 0) break;
        T* c = c_.get() + (b + m) * c_stride_ + unit;
        auto pre_activation = [&](int g) {
          return At::read(from_input + g * kPanel<T> + at, kUnits) +
                 At::read(&tile.gates[g][m][at], kUnits);
        };
        const V a_i = pre_activation(0), a_f = pre_activation(1), a_g = pre_activation(2),
                a_o = pre_activation(3), c_prev = At::read(c, kUnits);
        CellForward<V> out;
        if constexpr (kRules) {
          const V h_prev = load_as<E>(h(s, b + m) + unit);
          out = cell_forward<Math<T>>(a_i, a_f, a_g, a_o, c_prev, h_prev,
                                      rules_of(rules_, keys, unit));
        } else {
          out = cell_forward<MathOf<T, V>>(a_i, a_f, a_g, a_o, c_prev);
        }
        At::write(c, out.c, kUnits);
        // Where the products read a row's padding it stays zero: of an infinite input the units
        // there are NaN.
        const int stored = kDeep<E> > 1 ? n : kUnits;
        if (projected_) {
          At::write(unprojected_h_.get() + (b + m) * h_stride_ + unit, out.h, stored);
        } else {
          // The recurrence reads h as the output holds it: rounded to the storage type.
          E* const to = new_h + (b + m) * h_stride_ + unit;
          if constexpr (kSame<E, S>)
            At::write(to, out.h, stored);
          else
            At::write(to, At::template rounded<S>(out.h), stored);
          At::write(layer_.output + row * layer_.output_stride + unit, out.h, n);
        }
        if (layer_.gates) {
          store_gates<V>(layer_.gates + row * kSavedGates * units_ + unit, units_, n,
                         {out.i, out.f, out.g, out.o});
          At::write(layer_.cell_states + row * units_ + unit, out.c, n);
        }
      }
    }
  }

  const Rows& rows_;
  const PseudoLayer<S> layer_;
  const Sequences sequences_;
  const int64_t units_, out_;
  const bool projected_;
  const int64_t h_stride_, c_stride_;
  const DrawnRules<T> rules_;
  const S* const h0_;
  S *const h_n_, *const c_n_;
  Buffer<E> h_[2];  // before even steps, and before odd ones
  Buffer<E> unprojected_h_;
  Buffer<T> c_;
  Buffer<T> norm_scratch_;  // two rows for each sequence
};

}  // namespace
}  // namespace fastlstm

// The layer-normalised cell on whole rows: Ba, Kiros and Hinton (2016), section 3.1.
//
//   a = gain_x * norm(W_ih x) + gain_h * norm(W_hh h) + b
//   h = o * tanh(gain_c * norm(c) + bias_c),   norm(v) = (v - mean(v)) / sqrt(var(v) + epsilon)
//
// A product is normalised over all four gates. Rows stand in the weights' order (i, f, g, o, each
// of H), not in the panels' of forward.h; a row is one thread's.
#pragma once

#include "layer.h"

namespace fastlstm {
namespace {

template <class T>
struct Moments {
  T mean, scale;  // scale: 1 / sqrt(variance + epsilon)
};

template <class T>
FASTLSTM_INLINE T sum_of(Vec<T> v) {
  T sum = 0;
  for (int j = 0; j < kWidth<T>; ++j) sum += v[j];
  return sum;
}

// Calls f(first, n) for vectors of n elements.
template <class T, class F>
FASTLSTM_INLINE void for_vectors(int64_t count, F&& f) {
  for (int64_t j = 0; j < count; j += kWidth<T>) f(j, int(min_of(kWidth<T>, count - j)));
}

template <class S>
Moments<Acc<S>> moments(const S* x, int64_t count) {
  typedef Acc<S> T;
  Vec<T> sum{};
  for_vectors<T>(count, [&](int64_t j, int n) { sum += load_part(x + j, n); });
  const T mean = sum_of<T>(sum) / T(count);
  Vec<T> squares{};
  for_vectors<T>(count, [&](int64_t j, int n) {
    Vec<T> d = load_part(x + j, n) - mean;
    for (int lane = n; lane < kWidth<T>; ++lane) d[lane] = 0;
    squares += d * d;
  });
  return {mean, T(1 / __builtin_sqrt(double(sum_of<T>(squares)) / double(count) + kNormEpsilon))};
}

template <class T>
FASTLSTM_INLINE Vec<T> normed(Vec<T> x, const Moments<T>& m) {
  return (x - m.mean) * m.scale;
}

// A cell's gains and bias in the accumulation type.
template <class S>
struct NormWeights {
  typedef Acc<S> T;

  NormWeights(const Problem& p, const CellWeights& w) {
    if (!p.layer_norm) return;
    const int64_t units = p.hidden_size;
    auto read = [](Buffer<T>& to, const void* from, int64_t n) {
      to.reset(n);
      convert(to.get(), static_cast<const S*>(from), n);
    };
    read(ih, w.norm_ih, 4 * units);
    read(hh, w.norm_hh, 4 * units);
    read(c, w.norm_c, units);
    read(c_bias, w.norm_c_bias, units);
  }

  Buffer<T> ih, hh, c, c_bias;
};

// to = gain * norm(z) + bias for one row; `to` may be z.
template <class T>
void write_normed(T* to, const T* z, const T* gain, const T* bias, int64_t count) {
  const Moments<T> m = moments(z, count);
  for_vectors<T>(count, [&](int64_t j, int n) {
    store_part(to + j,
               load_part(gain + j, n) * normed<T>(load_part(z + j, n), m) + load_part(bias + j, n),
               n);
  });
}

// One sequence's step forward. pre: the input's part and the biases; z: W_hh h; c: the cell state,
// before and after; o, h: scratch rows, h also the new hidden state before rounding.
// saved: what backward reads, or null.
template <class S>
void norm_forward(const NormWeights<S>& w, const Acc<S>* pre, const Acc<S>* z, Acc<S>* c, Acc<S>* o,
                  Acc<S>* h, const Operand<S>* h_prev, const DrawnRules<Acc<S>>& rules,
                  const RuleRow& drawn, int64_t units, S* saved) {
  typedef Acc<S> T;
  const Moments<T> of_z = moments(z, 4 * units);
  for_vectors<T>(units, [&](int64_t unit, int n) {
    auto gate = [&](int g) {
      const int64_t at = g * units + unit;
      return load_part(pre + at, n) +
             load_part(w.hh.get() + at, n) * normed<T>(load_part(z + at, n), of_z);
    };
    const CellForward<Vec<T>> out = cell_state<Math<T>>(
        gate(0), gate(1), gate(2), gate(3), load_part(c + unit, n), rules_of(rules, drawn, unit));
    store_part(h + unit, out.c, n);  // for now
    store_part(o + unit, out.o, n);
    if (saved) {
      store_part<S>(saved + unit, out.i, n);
      store_part<S>(saved + units + unit, out.f, n);
      store_part<S>(saved + 2 * units + unit, out.g, n);
      store_part<S>(saved + 3 * units + unit, out.o, n);
    }
  });
  const Moments<T> of_c = moments(h, units);
  for_vectors<T>(units, [&](int64_t unit, int n) {
    const CellRules<Vec<T>> rule = rules_of(rules, drawn, unit);
    const Vec<T> fresh = load_part(h + unit, n);
    const Vec<T> u = load_part(w.c.get() + unit, n) * normed<T>(fresh, of_c) +
                     load_part(w.c_bias.get() + unit, n);
    const Vec<T> new_h = cell_output<Math<T>>(load_part(o + unit, n), u);
    store_part(h + unit, zoned(rule.new_h, new_h, load_part(h_prev + unit, n)), n);
    store_part(c + unit, zoned(rule.new_c, fresh, load_part(c + unit, n)), n);
  });
}

// What the gradients of gains and bias sum over rows, in this order: of gain_x and gain_h (4H
// each), of gain_c and bias_c (H each).
FASTLSTM_INLINE int64_t norm_terms(int64_t units) { return 10 * units; }

// dz from da, through gain * norm(z); terms: da * norm(z).
template <class S>
void norm_product_backward(const Acc<S>* da, const S* z, const Acc<S>* gain, int64_t count,
                           Operand<S>* dz, Acc<S>* terms) {
  typedef Acc<S> T;
  const Moments<T> m = moments(z, count);
  Vec<T> sum{}, along{};
  for_vectors<T>(count, [&](int64_t j, int n) {
    const Vec<T> d = load_part(da + j, n), x = normed<T>(load_part(z + j, n), m);
    store_part(terms + j, d * x, n);
    const Vec<T> dx = d * load_part(gain + j, n);  // zero past n, as d is
    sum += dx;
    along += dx * x;
  });
  const T mean = sum_of<T>(sum) / T(count), slope = sum_of<T>(along) / T(count);
  for_vectors<T>(count, [&](int64_t j, int n) {
    const Vec<T> dx = load_part(da + j, n) * load_part(gain + j, n);
    const Vec<T> x = normed<T>(load_part(z + j, n), m);
    store_part<Operand<S>>(dz + j, m.scale * (dx - mean - x * slope), n);
  });
}

// One sequence's step backward. saved: the gates and both products; dh: the gradient of h, and what
// zoneout hands to the one before; dc alike; scratch of 6H; da, dz_x, dz_h: gradients of the
// pre-activations and of the products; terms as above.
template <class S>
void norm_backward(const NormWeights<S>& w, const S* saved, const Acc<S>* c_prev, Acc<S>* dh,
                   Acc<S>* dc, const Acc<S>* grad_c, const DrawnRules<Acc<S>>& rules,
                   const RuleRow& drawn, int64_t units, Acc<S>* scratch, Operand<S>* da,
                   Operand<S>* dz_x, Operand<S>* dz_h, Acc<S>* terms) {
  typedef Acc<S> T;
  T *fresh = scratch, *dnorm = scratch + units, *exact_da = scratch + 2 * units;
  auto gate = [&](int g, int64_t unit, int n) { return load_part(saved + g * units + unit, n); };
  for_vectors<T>(units, [&](int64_t unit, int n) {
    const CellRules<Vec<T>> rule = rules_of(rules, drawn, unit);
    const Vec<T> c = unbound_cell(gate(0, unit, n), gate(1, unit, n), gate(2, unit, n),
                                  load_part(c_prev + unit, n), rule);
    store_part(fresh + unit, clipped(c, rule), n);
  });
  const Moments<T> m = moments(fresh, units);
  Vec<T> sum{}, along{};
  for_vectors<T>(units, [&](int64_t unit, int n) {
    const CellRules<Vec<T>> rule = rules_of(rules, drawn, unit);
    const Vec<T> x = normed<T>(load_part(fresh + unit, n), m),
                 gain = load_part(w.c.get() + unit, n);
    const Vec<T> u = gain * x + load_part(w.c_bias.get() + unit, n);
    const Vec<T> all = load_part(dh + unit, n), own = rule.new_h * all;
    store_part(dh + unit, all - own, n);
    Vec<T> a_o;
    const Vec<T> du = cell_output_backward<Math<T>>(gate(3, unit, n), u, own, a_o);
    store_part(exact_da + 3 * units + unit, a_o, n);
    store_part(terms + 8 * units + unit, du * x, n);
    store_part(terms + 9 * units + unit, du, n);
    const Vec<T> dx = du * gain;
    store_part(dnorm + unit, dx, n);
    sum += dx;
    along += dx * x;
  });
  const T mean = sum_of<T>(sum) / T(units), slope = sum_of<T>(along) / T(units);
  for_vectors<T>(units, [&](int64_t unit, int n) {
    const CellRules<Vec<T>> rule = rules_of(rules, drawn, unit);
    Vec<T> arriving = load_part(dc + unit, n);
    if (grad_c) arriving += load_part(grad_c + unit, n);
    const Vec<T> x = normed<T>(load_part(fresh + unit, n), m), kept = rule.new_c * arriving;
    const Vec<T> through = m.scale * (load_part(dnorm + unit, n) - mean - x * slope);
    CellBackward<Vec<T>> d;
    cell_state_backward<Math<T>>(gate(0, unit, n), gate(1, unit, n), gate(2, unit, n),
                                 load_part(c_prev + unit, n), kept + through, rule, d);
    store_part(exact_da + unit, d.a_i, n);
    store_part(exact_da + units + unit, d.a_f, n);
    store_part(exact_da + 2 * units + unit, d.a_g, n);
    store_part(dc + unit, d.c_prev + (arriving - kept), n);
  });
  const int64_t all = 4 * units;
  convert(da, exact_da, all);
  norm_product_backward<S>(exact_da, saved + all, w.ih.get(), all, dz_x, terms);
  norm_product_backward<S>(exact_da, saved + 2 * all, w.hh.get(), all, dz_h, terms + all);
}

}  // namespace
}  // namespace fastlstm

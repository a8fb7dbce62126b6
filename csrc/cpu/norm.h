// The layer-normalised cell on whole rows: Ba, Kiros and Hinton (2016), section 3.1.
//
//   a = gain_x * norm(W_ih x) + gain_h * norm(W_hh h) + b
//   h = o * tanh(gain_c * norm(c) + bias_c),   norm(v) = (v - mean(v)) / sqrt(var(v) + epsilon)
//
// A product is normalised over all four gates together. Gates are in the weights' order,
// [i, f, g, o][H], not in that of forward_weights.h's panels. One thread computes a whole row.
#pragma once

#include "blocks.h"
#include "cell_vectors.h"
#include "operands.h"
#include "runtime.h"

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

// Calls f(first, n) for every vector of a row of `count` elements: n of them, from `first` on.
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

// The gains, and the bias of c, in the accumulation type.
template <class S>
struct NormWeights {
  typedef Acc<S> T;

  NormWeights(const Problem& p, const LayerWeights& weights) {
    if (!p.layer_norm) return;
    const int64_t units = p.hidden_size;
    auto read = [](Buffer<T>& to, const void* from, int64_t n) {
      to.reset(n);
      convert(to.get(), static_cast<const S*>(from), n);
    };
    read(ih, weights.norm_ih, 4 * units);
    read(hh, weights.norm_hh, 4 * units);
    read(c, weights.norm_c, units);
    read(c_bias, weights.norm_c_bias, units);
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

// One sequence's step forward.
template <class S>
struct NormForwardRow {
  typedef Acc<S> T;

  const T* input_part;       // gain_x * norm(W_ih x) + b, (4H)
  const T* z;                // W_hh h, (4H)
  const Operand<S>* h_prev;  // (H)
  T* c;                      // the cell state, before and after, (H)
  T *o, *h;                  // scratch, (H) each; h also the new hidden state before rounding
  S* saved;                  // receives the gates, or null
  RuleRow keys;
};

template <class S>
void norm_forward(const NormWeights<S>& weights, const DrawnRules<Acc<S>>& rules, int64_t units,
                  const NormForwardRow<S>& args) {
  typedef Acc<S> T;
  const NormForwardRow<S> row = args;  // a copy that the compiler keeps in registers
  const Moments<T> of_z = moments(row.z, 4 * units);
  for_vectors<T>(units, [&](int64_t unit, int n) {
    auto pre_activation = [&](int g) {
      const int64_t at = g * units + unit;
      return load_part(row.input_part + at, n) +
             load_part(weights.hh.get() + at, n) * normed<T>(load_part(row.z + at, n), of_z);
    };
    const CellForward<Vec<T>> out = cell_state<Math<T>>(
        pre_activation(0), pre_activation(1), pre_activation(2), pre_activation(3),
        load_part(row.c + unit, n), rules_of(rules, row.keys, unit));
    store_part(row.h + unit, out.c, n);  // until c's moments are known
    store_part(row.o + unit, out.o, n);
    if (row.saved) store_gates<Vec<T>>(row.saved + unit, units, n, {out.i, out.f, out.g, out.o});
  });
  const Moments<T> of_c = moments(row.h, units);
  for_vectors<T>(units, [&](int64_t unit, int n) {
    const CellRules<Vec<T>> rule = rules_of(rules, row.keys, unit);
    const Vec<T> new_c = load_part(row.h + unit, n);
    const Vec<T> scaled = load_part(weights.c.get() + unit, n) * normed<T>(new_c, of_c) +
                          load_part(weights.c_bias.get() + unit, n);
    const Vec<T> new_h = cell_output<Math<T>>(load_part(row.o + unit, n), scaled);
    store_part(row.h + unit, zoned(rule.new_h, new_h, load_part(row.h_prev + unit, n)), n);
    store_part(row.c + unit, zoned(rule.new_c, new_c, load_part(row.c + unit, n)), n);
  });
}

// The gradients of gains and bias are sums over rows of terms. A row of terms has those of gain_x
// (4H), gain_h (4H), gain_c (H) and bias_c (H).
struct NormTerms {
  static constexpr int kGainX = 0, kGainH = 4, kGainC = 8, kBiasC = 9, kCount = 10;  // of H each
};
FASTLSTM_INLINE int64_t norm_terms(int64_t units) { return NormTerms::kCount * units; }

// Backward of gain * norm(z): dz from da, and the terms da * norm(z).
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

// One sequence's step backward.
template <class S>
struct NormBackwardRow {
  typedef Acc<S> T;
  typedef Operand<S> E;

  const S* saved;       // a row of Saved.gates (lstm.h)
  const T* c_prev;      // (H)
  const T* grad_c;      // an addend of c's gradient, (H), or null
  T *dh, *dc;           // gradients of the states: after the step, then before it; (H) each
  T* scratch;           // (norm_scratch(H))
  E *da, *dz_x, *dz_h;  // gradients of the pre-activations and of both products, (4H) each
  T* terms;             // (norm_terms(H))
  RuleRow keys;
};
FASTLSTM_INLINE int64_t norm_scratch(int64_t units) { return 6 * units; }

// dh becomes what zoneout passes on to the h before; the product with W_hh is added to it later.
template <class S>
void norm_backward(const NormWeights<S>& weights, const DrawnRules<Acc<S>>& rules, int64_t units,
                   const NormBackwardRow<S>& args) {
  typedef Acc<S> T;
  const NormBackwardRow<S> row = args;  // a copy that the compiler keeps in registers
  // new_c: the cell state before zoneout. exact_da: da before it is converted.
  T *new_c = row.scratch, *dnorm = new_c + units, *exact_da = new_c + 2 * units;
  auto gate = [&](int g, int64_t unit, int n) {
    return load_part(row.saved + g * units + unit, n);
  };
  for_vectors<T>(units, [&](int64_t unit, int n) {
    const CellRules<Vec<T>> rule = rules_of(rules, row.keys, unit);
    const Vec<T> c = unbound_cell(gate(0, unit, n), gate(1, unit, n), gate(2, unit, n),
                                  load_part(row.c_prev + unit, n), rule);
    store_part(new_c + unit, clipped(c, rule), n);
  });
  const Moments<T> m = moments(new_c, units);
  Vec<T> sum{}, along{};
  for_vectors<T>(units, [&](int64_t unit, int n) {
    const CellRules<Vec<T>> rule = rules_of(rules, row.keys, unit);
    const Vec<T> x = normed<T>(load_part(new_c + unit, n), m),
                 gain = load_part(weights.c.get() + unit, n);
    const Vec<T> scaled = gain * x + load_part(weights.c_bias.get() + unit, n);
    const Vec<T> dh = load_part(row.dh + unit, n), dh_new = rule.new_h * dh;
    store_part(row.dh + unit, dh - dh_new, n);
    Vec<T> a_o;
    const Vec<T> dscaled = cell_output_backward<Math<T>>(gate(3, unit, n), scaled, dh_new, a_o);
    store_part(exact_da + 3 * units + unit, a_o, n);
    store_part(row.terms + NormTerms::kGainC * units + unit, dscaled * x, n);
    store_part(row.terms + NormTerms::kBiasC * units + unit, dscaled, n);
    const Vec<T> dx = dscaled * gain;
    store_part(dnorm + unit, dx, n);
    sum += dx;
    along += dx * x;
  });
  const T mean = sum_of<T>(sum) / T(units), slope = sum_of<T>(along) / T(units);
  for_vectors<T>(units, [&](int64_t unit, int n) {
    const CellRules<Vec<T>> rule = rules_of(rules, row.keys, unit);
    Vec<T> dc = load_part(row.dc + unit, n);
    if (row.grad_c) dc += load_part(row.grad_c + unit, n);
    const Vec<T> x = normed<T>(load_part(new_c + unit, n), m), dc_new = rule.new_c * dc;
    const Vec<T> through_norm = m.scale * (load_part(dnorm + unit, n) - mean - x * slope);
    CellBackward<Vec<T>> d;
    cell_state_backward<Math<T>>(gate(0, unit, n), gate(1, unit, n), gate(2, unit, n),
                                 load_part(row.c_prev + unit, n), dc_new + through_norm, rule, d);
    store_part(exact_da + unit, d.a_i, n);
    store_part(exact_da + units + unit, d.a_f, n);
    store_part(exact_da + 2 * units + unit, d.a_g, n);
    store_part(row.dc + unit, d.c_prev + (dc - dc_new), n);
  });
  const int64_t all = 4 * units;
  convert(row.da, exact_da, all);
  norm_product_backward<S>(exact_da, row.saved + all, weights.ih.get(), all, row.dz_x,
                           row.terms + NormTerms::kGainX * units);
  norm_product_backward<S>(exact_da, row.saved + 2 * all, weights.hh.get(), all, row.dz_h,
                           row.terms + NormTerms::kGainH * units);
}

}  // namespace
}  // namespace fastlstm

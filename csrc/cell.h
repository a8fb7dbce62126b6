// The LSTM cell, forward and backward: the one place where its equations stand.
//
// Used by the CPU kernels (V a SIMD vector), the CUDA kernels (V a scalar) and their host build.
// Math supplies sigmoid and tanh for V. Gates are in PyTorch's order i, f, g, o.
// Hochreiter and Schmidhuber (1997), forget gate of Gers, Schmidhuber and Cummins (2000);
// fastlstm/reference.py has the same equations in plain PyTorch. The last argument of each function
// holds what nn.LSTM's cell does not have: CellRules, or PlainCell where every option is off.
#pragma once

#if defined(__CUDACC__)
#define FASTLSTM_INLINE __host__ __device__ __forceinline__
#else
#define FASTLSTM_INLINE inline __attribute__((always_inline))
#endif

namespace fastlstm {

struct PlainCell {
  static constexpr bool kPlain = true;
};

// Recurrent dropout of the update (Semeniuta, Severyn and Barth, 2016), a bound on the cell state,
// and zoneout, which keeps a share of the old states (Krueger et al., 2017).
template <class V>
struct CellRules {
  static constexpr bool kPlain = false;
  V update;        // factor of g
  V clip;          // bound of |c|
  V new_c, new_h;  // shares of the new states
};

template <class V>
struct CellForward {
  V i, f, g, o;  // activated gates
  V c;           // new cell state
  V h;           // new hidden state, before any projection
};

// c before clipping and zoneout.
template <class V, class Rules>
FASTLSTM_INLINE V unbound_cell(V i, V f, V g, V c_prev, const Rules& rules) {
  if constexpr (Rules::kPlain)
    return f * c_prev + i * g;
  else
    return f * c_prev + i * (g * rules.update);
}

template <class V, class Rules>
FASTLSTM_INLINE V clipped(V c, const Rules& rules) {
  c = c > rules.clip ? rules.clip : c;
  return c < -rules.clip ? -rules.clip : c;
}

template <class V>
FASTLSTM_INLINE V zoned(V share, V fresh, V before) {
  return share * fresh + (before - share * before);
}

// Activates a cell's gates: sets i, f, g and o of `out`. A Math that is faster with all four at
// once specialises it.
template <class Math, class V>
struct Activation {
  FASTLSTM_INLINE static void of(V a_i, V a_f, V a_g, V a_o, CellForward<V>& out) {
    out.i = Math::sigmoid(a_i);
    out.f = Math::sigmoid(a_f);
    out.g = Math::tanh(a_g);
    out.o = Math::sigmoid(a_o);
  }
};

// The gates and the new cell state; h is left to the caller.
template <class Math, class V, class Rules>
FASTLSTM_INLINE CellForward<V> cell_state(V a_i, V a_f, V a_g, V a_o, V c_prev,
                                          const Rules& rules) {
  CellForward<V> out;
  Activation<Math, V>::of(a_i, a_f, a_g, a_o, out);
  out.c = unbound_cell(out.i, out.f, out.g, c_prev, rules);
  if constexpr (!Rules::kPlain) out.c = clipped(out.c, rules);
  return out;
}

// h from the output gate and the cell state (with layer normalisation, the normalised one).
template <class Math, class V>
FASTLSTM_INLINE V cell_output(V o, V c) {
  return o * Math::tanh(c);
}

// Pre-activations a_* and the previous states to the new states. A plain cell does not read h_prev.
template <class Math, class V, class Rules = PlainCell>
FASTLSTM_INLINE CellForward<V> cell_forward(V a_i, V a_f, V a_g, V a_o, V c_prev, V h_prev = V{},
                                            const Rules& rules = Rules{}) {
  CellForward<V> out = cell_state<Math>(a_i, a_f, a_g, a_o, c_prev, rules);
  out.h = cell_output<Math>(out.o, out.c);
  if constexpr (!Rules::kPlain) {
    out.c = zoned(rules.new_c, out.c, c_prev);
    out.h = zoned(rules.new_h, out.h, h_prev);
  }
  return out;
}

template <class V>
struct CellBackward {
  V a_i, a_f, a_g, a_o;  // gradients of the pre-activations
  V c_prev;              // gradient of the previous cell state
  V h_prev;              // zoneout's gradient of the previous h; unset for a plain cell
};

// Backward of cell_output: returns the gradient of its c, and sets that of o's pre-activation.
template <class Math, class V>
FASTLSTM_INLINE V cell_output_backward(V o, V c, V dh, V& a_o) {
  const V tanh_c = Math::tanh(c);
  const V one = Math::one();
  a_o = dh * tanh_c * o * (one - o);
  return dh * o * (one - tanh_c * tanh_c);
}

// Backward of cell_state, dc the gradient of the new cell state. Sets all of d but a_o and h_prev.
template <class Math, class V, class Rules>
FASTLSTM_INLINE void cell_state_backward(V i, V f, V g, V c_prev, V dc, const Rules& rules,
                                         CellBackward<V>& d) {
  const V one = Math::one();
  if constexpr (!Rules::kPlain) {  // where c is clipped, no gradient passes
    const V unbound = unbound_cell(i, f, g, c_prev, rules);
    dc = unbound > rules.clip ? V{} : dc;
    dc = unbound < -rules.clip ? V{} : dc;
  }
  d.a_i = dc * g * i * (one - i);
  d.a_f = dc * c_prev * f * (one - f);
  d.a_g = dc * i * (one - g * g);
  d.c_prev = dc * f;
  if constexpr (!Rules::kPlain) {
    d.a_i = d.a_i * rules.update;
    d.a_g = d.a_g * rules.update;
  }
}

// Backward of cell_forward, from the activated gates, the cell states before and after the step,
// and the gradients dh and dc of the new states.
template <class Math, class V, class Rules = PlainCell>
FASTLSTM_INLINE CellBackward<V> cell_backward(V i, V f, V g, V o, V c_prev, V c, V dh, V dc,
                                              const Rules& rules = Rules{}) {
  CellBackward<V> d;
  V zoneout{};  // the part of dc that zoneout passes on to c_prev
  if constexpr (!Rules::kPlain) {
    d.h_prev = dh - rules.new_h * dh;
    dh = rules.new_h * dh;
    zoneout = dc - rules.new_c * dc;
    dc = rules.new_c * dc;
    c = clipped(unbound_cell(i, f, g, c_prev, rules), rules);
  }
  dc = dc + cell_output_backward<Math>(o, c, dh, d.a_o);
  cell_state_backward<Math>(i, f, g, c_prev, dc, rules, d);
  if constexpr (!Rules::kPlain) d.c_prev = d.c_prev + zoneout;
  return d;
}

// cell_backward is linear in dh and dc. A kernel that receives dh last computes these factors first
// and then only multiplies.
template <class V>
struct CellFactors {
  V state_h, state_c;       // of dh and dc, in the gradient of the cell state
  V a_i, a_f, a_g, c_prev;  // of that gradient
  V a_o, h_prev;            // of dh
  V c_kept;                 // of dc: zoneout's part of c_prev's gradient
};

template <class Math, class V, class Rules = PlainCell>
FASTLSTM_INLINE CellFactors<V> cell_factors(V i, V f, V g, V o, V c_prev, V c,
                                            const Rules& rules = Rules{}) {
  const V one = Math::one();
  if constexpr (!Rules::kPlain) c = clipped(unbound_cell(i, f, g, c_prev, rules), rules);
  CellBackward<V> d;
  const V state_h = cell_output_backward<Math>(o, c, one, d.a_o);
  cell_state_backward<Math>(i, f, g, c_prev, one, rules, d);
  CellFactors<V> x{};
  x.state_h = state_h;
  x.state_c = one;
  x.a_i = d.a_i;
  x.a_f = d.a_f;
  x.a_g = d.a_g;
  x.c_prev = d.c_prev;
  x.a_o = d.a_o;
  if constexpr (!Rules::kPlain) {
    x.state_h = state_h * rules.new_h;
    x.state_c = rules.new_c;
    x.a_o = d.a_o * rules.new_h;
    x.h_prev = one - rules.new_h;
    x.c_kept = one - rules.new_c;
  }
  return x;
}

// Layer normalisation (Ba, Kiros and Hinton, 2016) divides by sqrt(variance + this).
constexpr double kNormEpsilon = 1e-5;

}  // namespace fastlstm

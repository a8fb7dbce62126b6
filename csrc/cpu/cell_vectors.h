// The cell's equations (../cell.h) on vectors: loads and stores of one vector or of two side by
// side, the four gates of a row, and the rules of a vector of units.
#pragma once

#include "../rules.h"
#include "activations.h"

namespace fastlstm {
namespace {

// Two vectors side by side. The equations are one long chain of dependent operations: two chains
// next to each other in the instruction stream hide each other's latency.
template <class V>
struct Twice {
  V a, b;
};
template <class V>
FASTLSTM_INLINE Twice<V> operator+(Twice<V> x, Twice<V> y) {
  return {x.a + y.a, x.b + y.b};
}
template <class V>
FASTLSTM_INLINE Twice<V> operator-(Twice<V> x, Twice<V> y) {
  return {x.a - y.a, x.b - y.b};
}
template <class V>
FASTLSTM_INLINE Twice<V> operator*(Twice<V> x, Twice<V> y) {
  return {x.a * y.a, x.b * y.b};
}

// The functions that the equations call for V, lanes of T: a vector or two.
template <class T, class V>
struct MathOf : Math<T> {};
template <class T, class U>
struct MathOf<T, Twice<U>> {
  typedef Twice<U> V;
  static FASTLSTM_INLINE V one() { return {Math<T>::one(), Math<T>::one()}; }
  static FASTLSTM_INLINE V sigmoid(V x) { return {Math<T>::sigmoid(x.a), Math<T>::sigmoid(x.b)}; }
  static FASTLSTM_INLINE V tanh(V x) { return {Math<T>::tanh(x.a), Math<T>::tanh(x.b)}; }
};

// What the equations run on: two vectors for a plain cell, one where there are rules.
template <class T, bool kRules>
struct CellVectorOf {
  typedef Twice<Vec<T>> V;
};
template <class T>
struct CellVectorOf<T, true> {
  typedef Vec<T> V;
};
template <class T, bool kRules>
using CellVector = typename CellVectorOf<T, kRules>::V;

// The first n elements at p as V: the other lanes read as zero and are not written.
template <class V>
struct Elements {
  template <class S>
  static FASTLSTM_INLINE V read(const S* p, int n) {
    return load_part(p, n);
  }
  template <class S>
  static FASTLSTM_INLINE void write(S* p, V v, int n) {
    store_part<S>(p, v, n);
  }
  template <class S>
  static FASTLSTM_INLINE V rounded(V v) {
    return round_to<S>(v);
  }
};
template <class U>
struct Elements<Twice<U>> {
  static constexpr int kHalf = int(sizeof(U) / sizeof(U{}[0]));
  template <class S>
  static FASTLSTM_INLINE Twice<U> read(const S* p, int n) {
    return {load_part(p, n), load_part(p + kHalf, n - kHalf)};
  }
  template <class S>
  static FASTLSTM_INLINE void write(S* p, Twice<U> v, int n) {
    store_part<S>(p, v.a, n);
    store_part<S>(p + kHalf, v.b, n - kHalf);
  }
  template <class S>
  static FASTLSTM_INLINE Twice<U> rounded(Twice<U> v) {
    return {round_to<S>(v.a), round_to<S>(v.b)};
  }
};
// How many lanes of T a V has.
template <class T, class V>
constexpr int kLanes = int(sizeof(V) / sizeof(T));

// A row of gates in the weights' order is [i, f, g, o][units]. Of n units from the one at `first`
// on, the vectors of the four gates:
template <class V>
struct Gates {
  V i, f, g, o;
};
template <class V, class S>
FASTLSTM_INLINE Gates<V> load_gates(const S* first, int64_t units, int n) {
  typedef Elements<V> At;
  return {At::read(first, n), At::read(first + units, n), At::read(first + 2 * units, n),
          At::read(first + 3 * units, n)};
}
template <class V, class S>
FASTLSTM_INLINE void store_gates(S* first, int64_t units, int n, const Gates<V>& gates) {
  typedef Elements<V> At;
  At::write(first, gates.i, n);
  At::write(first + units, gates.f, n);
  At::write(first + 2 * units, gates.g, n);
  At::write(first + 3 * units, gates.o, n);
}

// The rules of the vector of units that begins at `unit`, in the row that `keys` belong to.
template <class T>
FASTLSTM_INLINE CellRules<Vec<T>> rules_of(const DrawnRules<T>& drawn, const RuleRow& keys,
                                           int64_t unit) {
  auto factor = [&](const DrawnFactor<T>& from, uint32_t key) {
    if (from.seed == nullptr) return Vec<T>{} + from.kept;
    T lanes[kWidth<T>];
    for (int j = 0; j < kWidth<T>; ++j) lanes[j] = from.at(key, unit + j);
    return load(lanes);
  };
  CellRules<Vec<T>> rules;
  rules.update = factor(drawn.update, keys.update);
  rules.clip = Vec<T>{} + drawn.clip;
  rules.new_c = factor(drawn.new_c, keys.new_c);
  rules.new_h = factor(drawn.new_h, keys.new_h);
  return rules;
}

}  // namespace
}  // namespace fastlstm

// The gradients of a chunk of rows, between the steps that make them and the products that sum
// them.
#pragma once

#include "norm.h"
#include "panels.h"

namespace fastlstm {
namespace {

// dgates: gradients of the pre-activations. With a projection, dh: gradients of h. With layer
// normalisation, dz_x and dz_h: gradients of W_ih x and W_hh h; and the terms of the gains'
// gradients.
template <class E>
struct Chunk {
  typedef Acc<E> T;

  static int64_t row_bytes(const Problem& p) {
    const int64_t gates = row_stride<E>(4 * p.hidden_size) * int64_t(sizeof(E));
    return p.layer_norm ? 3 * gates + norm_terms(p.hidden_size) * int64_t(sizeof(T)) : gates;
  }
  void reset(const Problem& p, int64_t most_rows) {
    const int64_t gates = 4 * p.hidden_size;
    gates_stride = row_stride<E>(gates);
    reset_rows(dgates, most_rows, gates, gates_stride);
    normed = p.layer_norm;
    if (normed) {
      reset_rows(dz_x, most_rows, gates, gates_stride);
      reset_rows(dz_h, most_rows, gates, gates_stride);
      terms.reset(most_rows * norm_terms(p.hidden_size));
    }
    if (p.projected) {
      dh_stride = row_stride<E>(p.out_size);
      reset_rows(dh, most_rows, p.out_size, dh_stride);
    }
  }
  // Rows of n elements, with zeros up to the packed depth of their products.
  static void reset_rows(Buffer<E>& to, int64_t rows, int64_t n, int64_t stride) {
    to.reset(rows * stride);
    const int64_t rest = packed_depth<E>(n) - n;
    for (int64_t r = 0; rest > 0 && r < rows; ++r)
      memset(to.get() + r * stride + n, 0, size_t(rest) * sizeof(E));
  }
  // What is multiplied by W_ih and by the input, and what by W_hh and by h.
  const Buffer<E>& to_input() const { return normed ? dz_x : dgates; }
  const Buffer<E>& to_hidden() const { return normed ? dz_h : dgates; }
  // Of row r of the problem.
  E* gates_row(const Buffer<E>& of, int64_t r) const {
    return of.get() + (r - first) * gates_stride;
  }
  E* dh_row(int64_t r) const { return dh.get() + (r - first) * dh_stride; }

  Buffer<E> dgates, dh, dz_x, dz_h;
  Buffer<T> terms;
  bool normed = false;
  int64_t gates_stride = 0, dh_stride = 0;
  int64_t first = 0, rows = 0;  // rows [first, first + rows) of the problem
};

}  // namespace
}  // namespace fastlstm

// One direction of one layer: its order of steps, and where its states and what forward saves are.
#pragma once

#include "../lstm.h"
#include "vec.h"

namespace fastlstm {
namespace {

template <class S>
struct PseudoLayer {
  typedef Acc<S> T;

  PseudoLayer(const Problem& p, const Saved& saved, int layer_, int direction_)
      : layer(layer_),
        direction(direction_),
        number(int64_t(layer) * p.directions + direction),
        steps(p.steps),
        batch(p.batch),
        gates_stride(saved_per_unit(p.layer_norm) * p.hidden_size),
        output_stride(p.directions * p.out_size) {
    gates = part<S>(saved.gates, p.rows * gates_stride);
    cell_states = part<T>(saved.cell_states, p.rows * p.hidden_size);
    output = layer == p.layers - 1 ? static_cast<S*>(saved.output)
                                   : static_cast<S*>(saved.hidden) + layer * p.rows * output_stride;
    output += direction * p.out_size;
  }

  // The step that is number s in this direction's order, and the one before step t.
  int64_t time(int64_t s) const { return direction == 0 ? s : steps - 1 - s; }
  int64_t before(int64_t t) const { return direction == 0 ? t - 1 : t + 1; }

  // This pseudo-layer's part of an array that holds `size` elements for each; null of null.
  template <class E>
  const E* part(const void* all, int64_t size) const {
    return all ? static_cast<const E*>(all) + number * size : nullptr;
  }
  template <class E>
  E* part(void* all, int64_t size) const {
    return all ? static_cast<E*>(all) + number * size : nullptr;
  }
  // The same of states such as h0, c0, h_n or c_n, `width` elements for each sequence.
  const S* states(const void* all, int64_t width) const { return part<S>(all, batch * width); }
  S* states(void* all, int64_t width) const { return part<S>(all, batch * width); }

  const int layer, direction;
  const int64_t number, steps, batch;
  const int64_t gates_stride, output_stride;
  S* gates;        // (rows, gates_stride), or null for inference: lstm.h has a row's layout
  T* cell_states;  // (rows, H), or null for inference
  S* output;       // row 0 of this direction; rows are output_stride apart
};

}  // namespace
}  // namespace fastlstm

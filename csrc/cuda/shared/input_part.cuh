// What every forward pass computes before its steps: the input part of a layer's pre-activations,
// x W_ih^T, for all steps at once, and the sums of biases.
//
// The input part is one large product or, for index input, a table of W_ih's columns. It is kept in
// the accumulation type, so that no gate is rounded before its activation. The gates of a row are
// in the order of W_ih, or by slots: one slot for each CTA that runs the layer, so that a CTA's
// share of a row is contiguous and aligned. For the latter W_ih is packed first.
//
// Where layers work at once (layers.cuh), the first layer's input part is computed for all steps,
// that of the others chunk by chunk.
#pragma once

#include <vector>

#include "stack.cuh"

namespace fastlstm {
namespace cuda {

// A row of the input part by slots: [slot][i, f, g, o][units of the slot], where slots * units >= H
// and units beyond H are the last one again (existing_unit). Without slots: (4H).
struct SlotLayout {
  int slots = 0, units = 0;
};

template <class S>
class InputPart {
  typedef Acc<S> T;

 public:
  // For the first `layers` layers; the others need only their biases.
  InputPart(Stack<S>& stack, int layers, SlotLayout layout = {})
      : stack_(stack),
        p_(stack.problem),
        units_(p_.hidden_size),
        layout_(layout),
        table_(p_.input_size <= p_.rows) {
    if (!stack_.dense(0)) index_ = stack_.arena.template take<int>(p_.rows);
    if (biased()) bias_ = stack_.arena.template take<T>(pseudo_layers() * 4 * units_);
    if (!stack_.at_once()) memory_.push_back(take(0, layers));
    for (int layer = 0; stack_.at_once() && layer < layers; ++layer)
      memory_.push_back(take(layer, layer + 1));
  }

  // Before the first layer: the row tables, indices as 32-bit numbers, all sums of biases.
  void begin() const {
    stack_.fill_map();
    if (index_) stack_.fill_index(index_);
    if (biased()) add_biases();
  }

  // Computes the input part of all directions of a layer, at least for these steps. A layer's
  // ranges of steps come one after the other from the first on.
  void multiply_input(int layer, const StepRange& steps) {
    layer_ = layer;
    start_row_ = layer > 0 ? stack_.rows_of(steps).begin : 0;
    if (steps.begin == 0 && stack_.dense(layer) && packs(layer)) pack_weights();
    if (layer > 0)
      multiply_rows(stack_.rows_of(steps));
    else if (steps.begin == 0)
      stack_.dense(0) ? multiply_rows(stack_.all_rows()) : look_up();
  }

  // b_ih + b_hh of a pseudo-layer, (4H); null without biases.
  const T* bias(int64_t pseudo_layer) const {
    return biased() ? bias_ + pseudo_layer * 4 * units_ : nullptr;
  }

  // Where the pre-activations of direction d of the current layer start from: the input part, in
  // rows of start_stride(), and which row of the call its first one belongs to.
  T* start(int d) const { return memory().start[d]; }
  int64_t start_row() const { return start_row_; }
  int64_t start_stride() const {
    return 4 * (layout_.slots ? int64_t(layout_.slots) * layout_.units : units_);
  }
  // Whether that is a table of W_ih's columns.
  bool tabled(int layer) const { return !stack_.dense(layer) && table_; }
  // For each row of the input, which row of start() belongs to it; null: the same.
  const int* start_index(int layer) const { return tabled(layer) ? index_ : nullptr; }

 private:
  int64_t pseudo_layers() const { return int64_t(p_.layers) * p_.directions; }
  bool biased() const { return p_.weights[0].b_ih != nullptr; }

  void add_biases() const {
    for (int64_t begin = 0; begin < pseudo_layers(); begin += kBiasesOfLaunch) {
      BiasArgs<S> args{};
      const int64_t left = pseudo_layers() - begin;
      const int64_t count = left < kBiasesOfLaunch ? left : kBiasesOfLaunch;
      for (int64_t j = 0; j < count; ++j) {
        args.b_ih[j] = static_cast<const S*>(p_.weights[begin + j].b_ih);
        args.b_hh[j] = static_cast<const S*>(p_.weights[begin + j].b_hh);
      }
      args.sums = bias_ + begin * 4 * units_;
      args.count = int(4 * units_);
      const dim3 grid(blocks_of(4 * units_, kRowThreads), unsigned(count));
      stack_.run_kernel(bias_kernel<S>, grid, kRowThreads, 0, args);
    }
  }

  // Memory for one layer, or for several that do not work at once.
  struct Memory {
    S *copy, *packed[2];  // rows of x; W_ih by slots, with padded rows
    T* start[2];
  };
  Memory take(int begin, int end) {
    Arena& arena = stack_.arena;
    const int64_t of_upper =
        end > 1 ? (stack_.at_once() ? stack_.most_rows_of_chunk() : p_.rows) : 0;
    int64_t starts = of_upper, packed = 0;
    if (begin == 0) starts = max_of(starts, tabled(0) ? p_.input_size : p_.rows);
    for (int layer = begin; layer < end; ++layer)
      if (stack_.dense(layer) && packs(layer)) packed = max_of(packed, stack_.input_width(layer));
    Memory memory{};
    memory.copy =
        arena.template take<S>((begin == 0 ? p_.rows : of_upper) * stack_.copied_width(begin, end));
    for (int d = 0; d < p_.directions; ++d) {
      memory.start[d] = arena.template take<T>(starts * start_stride());
      memory.packed[d] = arena.template take<S>(start_stride() * whole_pieces<S>(packed));
    }
    return memory;
  }
  const Memory& memory() const { return memory_[stack_.at_once() ? layer_ : 0]; }

  GateOrder order() const {
    return layout_.slots ? GateOrder{int(units_), layout_.units} : kAsStored;
  }
  // Columns of W_ih: all of them, or one for every row.
  void look_up() const {
    PackArgs<S, T> args;  // rows are columns of W_ih
    args.k_stride = p_.input_size;
    args.row_stride = 1;
    args.rows = args.to_rows = table_ ? p_.input_size : p_.rows;
    args.to_stride = start_stride();
    args.depth = int(4 * units_);
    args.k_order = order();
    if (!table_) args.index = index_;
    for (int d = 0; d < p_.directions; ++d) {
      args.from[d] = weight(layer_, d);
      args.to[d] = memory().start[d];
    }
    stack_.pack(args);
  }
  void pack_weights() const {
    const int64_t width = stack_.input_width(layer_);
    PackArgs<S, S> args;
    args.row_stride = width;
    args.rows = 4 * units_;
    args.to_rows = start_stride();
    args.to_stride = whole_pieces<S>(width);
    args.depth = int(width);
    args.row_order = order();
    for (int d = 0; d < p_.directions; ++d) {
      args.from[d] = weight(layer_, d);
      args.to[d] = memory().packed[d];
    }
    stack_.pack(args);
  }
  void multiply_rows(const RowRange& rows) const {
    const InputRows<S> x = stack_.input(layer_, memory().copy, rows);
    for (int d = 0; d < p_.directions; ++d) {
      const S* w_ih = packs(layer_) ? memory().packed[d] : weight(layer_, d);
      stack_.multiply(rows.count, start_stride(), x.width, row_major(x.data, x.stride),
                      transposed(w_ih, x.width), memory().start[d]);
    }
  }

  const S* weight(int layer, int d) const {
    return static_cast<const S*>(p_.weights[layer * p_.directions + d].w_ih);
  }
  // Whether W_ih is packed before it is multiplied.
  bool packs(int layer) const {
    const int64_t width = stack_.input_width(layer);
    for (int d = 0; d < p_.directions; ++d)
      if (!in_pieces<S>(weight(layer, d), width, width)) return true;
    return layout_.slots > 0;
  }

  Stack<S>& stack_;
  const Problem& p_;
  const int64_t units_;
  const SlotLayout layout_;
  const bool table_;  // index input: each column of W_ih once, instead of one for every row
  int* index_ = nullptr;
  T* bias_ = nullptr;
  std::vector<Memory> memory_;
  int layer_ = 0;          // the current layer
  int64_t start_row_ = 0;  // which row its start() begins with
};

}  // namespace cuda
}  // namespace fastlstm

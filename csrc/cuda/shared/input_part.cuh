// What every forward pass computes before its steps: the input part of a layer's pre-activations,
// x W_ih^T, for all steps at once, and the sums of biases.
//
// The input part is one large product or, for index input, a table of W_ih's columns. It is kept in
// the accumulation type, so that no gate is rounded before its activation. The gates of a row are
// in the order of W_ih, or by slots: one slot for each CTA that runs the layer, so that a CTA's
// share of a row is contiguous and aligned. For the latter W_ih is packed first.
#pragma once

#include "stack.cuh"

namespace fastlstm {
namespace cuda {

// A row of the input part by slots: [slot][i, f, g, o][units of the slot], where slots * units >= H
// and units beyond H are zero. Without slots: (4H).
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
    Arena& arena = stack_.arena;
    int64_t most = 0, packed = 0;
    for (int layer = 0; layer < layers; ++layer) {
      const int64_t n = tabled(layer) ? p_.input_size : p_.rows;
      if (n > most) most = n;
      if (stack_.dense(layer) && packs(layer) && stack_.input_width(layer) > packed)
        packed = stack_.input_width(layer);
    }
    if (!stack_.dense(0)) index_ = arena.template take<int>(p_.rows);
    copy_ = arena.template take<S>(stack_.copied_input());
    for (int d = 0; d < p_.directions; ++d)
      start_[d] = arena.template take<T>(most * start_stride());
    if (biased()) bias_ = arena.template take<T>(pseudo_layers() * 4 * units_);
    for (int d = 0; d < p_.directions; ++d)
      packed_[d] = arena.template take<S>(start_stride() * whole_pieces<S>(packed));
  }

  // Before the first layer: the row tables, indices as 32-bit numbers, all sums of biases.
  void begin() const {
    stack_.fill_map();
    if (index_) stack_.fill_index(index_);
    if (biased()) add_biases();
  }

  // Computes the input part of all directions of a layer.
  void multiply_input(int layer) const {
    const GateOrder order = layout_.slots ? GateOrder{int(units_), layout_.units} : kAsStored;
    if (!stack_.dense(layer)) {
      const int64_t n = table_ ? p_.input_size : p_.rows;
      PackArgs<S, T> args;  // rows are columns of W_ih
      args.k_stride = p_.input_size;
      args.row_stride = 1;
      args.rows = args.to_rows = n;
      args.to_stride = start_stride();
      args.depth = int(4 * units_);
      args.k_order = order;
      if (!table_) args.index = index_;
      for (int d = 0; d < p_.directions; ++d) {
        args.from[d] = weight(layer, d);
        args.to[d] = start_[d];
      }
      return stack_.pack(args);
    }
    const InputRows<S> x = stack_.input(layer, copy_);
    const int64_t width = stack_.input_width(layer);
    if (packs(layer)) {
      PackArgs<S, S> args;
      args.row_stride = width;
      args.rows = 4 * units_;
      args.to_rows = start_stride();
      args.to_stride = x.width;
      args.depth = int(width);
      args.row_order = order;
      for (int d = 0; d < p_.directions; ++d) {
        args.from[d] = weight(layer, d);
        args.to[d] = packed_[d];
      }
      stack_.pack(args);
    }
    for (int d = 0; d < p_.directions; ++d) {
      const S* w_ih = packs(layer) ? packed_[d] : weight(layer, d);
      stack_.multiply(p_.rows, start_stride(), x.width, row_major(x.data, x.stride),
                      transposed(w_ih, x.width), start_[d]);
    }
  }

  // b_ih + b_hh of a pseudo-layer, (4H); null without biases.
  const T* bias(int64_t pseudo_layer) const {
    return biased() ? bias_ + pseudo_layer * 4 * units_ : nullptr;
  }

  // Where the pre-activations of direction d start from: the input part, in rows of start_stride().
  T* start(int d) const { return start_[d]; }
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
  S *copy_, *packed_[2];  // rows of x; W_ih by slots, with padded rows
  T *start_[2], *bias_ = nullptr;
};

}  // namespace cuda
}  // namespace fastlstm

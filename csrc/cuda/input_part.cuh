// What every forward pass does before its steps: the input's part of a layer's pre-activations, as
// one large product (or, for index input, a table of W_ih's columns), kept in the accumulation type
// so that no gate is rounded before its activation; and the biases' sum. A row of that part has its
// gates as W_ih has them, or by slots: one for each CTA that runs the layer, so that a CTA's share
// of a row is one aligned piece. For that, W_ih is packed first.
#pragma once

#include "stack.cuh"

namespace fastlstm {
namespace cuda {

// A row of the input's part by slots: [slot][i, f, g, o][units of the slot], where slots * units >=
// H and what is beyond H is zero. Without slots: (4H).
struct SlotLayout {
  int slots = 0, units = 0;
};

template <class S>
class InputPart {
  typedef Acc<S> T;

 public:
  // Of layers whose number is below `layers`; the others need only biases.
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
    for (int d = 0; d < p_.directions; ++d) start_[d] = arena.template take<T>(most * start_wide());
    if (biased()) bias_ = arena.template take<T>(cells() * 4 * units_);
    for (int d = 0; d < p_.directions; ++d)
      packed_[d] = arena.template take<S>(start_wide() * whole_pieces<S>(packed));
  }

  // Before the first layer: what all of them share, and their biases.
  void begin() const {
    stack_.fill_map();
    if (index_) stack_.fill_index(index_);
    if (biased()) add_biases();
  }

  // Fills start() of both directions.
  void multiply_input(int layer) const {
    const GateOrder order = layout_.slots ? GateOrder{int(units_), layout_.units} : kAsStored;
    if (!stack_.dense(layer)) {
      const int64_t n = table_ ? p_.input_size : p_.rows;
      PackArgs<S, T> args{{}, {},           nullptr,         1,         p_.input_size, n,
                          n,  start_wide(), int(4 * units_), kAsStored, order};
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
      PackArgs<S, S> args{{},           {},      nullptr,    width, 1,        4 * units_,
                          start_wide(), x.width, int(width), order, kAsStored};
      for (int d = 0; d < p_.directions; ++d) {
        args.from[d] = weight(layer, d);
        args.to[d] = packed_[d];
      }
      stack_.pack(args);
    }
    for (int d = 0; d < p_.directions; ++d)
      stack_.gemm({dtype_of<S>(),
                   dtype_of<T>(),
                   p_.rows,
                   start_wide(),
                   x.width,
                   {x.data, x.stride, 1},
                   {packs(layer) ? packed_[d] : weight(layer, d), 1, x.width},
                   start_[d]});
  }

  // b_ih + b_hh of a cell (layer * directions + direction), (4H); null without biases.
  const T* bias(int64_t cell) const { return biased() ? bias_ + cell * 4 * units_ : nullptr; }

  // The input's part of direction d: rows of start_wide() numbers.
  T* start(int d) const { return start_[d]; }
  int64_t start_wide() const {
    return 4 * (layout_.slots ? int64_t(layout_.slots) * layout_.units : units_);
  }
  // Whether it is a table of W_ih's columns.
  bool tabled(int layer) const { return !stack_.dense(layer) && table_; }
  // Which of its rows belongs to a row of the input: its own (null) or that of its index.
  const int* start_index(int layer) const { return tabled(layer) ? index_ : nullptr; }

 private:
  int64_t cells() const { return int64_t(p_.layers) * p_.directions; }
  bool biased() const { return p_.weights[0].b_ih != nullptr; }

  void add_biases() const {
    for (int64_t begin = 0; begin < cells(); begin += kBiasCells) {
      BiasArgs<S> args{};
      const int64_t count = cells() - begin < kBiasCells ? cells() - begin : kBiasCells;
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
  // Whether W_ih is not multiplied as it stands.
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
  const bool table_;  // index input: W_ih's columns once, or gathered for every row
  int* index_ = nullptr;
  S *copy_, *packed_[2];  // rows of x; W_ih by slots, its rows padded
  T *start_[2], *bias_ = nullptr;
};

}  // namespace cuda
}  // namespace fastlstm

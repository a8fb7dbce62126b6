// Persistent backward pass, host side.
#pragma once

#include "gradient_part.cuh"
#include "persistent_backward.cuh"
#include "persistent_host.cuh"

namespace fastlstm {
namespace cuda {

template <class S>
class PersistentBackwardPass : GradientPart<S, true> {
  typedef GradientPart<S, true> Base;
  typedef Acc<S> T;
  using Base::arena, Base::dgates_, Base::f_, Base::gates_wide_, Base::p, Base::plan, Base::saved;
  using Base::units_, Base::upper_input_, Base::wide;

 public:
  PersistentBackwardPass(const Backward& f, const Plan& plan_, const Context* context)
      : Base(f, plan_, context),
        shape_(kPersistentShapes[plan.shape]),
        sizes_(persistent_sizes(units_, sizeof(S), shape_, false)),
        fragments_(int64_t(sizes_.slots) * 4 * shape_.units * sizes_.depth),
        exchange_(2 * 4 * p.batch * sizes_.depth),
        flags_count_(2 * int64_t(plan.groups) * sizes_.slots) {
    const int64_t partial = flags_count_ * 4 * cell_blocks(shape_) * 32;
    flags_ = arena.template take<unsigned>(p.directions * flags_count_);
    for (int d = 0; d < p.directions; ++d) {
      weights_[d] = arena.template take<S>(fragments_);
      exchange_of_[d] = arena.template take<S>(exchange_);
      partial_[d] = arena.template take<float2>(partial);
    }
  }

  int64_t workspace() const { return arena.used(); }

  void run() {
    this->run_layers([&](int layer) { steps(layer); });
  }

 private:
  void steps(int layer) {
    PersistentGradientArgs<S> args{};
    args.columns = sizes_.slots / 4;
    args.steps = int(p.steps);
    args.batch = int(p.batch);
    args.units = int(units_);
    args.quarter = int(sizes_.quarter);
    args.wide = sizes_.depth;
    args.output_wide = wide;
    args.dgates_wide = gates_wide_;
    args.limit = wait_limit();
    this->zero(flags_, p.directions * flags_count_ * int64_t(sizeof(unsigned)));
    for (int d = 0; d < p.directions; ++d) fill(args.cell[d], layer, d);
    for_groups(args, plan, [&] {
      with_shape(plan.shape,
                 [&](auto units, auto tiles) { start<units.value, tiles.value>(args); });
    });
  }

  template <int kUnits, int kTiles>
  void start(const PersistentGradientArgs<S>& args) const {
    if constexpr (runs_backward({kUnits, kTiles}))
      launch_cooperative(persistent_backward_kernel<S, kUnits, kTiles>,
                         dim3(unsigned(p.directions * args.active * sizes_.slots)),
                         kPersistentThreads, size_t(partial_bytes(shape_) + sizes_.weights),
                         this->stream(), args);
  }

  void fill(PersistentGradient<S>& cell, int layer, int d) {
    const int number = layer * p.directions + d;
    const bool top = layer == p.layers - 1;
    pack_fragments(this, weights_[d], p.weights[number].w_hh, units_, shape_, sizes_, true);
    cell.weights = weights_[d];
    cell.exchange = exchange_of_[d];
    cell.partial = partial_[d];
    cell.ready = flags_ + d * flags_count_;
    cell.sent = cell.ready + flags_count_ / 2;
    if (top && f_.grad_output)
      cell.grad_output = static_cast<const S*>(f_.grad_output) + d * units_;
    if (!top) cell.upper_input = upper_input_ + d * units_;
    cell.grad_h_n = part<S>(f_.grad_h_n, number, p.batch * units_);
    cell.grad_c_n = part<S>(f_.grad_c_n, number, p.batch * units_);
    cell.c0 = part<S>(p.c0, number, p.batch * units_);
    cell.gates = part<S>(saved.gates, number, p.rows * 4 * units_);
    cell.cells = part<T>(saved.cells, number, p.rows * units_);
    cell.dgates = dgates_[d];
    cell.grad_c0 = part<S>(f_.grad_c0, number, p.batch * units_);
    cell.direction = d;
    // Elements of K that no CTA writes are multiplied with zeros, which a NaN would survive.
    if (sizes_.depth != 4 * sizes_.quarter)
      this->zero(cell.exchange, exchange_ * int64_t(sizeof(S)));
  }

  const PersistentShape shape_;
  const PersistentSizes sizes_;
  const int64_t fragments_, exchange_, flags_count_;  // of one direction
  unsigned* flags_;
  S *weights_[2], *exchange_of_[2];
  float2* partial_[2];
};

template <class S>
int64_t persistent_backward_pass(const Backward& f, const Plan& plan, const Context* context) {
  PersistentBackwardPass<S> pass(f, plan, context);
  if (context) pass.run();
  return pass.workspace();
}

}  // namespace cuda
}  // namespace fastlstm

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
  using Base::arena, Base::dgates, Base::f_, Base::gates_wide_, Base::p, Base::plan, Base::saved;
  using Base::units_, Base::upper_input_, Base::wide;

 public:
  PersistentBackwardPass(const Backward& f, const Plan& plan_, const Context* context)
      : Base(f, plan_, context),
        shape_(kPersistentShapes[plan.shape]),
        sizes_(persistent_sizes(units_, sizeof(S), shape_, false)),
        fragments_(int64_t(sizes_.slots) * 4 * shape_.units * sizes_.depth),
        place_(4 * p.batch * sizes_.depth),
        flags_count_(2 * int64_t(plan.groups) * sizes_.slots) {
    const int64_t partial = flags_count_ * 4 * cell_blocks(shape_) * 32;
    flags_ = arena.template take<unsigned>(cells() * flags_count_);
    for (int j = 0; j < cells(); ++j) {
      for (int source = 0; source < (j < p.directions ? 1 : 2); ++source)
        weights_[j][source] = arena.template take<S>(fragments_);
      exchange_[j] = arena.template take<S>(places(j) * place_);
      partial_[j] = arena.template take<float2>(partial);
    }
  }

  int64_t workspace() const { return arena.used(); }

  void run() {
    this->run_layers([&](int top, int layers) { steps(top, layers); });
  }

 private:
  int cells() const { return plan.wave * p.directions; }
  // Of the dgates of cell j; a cell with one below it needs a place for every step.
  int64_t places(int j) const { return j + p.directions < cells() ? p.steps : 2; }

  void steps(int top, int layers) {
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
    args.cells = layers * p.directions;
    this->zero(flags_, cells() * flags_count_ * int64_t(sizeof(unsigned)));
    for (int j = 0; j < args.cells; ++j) fill(args, j, top - j / p.directions);
    for_groups(args, plan, [&] {
      with_shape(plan.shape,
                 [&](auto units, auto tiles) { start<units.value, tiles.value>(args); });
    });
  }

  template <int kUnits, int kTiles>
  void start(const PersistentGradientArgs<S>& args) const {
    if constexpr (runs_backward({kUnits, kTiles})) {
      const int sources = args.cells > p.directions ? 2 : 1;
      launch_cooperative(persistent_backward_kernel<S, kUnits, kTiles>,
                         dim3(unsigned(args.cells * args.active * sizes_.slots)),
                         kPersistentThreads, partial_bytes(shape_) + sources * sizes_.weights,
                         this->stream(), args);
    }
  }

  // Cell j of a launch: direction j of the only layer, or the layer j below a wavefront's first.
  void fill(PersistentGradientArgs<S>& args, int j, int layer) {
    PersistentGradient<S>& cell = args.cell[j];
    const int d = j % p.directions, number = layer * p.directions + d;
    pack_fragments(this, weights_[j][0], p.weights[number].w_hh, units_, shape_, sizes_, true);
    cell.weights[0] = weights_[j][0];
    cell.exchange = exchange_[j];
    cell.places = int(places(j));
    cell.partial = partial_[j];
    cell.ready = flags_ + j * flags_count_;
    cell.sent = cell.ready + flags_count_ / 2;
    if (j >= p.directions) {
      pack_fragments(this, weights_[j][1], p.weights[number + 1].w_ih, units_, shape_, sizes_,
                     true);
      cell.weights[1] = weights_[j][1];
      cell.above = exchange_[j - 1];
      cell.above_ready = args.cell[j - 1].ready;
      cell.dropout = this->dropout_of(layer);
    } else if (layer < p.layers - 1) {
      cell.upper_input = upper_input_ + d * units_;
    } else if (f_.grad_output) {
      cell.grad_output = static_cast<const S*>(f_.grad_output) + d * units_;
    }
    cell.grad_h_n = part<S>(f_.grad_h_n, number, p.batch * units_);
    cell.grad_c_n = part<S>(f_.grad_c_n, number, p.batch * units_);
    cell.c0 = part<S>(p.c0, number, p.batch * units_);
    cell.gates = part<S>(saved.gates, number, p.rows * 4 * units_);
    cell.cells = part<T>(saved.cells, number, p.rows * units_);
    cell.grad_cells = part<T>(f_.grad_cells, number, p.rows * units_);
    cell.dgates = dgates(layer, d);
    cell.grad_c0 = part<S>(f_.grad_c0, number, p.batch * units_);
    cell.direction = d;
    // Elements of K that no CTA writes are multiplied with zeros, which a NaN would survive.
    if (sizes_.depth != 4 * sizes_.quarter)
      this->zero(cell.exchange, places(j) * place_ * int64_t(sizeof(S)));
  }

  const PersistentShape shape_;
  const PersistentSizes sizes_;
  const int64_t fragments_, place_, flags_count_;  // of one cell
  unsigned* flags_;
  S *weights_[kMaxCells][kMaxSources], *exchange_[kMaxCells];
  float2* partial_[kMaxCells];
};

template <class S>
int64_t persistent_backward_pass(const Backward& f, const Plan& plan, const Context* context) {
  PersistentBackwardPass<S> pass(f, plan, context);
  if (context) pass.run();
  return pass.workspace();
}

}  // namespace cuda
}  // namespace fastlstm

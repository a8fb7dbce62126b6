// Persistent passes, host side: buffers, fragments and the cooperative launch.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "input_part.cuh"
#include "persistent_forward.cuh"

namespace fastlstm {
namespace cuda {

// How long a CTA waits for another before it ends the kernel, which also ends the context.
inline uint64_t wait_limit() {
  const char* given = std::getenv("FASTLSTM_WAIT_SECONDS");
  if (given == nullptr || *given == 0) return uint64_t(20e9);
  char* end = nullptr;
  const double seconds = std::strtod(given, &end);
  if (end == given || *end != 0 || !(seconds >= 0 && seconds <= 1e9))  // a NaN is neither
    throw std::invalid_argument(
        "fastlstm: FASTLSTM_WAIT_SECONDS: expected a number of seconds from 0 (no limit) to 1e9, "
        "got \"" +
        std::string(given) + "\"");
  // 0 alone is without a limit, however short the others.
  const uint64_t limit = uint64_t(seconds * 1e9);
  return seconds > 0 && limit == 0 ? 1 : limit;
}

// Calls f with the shape's numbers as constants.
template <int kIndex = 0, class F>
void with_shape(int index, F&& f) {
  if constexpr (kIndex < kPersistentShapeCount) {
    if (index == kIndex)
      f(std::integral_constant<int, kPersistentShapes[kIndex].units>(),
        std::integral_constant<int, kPersistentShapes[kIndex].tiles>());
    else
      with_shape<kIndex + 1>(index, f);
  }
}

// Calls launch() for the groups of sequences in turn, as many at a time as the plan lets run;
// `args` says which.
template <class Args, class Launch>
void for_groups(Args& args, const Plan& plan, Launch&& launch) {
  args.groups = plan.groups;
  for (args.first_group = 0; args.first_group < plan.groups; args.first_group += plan.active) {
    const int left = plan.groups - args.first_group;
    args.active = left < plan.active ? left : plan.active;
    launch();
  }
}

// A whole matrix (4H, H) as fragments, for all slots.
template <class S>
void pack_fragments(const Stack<S, true>* stack, S* to, const void* from, int64_t hidden_size,
                    PersistentShape shape, const PersistentSizes& sizes, bool backward) {
  FragmentArgs<S> args{};
  args.from = static_cast<const S*>(from);
  args.to = to;
  args.wide = hidden_size;
  args.chunks = int64_t(sizes.slots) * sizes.weights / 16;
  args.hidden_size = int(hidden_size);
  args.units = shape.units;
  args.slabs = int(sizes.depth * int64_t(sizeof(S)) / 64);
  args.backward = backward;
  args.quarter = int(sizes.quarter);
  args.columns = sizes.slots / 4;
  stack->run_kernel(fragment_kernel<S>, dim3(blocks_of(args.chunks, 256)), 256, 0, args);
}

template <class S>
class PersistentForwardPass : InputPart<S, true> {
  typedef InputPart<S, true> Base;
  typedef Acc<S> T;
  using Base::arena, Base::p, Base::plan, Base::saved, Base::start_, Base::units_, Base::wide;

 public:
  PersistentForwardPass(const Forward& f, const Plan& plan_, const Context* context)
      : Base(f, plan_, context, f.problem.layers),
        f_(f),
        shape_(kPersistentShapes[plan.shape]),
        sizes_(persistent_sizes(units_, sizeof(S), shape_, true)),
        k_(sizes_.depth),
        slots_(sizes_.slots),
        fragments_(slots_ * 4 * shape_.units * k_),
        exchange_((p.steps + 1) * p.batch * k_) {
    const int cells = plan.wave * p.directions;
    flags_ = arena.template take<unsigned>(flags());
    for (int j = 0; j < cells; ++j) {
      bias_[j] = this->take_bias();
      h_[j] = arena.template take<S>(exchange_);
      dropped_[j] = arena.template take<S>(p.dropout > 0 && j + 1 < plan.wave ? exchange_ : 0);
      for (int source = 0; source < (j < p.directions ? 1 : 2); ++source)
        weights_[j][source] = arena.template take<S>(fragments_);
    }
  }

  int64_t workspace() const { return arena.used(); }

  void run() {
    this->begin();
    for (int layer = 0; layer < p.layers; layer += plan.wave)
      wave(layer, p.layers - layer < plan.wave ? p.layers - layer : plan.wave);
  }

 private:
  int64_t flags() const { return int64_t(plan.wave) * p.directions * plan.groups * slots_; }

  void wave(int first_layer, int layers) {
    PersistentArgs<S> args{};
    args.cells = layers * p.directions;
    args.slots = slots_;
    args.steps = int(p.steps);
    args.batch = int(p.batch);
    args.units = int(units_);
    args.wide = k_;
    args.y_wide = wide;
    args.limit = wait_limit();
    this->multiply_input(first_layer);
    this->zero(flags_, flags() * int64_t(sizeof(unsigned)));
    for (int j = 0; j < args.cells; ++j) fill(args, j, first_layer + j / p.directions);
    const int sources = layers > 1 ? 2 : 1;
    const size_t shared = partial_bytes(shape_) + sources * sizes_.weights;
    for_groups(args, plan, [&] {
      with_shape(plan.shape, [&](auto units, auto tiles) {
        launch_cooperative(persistent_forward_kernel<S, units.value, tiles.value>,
                           dim3(unsigned(args.cells * args.active * args.slots)),
                           kPersistentThreads, shared, this->stream(), args);
      });
    });
  }

  // Cell j of a launch: direction j of the only layer, or layer j of a wavefront.
  void fill(PersistentArgs<S>& args, int j, int layer) {
    PersistentCell<S>& cell = args.cell[j];
    const int d = j % p.directions, number = layer * p.directions + d;
    const CellWeights& w = p.weights[number];
    const bool upper = j >= p.directions;
    cell.sources = upper ? 2 : 1;
    cell.source[0] = cell.h = h_[j];
    cell.flags[0] = cell.own = flags_ + int64_t(j) * plan.groups * slots_;
    pack_fragments(this, weights_[j][0], w.w_hh, units_, shape_, sizes_, false);
    cell.weights[0] = weights_[j][0];
    if (upper) {
      cell.source[1] = this->dropped(layer) ? dropped_[j - 1] : h_[j - 1];
      cell.flags[1] = args.cell[j - 1].own;
      pack_fragments(this, weights_[j][1], w.w_ih, units_, shape_, sizes_, false);
      cell.weights[1] = weights_[j][1];
    } else {
      cell.start = start_[d];
      cell.index = this->start_index(layer);
    }
    if (j + p.directions < args.cells && this->dropped(layer + 1)) {
      cell.dropped = dropped_[j];
      cell.dropout = this->dropout_of(layer);
    }
    cell.direction = d;
    this->add_biases(number, bias_[j]);
    cell.bias = w.b_ih ? bias_[j] : nullptr;
    cell.c0 = part<S>(p.c0, number, p.batch * units_);
    cell.y = this->layer_output(layer) + d * units_;
    cell.gates = part<S>(saved.gates, number, p.rows * 4 * units_);
    cell.cells = part<T>(saved.cells, number, p.rows * units_);
    cell.h_n = part<S>(f_.h_n, number, p.batch * units_);
    cell.c_n = part<S>(f_.c_n, number, p.batch * units_);

    // Columns that no CTA writes are multiplied with zeros, which a NaN would survive.
    const bool whole = k_ == int64_t(slots_) * shape_.units && k_ == units_;
    if (!whole) this->zero(cell.h, exchange_ * int64_t(sizeof(S)));
    if (!whole && cell.dropped) this->zero(cell.dropped, exchange_ * int64_t(sizeof(S)));
    if (const S* h0 = part<S>(p.h0, number, p.batch * units_))
      this->pack(
          PackArgs<S, S>{h0, cell.h, nullptr, units_, 1, p.batch, p.batch, k_, int(units_), 0});
    else
      this->zero(cell.h, p.batch * k_ * int64_t(sizeof(S)));
  }

  const Forward& f_;
  const PersistentShape shape_;
  const PersistentSizes sizes_;
  const int64_t k_;  // elements of a padded row of h
  const int slots_;
  const int64_t fragments_, exchange_;  // elements
  unsigned* flags_;
  T* bias_[kMaxCells];
  S *h_[kMaxCells], *dropped_[kMaxCells], *weights_[kMaxCells][kMaxSources];
};

template <class S>
int64_t persistent_forward_pass(const Forward& f, const Plan& plan, const Context* context) {
  PersistentForwardPass<S> pass(f, plan, context);
  if (context) pass.run();
  return pass.workspace();
}

}  // namespace cuda
}  // namespace fastlstm

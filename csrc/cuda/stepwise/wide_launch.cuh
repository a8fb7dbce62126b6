// Launches wide steps (wide_step.cuh): takes the memory of their operands, packs these once a
// layer, and chooses how many CTAs form a cluster.
#pragma once

#include "../shared/patience.h"
#include "step_launcher.cuh"
#include "wide_pack.cuh"

namespace fastlstm {
namespace cuda {

template <class S, bool kTensor>
class WideLauncher {
  typedef StepLauncher<S, kTensor> Launcher;
  static constexpr bool kExists = kTensor && sizeof(S) == 2;

 public:
  explicit WideLauncher(Stack<S>& stack) : stack_(stack), p_(stack.problem) {
    if (!used()) return;
    const WideTile tile = wide_tile(index());
    slots_ = blocks_of(p_.hidden_size, kWideUnits);
    blocks_ = int(tile.blocks_of(p_.hidden_size));
    weight_count_ = int64_t(slots_) * blocks_ * 4 * 32;
    hidden_count_ = int64_t(groups(p_.batch)) * blocks_ * (tile.sequences / 16) * 32;
    for (int d = 0; d < p_.directions; ++d) {
      weights_[d] = stack_.arena.template take<uint4>(weight_count_);
      for (uint4*& h : h_[d]) h = stack_.arena.template take<uint4>(hidden_count_);
    }
  }

  bool used() const { return kExists && stack_.plan.cell_tile >= kWideTile; }
  // A buffer of h, packed.
  S* h(int64_t step, int d) const { return reinterpret_cast<S*>(h_[d][step % 2]); }

  void pack(int layer) const {
    if constexpr (kExists) {
      WidePackArgs<S> args{};
      for (int d = 0; d < p_.directions; ++d) {
        const int64_t pseudo_layer = layer * p_.directions + d;
        args.w_hh[d] = static_cast<const S*>(p_.weights[pseudo_layer].w_hh);
        args.h0[d] = stack_.states(static_cast<const S*>(p_.h0), pseudo_layer, p_.hidden_size);
        args.weights[d] = weights_[d];
        for (int buffer = 0; buffer < 2; ++buffer) args.h[d][buffer] = h_[d][buffer];
      }
      args.units = int(p_.hidden_size);
      args.batch = int(p_.batch);
      args.blocks = blocks_;
      args.sequences = wide_tile(index()).sequences;
      args.weight_count = weight_count_;
      args.hidden_count = hidden_count_;
      const unsigned blocks = cuda::blocks_of(weight_count_ + hidden_count_, 256);
      stack_.run_kernel(wide_pack_kernel<S>,
                        dim3(blocks < 4096 ? blocks : 4096, unsigned(p_.directions)), 256, 0, args);
    }
  }

  // h of each direction's step: the operand is h_before.
  void step(const Launcher& launcher, const StepArgs<CellForwardStep<S>>& args) {
    if constexpr (kExists) {
      switch (index()) {
        case 0: return step_tile<0>(launcher, args);
        case 1: return step_tile<1>(launcher, args);
        default: return step_tile<2>(launcher, args);
      }
    }
  }

 private:
  int index() const { return stack_.plan.cell_tile - kWideTile; }
  unsigned groups(int64_t sequences) const {
    return cuda::blocks_of(sequences, wide_tile(index()).sequences);
  }

  template <int kIndex>
  void step_tile(const Launcher& launcher, const StepArgs<CellForwardStep<S>>& from) {
    typedef WideShape<S, kIndex> Shape;
    if (cluster_ == 0) cluster_ = stack_.plan.ctas ? stack_.plan.ctas : best_cluster<Shape>();
    WideArgs<S> args{};
    int most = 0;
    for (int d = 0; d < p_.directions; ++d) {
      args.step[d] = from.step[d];
      args.weights[d] = reinterpret_cast<const S*>(weights_[d]);
      args.active[d] = from.active[d];
      if (args.active[d] > most) most = args.active[d];
    }
    args.cluster = cluster_;
    args.slots = slots_;
    args.blocks = blocks_;
    args.limit = limit_;
    const dim3 grid(unsigned(round_up(slots_, cluster_)), groups(most), unsigned(p_.directions));
    launcher.run_clusters(wide_step_kernel<Shape>, grid, unsigned(cluster_), Shape::kThreads,
                          Shape::kSharedBytes, args);
  }

  // The larger a cluster, the fewer bytes come from the L2 cache; but where GPCs do not divide into
  // clusters, SMs stay idle, and some of the CTAs wait for others to end.
  template <class Shape>
  int best_cluster() const {
    int best = 1;
    int64_t fewest = 0;
    for (int cluster = kMostWideCtas; cluster >= 1; --cluster) {
      const int64_t clusters =
          int64_t(cuda::blocks_of(slots_, cluster)) * groups(p_.batch) * p_.directions;
      const int at_once = clusters_at_once(wide_step_kernel<Shape>, unsigned(cluster),
                                           Shape::kThreads, Shape::kSharedBytes);
      if (at_once < 1) continue;
      const int64_t rounds = (clusters + at_once - 1) / at_once;
      if (fewest > 0 && rounds >= fewest) continue;
      best = cluster;
      fewest = rounds;
    }
    return best;
  }

  Stack<S>& stack_;
  const Problem& p_;
  const uint64_t limit_ = wait_limit();
  int slots_ = 0, blocks_ = 0, cluster_ = 0;
  int64_t weight_count_ = 0, hidden_count_ = 0;  // of 16 bytes, for a direction
  uint4 *weights_[2], *h_[2][2];
};

}  // namespace cuda
}  // namespace fastlstm

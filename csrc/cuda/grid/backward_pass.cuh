// The backward pass over the grid on the host: one layer after the other from the last.
#pragma once

#include "../shared/gradient_part.cuh"
#include "../shared/patience.h"
#include "backward.cuh"
#include "pack.cuh"
#include "teams.h"

namespace fastlstm {
namespace cuda {

// Operand: of the steps' products; float is full fp32.
template <class S, class Operand = MmaElement<S>>
class GridBackwardPass {
  typedef Acc<S> T;
  static constexpr bool kFp32 = std::is_same_v<Operand, float>;
  template <int kShape, int kBlocks>
  using Product = std::conditional_t<kFp32, GridBackwardFp32Product<kShape, kBlocks>,
                                     GridBackwardProduct<S, kShape, kBlocks>>;

 public:
  GridBackwardPass(const Backward& f, const Plan& plan, const Context* context)
      : f_(f),
        stack_(f.problem, f.saved, plan, context),
        p_(stack_.problem),
        gradients_(f, stack_, round_up(4 * p_.hidden_size, 16 / int64_t(sizeof(S))), 0),
        shape_(backward_shape(plan.shape, kFp32)),
        team_(backward_team(shape_, p_.hidden_size)),
        fragments_(int64_t(team_.ctas) * team_.blocks * shape_.slabs(sizeof(S)) *
                   kGridBlockFragments) {
    exchange_ = stack_.arena.template take<unsigned char>(plan.active * exchange_bytes());
    for (int d = 0; d < p_.directions; ++d)
      fragment_[d] = stack_.arena.template take<uint4>(fragments_);
  }

  int64_t workspace() const { return stack_.arena.used(); }

  void run() {
    gradients_.run_layers([&](int layer, const StepRange&) { steps(layer); });
  }

 private:
  // Bytes of a team's exchange.
  int64_t exchange_bytes() const { return team_.ctas * 2 * team_.received_bytes; }

  void steps(int layer) {
    GridBackwardArgs<S> args{};
    args.exchange = exchange_;
    args.groups = stack_.plan.groups;
    args.team = team_;
    args.steps = stack_.map.steps;
    args.units = int(p_.hidden_size);
    args.output_stride = stack_.output_width;
    args.dgates_stride = gradients_.dgates_stride();
    args.limit = wait_limit();
    args.aligned = p_.hidden_size * int64_t(sizeof(S)) % 16 == 0;
    pack(layer);
    for (int d = 0; d < p_.directions; ++d) args.direction[d] = direction(args, layer, d);
    const size_t shared = size_t(backward_shared(shape_, team_.warp_blocks, sizeof(S)));
    for_teams(p_.directions * args.groups, stack_.plan.active, [&](int first, int count) {
      stack_.zero(exchange_, count * exchange_bytes());
      args.first_team = first;
      with_index<backward_shape_count(kFp32)>(stack_.plan.shape, [&](auto index) {
        with_index<kGridBlockCounts>(block_choice(team_.blocks), [&](auto choice) {
          constexpr int kShape = index.value, kBlocks = kGridBlocks[choice.value];
          if constexpr (kBlocks <= backward_shape(kShape, kFp32).most_blocks(sizeof(S))) {
            launch_cooperative(grid_backward_kernel<Product<kShape, kBlocks>>,
                               dim3(unsigned(count * team_.ctas)), kGridThreads, shared,
                               stack_.stream(), args);
          }
        });
      });
    });
  }

  void pack(int layer) const {
    GridTransposeArgs<S> args{};
    args.shape = shape_;
    args.team = team_;
    args.units = int(p_.hidden_size);
    args.count = fragments_;
    for (int d = 0; d < p_.directions; ++d) {
      args.w_hh[d] = static_cast<const S*>(p_.weights[layer * p_.directions + d].w_hh);
      args.fragments[d] = fragment_[d];
    }
    stack_.run_kernel(team_transpose_kernel<S, Operand>,
                      dim3(blocks_of(fragments_, 256), unsigned(p_.directions)), 256, 0, args);
  }

  GridBackwardDirection<S> direction(GridBackwardArgs<S>& args, int layer, int d) const {
    const int64_t pseudo_layer = layer * p_.directions + d, units = p_.hidden_size;
    GridBackwardDirection<S> result{};
    result.fragments = fragment_[d];
    if (layer < p_.layers - 1)
      result.upper_input = gradients_.upper_input() + d * units;
    else if (f_.grad_output)
      result.grad_output = static_cast<const S*>(f_.grad_output) + d * units;
    result.grad_h_n = stack_.states(f_.grad_h_n, pseudo_layer, units);
    result.grad_c_n = stack_.states(f_.grad_c_n, pseudo_layer, units);
    result.c0 = stack_.states(p_.c0, pseudo_layer, units);
    result.gates = stack_.gates(pseudo_layer);
    result.cell_states = stack_.cell_states(pseudo_layer);
    result.grad_cell_states = part<T>(f_.grad_cell_states, pseudo_layer, p_.rows * units);
    result.dgates = gradients_.dgates(d);
    result.grad_c0 = stack_.states(f_.grad_c0, pseudo_layer, units);
    result.dh_zoneout = gradients_.dh_zoneout(d);
    result.rules = drawn_rules<T>(p_, layer, d);
    for (const void* memory :
         {static_cast<const void*>(result.grad_output), static_cast<const void*>(result.gates),
          static_cast<const void*>(result.cell_states),
          static_cast<const void*>(result.grad_cell_states)})
      args.aligned = args.aligned && reinterpret_cast<uintptr_t>(memory) % 16 == 0;
    return result;
  }

  const Backward& f_;
  Stack<S> stack_;
  const Problem& p_;
  GradientPart<S> gradients_;
  const GridBackwardShape shape_;
  const GridBackwardTeam team_;
  const int64_t fragments_;  // of a direction, 16 bytes each
  unsigned char* exchange_;
  uint4* fragment_[2];
};

}  // namespace cuda
}  // namespace fastlstm

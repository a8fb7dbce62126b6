// Backward pass over the grid, host side: one layer after the other from the last.
#pragma once

#include "../gradient_part.cuh"
#include "../patience.h"
#include "backward.cuh"
#include "pack.cuh"
#include "teams.h"

namespace fastlstm {
namespace cuda {

template <class S>
class GridBackwardPass {
  typedef Acc<S> T;

 public:
  GridBackwardPass(const Backward& f, const Plan& plan, const Context* context)
      : f_(f),
        stack_(f.problem, f.saved, plan, context),
        p_(stack_.problem),
        gradients_(f, stack_, round_up(4 * p_.hidden_size, 16 / int64_t(sizeof(S))), 0),
        shape_(kGridBackward[plan.shape]),
        team_(backward_team(shape_, p_.hidden_size)),
        fragments_(int64_t(team_.ctas) * team_.blocks * shape_.slabs(sizeof(S)) * 128) {
    exchange_ = stack_.arena.template take<unsigned char>(plan.active * exchanged());
    for (int d = 0; d < p_.directions; ++d)
      fragment_[d] = stack_.arena.template take<uint4>(fragments_);
  }

  int64_t workspace() const { return stack_.arena.used(); }

  void run() {
    gradients_.run_layers([&](int layer) { steps(layer); });
  }

 private:
  int64_t exchanged() const { return team_.ctas * 2 * team_.received_bytes; }  // of a team

  void steps(int number) {
    GridGradientArgs<S> args{};
    args.exchange = exchange_;
    args.groups = stack_.plan.groups;
    args.team = team_;
    args.steps = int(p_.steps);
    args.batch = int(p_.batch);
    args.units = int(p_.hidden_size);
    args.starts = stack_.map.first;
    args.output_wide = stack_.output_width;
    args.dgates_wide = gradients_.dgates_wide();
    args.limit = wait_limit();
    args.aligned = p_.hidden_size * int64_t(sizeof(S)) % 16 == 0;
    pack(number);
    for (int d = 0; d < p_.directions; ++d) args.cell[d] = cell(args, number, d);
    const size_t shared = size_t(backward_shared(shape_, team_.blocks, sizeof(S)));
    for_teams(p_.directions * args.groups, stack_.plan.active, [&](int first, int count) {
      stack_.zero(exchange_, count * exchanged());
      args.first_team = first;
      with_index<kGridBackwardCount>(stack_.plan.shape, [&](auto index) {
        launch_cooperative(grid_backward_kernel<S, index.value>, dim3(unsigned(count * team_.ctas)),
                           kGridThreads, shared, stack_.stream(), args);
      });
    });
  }

  void pack(int number) const {
    GridTransposeArgs<S> args{};
    args.shape = shape_;
    args.team = team_;
    args.units = int(p_.hidden_size);
    args.count = fragments_;
    for (int d = 0; d < p_.directions; ++d) {
      args.w_hh[d] = static_cast<const S*>(p_.weights[number * p_.directions + d].w_hh);
      args.fragments[d] = fragment_[d];
    }
    stack_.run_kernel(team_transpose_kernel<S>,
                      dim3(blocks_of(fragments_, 256), unsigned(p_.directions)), 256, 0, args);
  }

  GridGradient<S> cell(GridGradientArgs<S>& args, int number, int d) const {
    const int64_t at = number * p_.directions + d, units = p_.hidden_size;
    GridGradient<S> cell{};
    cell.fragments = fragment_[d];
    if (number < p_.layers - 1)
      cell.upper_input = gradients_.upper_input() + d * units;
    else if (f_.grad_output)
      cell.output = static_cast<const S*>(f_.grad_output) + d * units;
    cell.h_n = stack_.states(f_.grad_h_n, at, units);
    cell.c_n = stack_.states(f_.grad_c_n, at, units);
    cell.c0 = stack_.states(p_.c0, at, units);
    cell.gates = stack_.gates(at);
    cell.cells = stack_.cells(at);
    cell.of_cells = part<T>(f_.grad_cells, at, p_.rows * units);
    cell.dgates = gradients_.dgates(d);
    cell.grad_c0 = stack_.states(f_.grad_c0, at, units);
    cell.dh_stays = gradients_.dh_stays(d);
    cell.rules = drawn_rules<T>(p_, number, d);
    for (const void* memory :
         {static_cast<const void*>(cell.output), static_cast<const void*>(cell.gates),
          static_cast<const void*>(cell.cells), static_cast<const void*>(cell.of_cells)})
      args.aligned = args.aligned && reinterpret_cast<uintptr_t>(memory) % 16 == 0;
    return cell;
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

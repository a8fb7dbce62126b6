// Forward pass over the grid, host side: one layer after the other, both directions side by side
// where the GPU holds their teams.
#pragma once

#include "../input_part.cuh"
#include "../patience.h"
#include "forward.cuh"
#include "pack.cuh"
#include "teams.h"

namespace fastlstm {
namespace cuda {

template <class S>
class GridForwardPass {
  typedef Acc<S> T;

 public:
  GridForwardPass(const Forward& f, const Plan& plan, const Context* context)
      : f_(f),
        stack_(f.problem, f.saved, plan, context),
        p_(stack_.problem),
        shape_(kGridForward[plan.shape]),
        team_(forward_team(shape_, p_.hidden_size, sizeof(S))),
        input_(stack_, p_.layers, {team_.ctas, shape_.units}),
        fragments_(int64_t(team_.ctas) * team_.slabs * shape_.blocks() * 128),
        packets_(plan.groups * team_.slot_bytes / 16) {
    Arena& arena = stack_.arena;
    exchange_ = arena.template take<unsigned char>(plan.active * 2 * team_.slot_bytes);
    for (int d = 0; d < p_.directions; ++d) {
      fragment_[d] = arena.template take<uint4>(fragments_);
      packet_[d] = arena.template take<uint4>(p_.h0 ? packets_ : 0);
    }
  }

  int64_t workspace() const { return stack_.arena.used(); }

  void run() {
    input_.begin();
    for (int number = 0; number < p_.layers; ++number) layer(number);
  }

 private:
  void layer(int number) {
    input_.multiply_input(number);
    GridForwardArgs<S> args{};
    args.exchange = exchange_;
    args.groups = stack_.plan.groups;
    args.team = team_;
    args.steps = int(p_.steps);
    args.batch = int(p_.batch);
    args.units = int(p_.hidden_size);
    args.starts = stack_.map.first;
    args.y_wide = stack_.output_width;
    args.limit = wait_limit();
    pack(number);
    for (int d = 0; d < p_.directions; ++d) args.cell[d] = cell(number, d);
    const size_t shared = size_t(forward_shared(shape_, team_.slabs));
    for_teams(p_.directions * args.groups, stack_.plan.active, [&](int first, int count) {
      stack_.zero(exchange_, count * 2 * team_.slot_bytes);
      args.first_team = first;
      with_index<kGridForwardCount>(stack_.plan.shape, [&](auto index) {
        launch_cooperative(grid_forward_kernel<S, index.value>, dim3(unsigned(count * team_.ctas)),
                           kGridThreads, shared, stack_.stream(), args);
      });
    });
  }

  void pack(int number) const {
    GridPackArgs<S> args{};
    args.shape = shape_;
    args.team = team_;
    args.units = int(p_.hidden_size);
    args.batch = int(p_.batch);
    args.fragment_count = fragments_;
    args.packet_count = packets_;
    for (int d = 0; d < p_.directions; ++d) {
      const int64_t cell = number * p_.directions + d;
      args.direction[d] = {static_cast<const S*>(p_.weights[cell].w_hh),
                           stack_.states(p_.h0, cell, p_.hidden_size), fragment_[d], packet_[d]};
    }
    stack_.run_kernel(team_pack_kernel<S>,
                      dim3(blocks_of(fragments_ + packets_, 256), unsigned(p_.directions)), 256, 0,
                      args);
  }

  GridForwardCell<S> cell(int number, int d) const {
    const int64_t at = number * p_.directions + d, units = p_.hidden_size;
    GridForwardCell<S> cell{};
    cell.fragments = fragment_[d];
    cell.first = p_.h0 ? reinterpret_cast<const unsigned char*>(packet_[d]) : nullptr;
    cell.start = input_.start(d);
    cell.index = input_.start_index(number);
    cell.bias = input_.bias(at);
    cell.h0 = stack_.states(p_.h0, at, units);
    cell.c0 = stack_.states(p_.c0, at, units);
    cell.y = stack_.layer_output(number) + d * units;
    cell.gates = stack_.gates(at);
    cell.cells = stack_.cells(at);
    cell.h_n = stack_.states(f_.h_n, at, units);
    cell.c_n = stack_.states(f_.c_n, at, units);
    cell.rules = drawn_rules<T>(p_, number, d);
    return cell;
  }

  const Forward& f_;
  Stack<S> stack_;
  const Problem& p_;
  const GridShape shape_;
  const GridTeam team_;
  InputPart<S> input_;
  const int64_t fragments_, packets_;  // of a direction, 16 bytes each
  unsigned char* exchange_;
  uint4 *fragment_[2], *packet_[2];
};

}  // namespace cuda
}  // namespace fastlstm

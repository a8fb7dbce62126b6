// The forward pass over the grid on the host: one layer after the other, its directions side by
// side where the GPU holds the teams of both.
#pragma once

#include "../shared/input_part.cuh"
#include "../shared/patience.h"
#include "forward.cuh"
#include "pack.cuh"
#include "teams.h"

namespace fastlstm {
namespace cuda {

// Operand: of the steps' products; float is full fp32.
template <class S, class Operand = MmaElement<S>>
class GridForwardPass {
  typedef Acc<S> T;
  static constexpr bool kFp32 = std::is_same_v<Operand, float>;
  template <int kShape>
  using Product =
      std::conditional_t<kFp32, GridForwardFp32Product<kShape>, GridForwardProduct<S, kShape>>;

 public:
  GridForwardPass(const Forward& f, const Plan& plan, const Context* context)
      : f_(f),
        stack_(f.problem, f.saved, plan, context),
        p_(stack_.problem),
        shape_(forward_shape(plan.shape, kFp32)),
        team_(forward_team(shape_, p_.hidden_size, sizeof(S))),
        input_(stack_, p_.layers, {team_.ctas, shape_.units}),
        fragments_(int64_t(team_.ctas) * team_.slabs * shape_.blocks() * kGridBlockFragments),
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
    for (int layer = 0; layer < p_.layers; ++layer) advance(layer);
  }

 private:
  void advance(int layer) {
    input_.multiply_input(layer, stack_.all_steps());
    GridForwardArgs<S> args{};
    args.exchange = exchange_;
    args.groups = stack_.plan.groups;
    args.team = team_;
    args.steps = stack_.map.steps;
    args.units = int(p_.hidden_size);
    args.y_stride = stack_.output_width;
    args.aligned = in_pieces<S>(stack_.layer_output(layer), stack_.output_width, p_.hidden_size);
    args.limit = wait_limit();
    pack(layer);
    for (int d = 0; d < p_.directions; ++d) args.direction[d] = direction(layer, d);
    for_teams(p_.directions * args.groups, stack_.plan.active, [&](int first, int count) {
      stack_.zero(exchange_, count * 2 * team_.slot_bytes);
      args.first_team = first;
      with_index<forward_shape_count(kFp32)>(
          stack_.plan.shape, [&](auto index) { run_steps<index.value>(args, count); });
    });
  }

  // All steps of `count` teams.
  template <int kShape>
  void run_steps(const GridForwardArgs<S>& args, int count) const {
    const auto kernel = args.direction[0].rules.plain ? grid_forward_kernel<Product<kShape>, true>
                                                      : grid_forward_kernel<Product<kShape>, false>;
    launch_cooperative(kernel, dim3(unsigned(team_.ctas), unsigned(count)), kGridThreads,
                       size_t(forward_shared(shape_, team_.slabs)), stack_.stream(), args);
  }

  void pack(int layer) const {
    GridPackArgs<S> args{};
    args.shape = shape_;
    args.team = team_;
    args.units = int(p_.hidden_size);
    args.batch = int(p_.batch);
    args.fragment_count = fragments_;
    args.packet_count = packets_;
    for (int d = 0; d < p_.directions; ++d) {
      const int64_t pseudo_layer = layer * p_.directions + d;
      args.direction[d] = {static_cast<const S*>(p_.weights[pseudo_layer].w_hh),
                           stack_.states(p_.h0, pseudo_layer, p_.hidden_size), fragment_[d],
                           packet_[d]};
    }
    stack_.run_kernel(team_pack_kernel<S, Operand>,
                      dim3(blocks_of(fragments_ + packets_, 256), unsigned(p_.directions)), 256, 0,
                      args);
  }

  GridForwardDirection<S> direction(int layer, int d) const {
    const int64_t pseudo_layer = layer * p_.directions + d, units = p_.hidden_size;
    GridForwardDirection<S> result{};
    result.fragments = fragment_[d];
    result.h0_packets = p_.h0 ? reinterpret_cast<const unsigned char*>(packet_[d]) : nullptr;
    result.start = input_.start(d);
    result.index = input_.start_index(layer);
    result.bias = input_.bias(pseudo_layer);
    result.h0 = stack_.states(p_.h0, pseudo_layer, units);
    result.c0 = stack_.states(p_.c0, pseudo_layer, units);
    result.y = stack_.layer_output(layer) + d * units;
    result.gates = stack_.gates(pseudo_layer);
    result.cell_states = stack_.cell_states(pseudo_layer);
    result.h_n = stack_.states(f_.h_n, pseudo_layer, units);
    result.c_n = stack_.states(f_.c_n, pseudo_layer, units);
    result.rules = drawn_rules<T>(p_, layer, d);
    return result;
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

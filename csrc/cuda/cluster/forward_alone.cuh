// The forward cluster kernel where one CTA holds all of a layer's recurrent weights: it exchanges h
// through its own shared memory, and a step takes what its product, its cells and one barrier take.
// So all else stands where a warp would wait for one of these.
//
// Step v of a computing warp: product of h[v-1] | behind its first instructions: is the input part
// of step v+1 there, is a buffer for the outputs of step v-1 free | cells, and between them: the
// outputs of step v-1 to that buffer, the input part of step v+1 to registers | store h[v] |
// barrier v.
//
// Why no buffer is overwritten too early:
// - Buffers of h: h[v] overwrites h[v-2], which all warps had read before barrier v-1.
// - Outputs of step v are stored in step v+1, ahead of barrier v+1; behind it one thread arrives at
//   `filled` for all. They overwrite those of step v-2 after the movers have arrived at `freed`.
// - Input ring: the slot of step v is read in step v-1 (the first: before step 0), and refilled for
//   step v + kRing after the arrival at `filled` of step v.
#pragma once

#include "forward_cells.cuh"

namespace fastlstm {
namespace cuda {

#if FASTLSTM_SM90

template <class Shape>
__device__ __forceinline__ void compute_alone(const ClusterForwardCta<Shape>& cta) {
  typedef typename Shape::S S;
  typedef ForwardProduct<Shape> Product;
  typedef CellMath<typename Shape::Operand> Cell;
  constexpr int kCells = Shape::kCells;
  static_assert(Shape::kCtas == 1 && Shape::kGroups == 1 && !Shape::kStreams, "one CTA");
  const ClusterForwardDirection<S>& layer = cta.layer;
  const int hidden_size = cta.args.hidden_size, steps = cta.steps;

  const int thread = int(opaque(threadIdx.x));
  Product product(cta.shared, thread);
  const int unit = product.unit();
  product.load(layer.w_hh, hidden_size, 0);
  float c[kCells];
  S h[kCells];
  CellForward<float> out[kCells] = {};
  begin_states(cta, product, 0, unit, c, h);

  // Registers hold them: constants that a direction indexes take as long as a read of memory.
  const bool plain = opaque(layer.rules.plain), saves = opaque(layer.gates != nullptr);
  const StoredRules<Shape> rules(cta.shared, thread);
  if (!plain) rules.draw(layer.rules, product, cta.time_of_call(0), cta.begin, unit);

  // Where the input part and the outputs of a thread's first cell stand.
  auto input_at = [&](int step) {
    return uint32_t(step % Shape::kRing * Shape::kSequences + product.sequence(0)) *
               Shape::kInputBytes +
           unit * 4;
  };
  auto output_at = [&](int step) {
    return uint32_t((step & 1) * Shape::kSequences + product.sequence(0)) * Shape::kOutputBytes;
  };
  const float4 bias = *reinterpret_cast<const float4*>(cta.shared + Shape::kBiasAt + unit * 16);
  SequenceSpan span[kCells];
#pragma unroll
  for (int x = 0; x < kCells; ++x) span[x] = *cta.span(product.sequence(x));
  auto begin_sums = [&](uint32_t at, typename Product::Sums& sums) {
#pragma unroll
    for (int x = 0; x < kCells; ++x) {
      const float* input = reinterpret_cast<const float*>(
          cta.shared + Shape::kInputAt + at + Product::sequence_offset(x) * Shape::kInputBytes);
      sums[x][0] = input[0] + bias.x;
      sums[x][1] = input[Shape::kUnits] + bias.y;
      sums[x][2] = input[2 * Shape::kUnits] + bias.z;
      sums[x][3] = input[3 * Shape::kUnits] + bias.w;
    }
  };
  auto put_outputs = [&](uint32_t at, bool exists) {
    const bool saved = exists && saves;
#pragma unroll
    for (int x = 0; x < kCells; ++x) {
      unsigned char* const row =
          cta.shared + Shape::kOutputAt + at + Product::sequence_offset(x) * Shape::kOutputBytes;
      S* const to = reinterpret_cast<S*>(row) + unit;
      S gates[4];
      store_gates(out[x], gates, 1);  // converted outside of a branch
      if (exists) *to = h[x];
#pragma unroll
      for (int q = 0; q < 4; ++q)
        if (saved) to[(q + 1) * Shape::kUnits] = gates[q];
      if (saved)
        reinterpret_cast<float*>(row + 5 * Shape::kUnits * Shape::kElementBytes)[unit] = c[x];
    }
  };

  typename Product::Sums next;  // the input part of the next step, and the bias
  if (steps > 0) {
    wait(cta.loaded(0), 0, cta.args.limit);
    begin_sums(input_at(0), next);
  }
  // Of the two buffers of h, in a step: where a warp's fragments are, and where its cells go. Of
  // two addresses the other one is their sum less this one.
  uint32_t from = opaque(product.fragments_at()),
           to = opaque(Shape::kHiddenBytes + Shape::hidden_at(unit, product.sequence(0)));
  const uint32_t both_from = opaque(2 * from + Shape::kHiddenBytes),
                 both_to = opaque(2 * to - Shape::kHiddenBytes);

  // All steps. Where cells have no rules a step is one block of instructions: those that wait for
  // nothing fill the time of those that do. Only a wait that has to go on leaves it.
  auto run = [&](auto without_rules) {
    constexpr bool kPlain = decltype(without_rules)::value;
    for (int s = 0; s < steps; ++s) {
      const int following = s + 1 < steps ? s + 1 : s;
      bool ready;
      auto look = [&] {
        const bool loaded = try_wait(cta.loaded(following), following / Shape::kRing & 1);
        const bool freed = s < 3 || try_wait(cta.freed(s - 1), (s - 3) >> 1 & 1);
        ready = loaded && freed;
      };
      // Multiply-adds occupy a warp to the end of the product, mma does not.
      constexpr bool kOccupied = std::is_same_v<typename Shape::Operand, float>;
      if constexpr (kOccupied) look();
      product.multiply(cta.shared + from);
      if constexpr (!kOccupied) look();
      if (thread == 0 && s > 1) arrive(cta.filled(s - 2));
      uint32_t inputs = input_at(following), outputs = output_at(s + 1);  // those of step s - 1
      pin(inputs), pin(outputs);
      if (__builtin_expect(!ready, 0)) {
        wait(cta.loaded(following), following / Shape::kRing & 1, cta.args.limit);
        if (s >= 3) wait(cta.freed(s - 1), (s - 3) >> 1 & 1, cta.args.limit);
      }
      typename Product::Sums sums;
#pragma unroll
      for (int x = 0; x < kCells; ++x)
#pragma unroll
        for (int q = 0; q < 4; ++q) sums[x][q] = next[x][q];
      product.add(sums);
      put_outputs(outputs, s > 0);
      begin_sums(inputs, next);
#pragma unroll
      for (int x = 0; x < kCells; ++x) {
        // A sequence that is not in this step keeps its states.
        const bool in = span[x].enter <= s && s < span[x].leave;
        if constexpr (kPlain)
          out[x] = cell_forward<Cell>(sums[x][0], sums[x][1], sums[x][2], sums[x][3], c[x]);
        else
          out[x] = cell_forward<Cell>(sums[x][0], sums[x][1], sums[x][2], sums[x][3], c[x],
                                      to_acc(h[x]), rules.of(x, layer.rules.clip));
        if (in) {
          c[x] = out[x].c;
          from_acc(out[x].h, h[x]);
        }
        *reinterpret_cast<S*>(cta.shared + to + Product::hidden_offset(x)) = Shape::operand(h[x]);
      }
      from = both_from - from, to = both_to - to;
      pin(from), pin(to);  // computed here, not behind the barrier
      compute_barrier<Shape>();
      if constexpr (!kPlain) {
        if (s + 1 < steps)
          rules.draw(layer.rules, product, cta.time_of_call(s + 1), cta.begin, unit);
      }
    }
  };
  if (plain)
    run(std::true_type());
  else
    run(std::false_type());
  if (steps > 0) {
    const int last = steps - 1;
    if (last > 1) wait(cta.freed(last), (last - 2) >> 1 & 1, cta.args.limit);
    put_outputs(output_at(last), true);
    compute_barrier<Shape>();
    if (thread == 0) {
      if (last > 0) arrive(cta.filled(last - 1));
      arrive(cta.filled(last));
    }
  }
  if (unit < hidden_size) end_states(cta, product, 0, uint32_t(cta.begin), unit, c, h);
}

#endif

}  // namespace cuda
}  // namespace fastlstm

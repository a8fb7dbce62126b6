// The forward pass over the grid: one cooperative launch runs all steps of a layer that no cluster
// holds.
//
// What it computes: h_t and c_t of every step, from the input part and W_hh, by tensor cores or, in
// full fp32, by multiply-adds.
//
// Who owns what: a team of CTAs has a group of sequences and one direction; teams exchange nothing.
// A CTA owns some units: their weights for the whole sequence (forward_weights.cuh), and their
// cells, one or two to a thread of the first warps.
//
// What moves per step: every CTA sends the h of its units to a place in the L2 cache, and every CTA
// polls all of h, each element once, straight into the registers that are the product's operand.
// There are no flags and no fences: a word carries the phase of its step (phase.cuh). While h
// travels, all threads store the outputs of the step before and load the input part of later steps
// (forward_rows.cuh): between a step's send and the next polls stands one barrier.
//
// Step s: barrier | issue polls of h[s-1] | store outputs of step s-1, read the input part |
// barrier | load the input part of a later step | wait for h[s-1], multiply | hand over partial
// sums | barrier | add them, cells, send h[s], put outputs in shared memory.
//
// Why two places for h, in turn, are enough. h of step s goes to place s % 2, with another phase
// than h of step s - 2 had there. The memory begins as zeros, the phase of neither first exchange.
//  * A reader infers nothing from one word about another: it checks each by itself.
//  * It cannot take h of step s - 2 for that of step s: their phases differ. It cannot see that of
//    s - 4 or older: the same thread has read s - 2 at the same address, and loads of one location
//    by one thread never go back in time.
//  * h of step s + 2 overwrites that of step s only after all have read it. Its writer has
//    multiplied all of h of step s + 1. Each CTA computed its part of that from partial sums,
//    behind a barrier at which all its warps arrived after their loads of step s had returned and
//    been checked. So a chain of data dependencies and CTA barriers leads from every read of step s
//    to each write of step s + 2.
//  * A wait ends for any value. h of a half type beyond 1 is never sent: it can only stem from h0,
//    which is read from the caller's memory; zoneout, which would keep it, is refused together with
//    h0. A NaN is sent as a number that h never is, and its reader makes NaNs of the sums.
// Shared memory:
//  * Partial sums of step s are written after its second barrier, and read by their owner behind
//    its third. The owner then puts outputs in their place; those are read between the first two
//    barriers of step s + 1.
//  * The input part: a stage is read between the first two barriers of its step, and refilled after
//    the second. Its copies are waited for before the third barrier of the step before.
// Floor: docs/kernels.md.
#pragma once

#include "forward_fp32.cuh"
#include "forward_rows.cuh"

namespace fastlstm {
namespace cuda {

// Sends h of a thread's cells, which are of one unit, and of neighbouring sequences. `to` is the
// place of the first. Of two cells of a half type, threads of neighbouring units send one sequence
// each, so that a warp's store is of whole packets.
template <class Code, class S, int kCells>
__device__ __forceinline__ void send_hidden(unsigned char* to, const S (&h)[kCells],
                                            uint32_t phase) {
  if constexpr (kCells == 2 && sizeof(S) == 2) {
    const bool odd = lane_of_thread() / 4 % 2;  // its unit
    const uint32_t first = Code::encode(h[0], phase), second = Code::encode(h[1], phase);
    const uint32_t received = __shfl_xor_sync(~0u, odd ? first : second, 4);
    send_word(odd ? to + 14 : to, odd ? received | second << 16 : first | received << 16);
  } else {
#pragma unroll
    for (int r = 0; r < kCells; ++r) send_element<Code>(to + r * 16, h[r], phase);
  }
}

// kPlain: the cell has no rules (rules.h).
template <class Product, bool kPlain>
__device__ __forceinline__ void grid_forward(
    const GridForwardArgs<typename Product::Storage>& args) {
  typedef typename Product::Storage S;
  typedef typename Product::Code Code;
  typedef typename Product::Math Math;
  typedef Acc<S> T;
  typedef PartialSums<Product> Partial;
  typedef GridInput<S, Product> Input;
  constexpr GridShape kGrid = Product::kGrid;
  constexpr ForwardLayout kLayout = Product::kLayout;
  constexpr int kCells = Partial::kCells, kSequences = Product::kSequences, kUnits = kGrid.units;
  FASTLSTM_SHARED_BUFFER(shared);
  const int team = args.first_team + blockIdx.y, group = team % args.groups;
  const GridForwardCta<S> cta{args, team / args.groups};
  const int units = args.units;
  const GroupWalk walk(args.steps, group * kSequences, kSequences, cta.direction);

  unsigned char* const partial_at =
      shared + weights_shared(kGrid, args.team.slabs) + staged_shared(kGrid);
  unsigned char* const stages = partial_at + kLayout.partial_bytes;
  const Product product(cta.layer().fragments + int64_t(cta.slot()) * args.team.slabs *
                                                    Product::kBlocks * kGridBlockFragments,
                        shared, args.team.slabs);
  const Partial partial(partial_at);

  T* const bias = reinterpret_cast<T*>(stages + kGrid.stages * kLayout.stage_bytes);
  // Of this thread's cells, the one of cell r at r * kGridThreads: with rules h before the step,
  // without them c where registers are short.
  T* const state = bias + 4 * kUnits + threadIdx.x;
  constexpr bool kStoresCell = kPlain && kCells > 1;
  const GroupSteps steps(
      reinterpret_cast<unsigned char*>(bias + 4 * kUnits + kCells * kGridThreads));
  const bool looks_ahead = threadIdx.x == kGridThreads - 1;
  if (looks_ahead) steps.begin(walk);
  const GridOutputs<S, Product> outputs(cta, steps, partial_at);
  Input input(cta, steps, stages);
  __syncthreads();
  for (int s = 0; s < kGrid.stages; ++s) {
    input.look_up(s);
    input.copy(s);
  }
  input.look_up(kGrid.stages);

  // ---- this thread's cells ----
  const int unit = cta.slot() * kUnits + Partial::unit(threadIdx.x);
  const bool inside = partial.owns() && unit < units;
  for (int j = threadIdx.x; j < 4 * kUnits; j += kGridThreads) {
    const int u = cta.slot() * kUnits + j % kUnits;
    bias[j] = u < units ? value_or_zero(cta.layer().bias, j / kUnits * units + u) : T(0);
  }
  T c[kCells];
#pragma unroll
  for (int r = 0; r < kCells; ++r) {
    const int b = walk.first + Partial::sequence(r, threadIdx.x);
    const bool exists = inside && b < args.steps.batch;
    c[r] = exists ? value_or_zero(cta.layer().c0, int64_t(b) * units + unit) : T(0);
    if (kStoresCell)
      state[r * kGridThreads] = c[r];
    else if (!kPlain)
      state[r * kGridThreads] =
          exists ? value_or_zero(cta.layer().h0, int64_t(b) * units + unit) : T(0);
  }

  // h of the step before: in the first step h0, later what the CTAs sent.
  const uint32_t slot_bytes = uint32_t(args.team.slot_bytes), first_packet = product.offset();
  const uint32_t exchange = blockIdx.y * 2 * slot_bytes;  // this and what follows: offsets
  auto h0_packets = [&]() -> const unsigned char* {
    uint32_t group = walk.first / kSequences;
    pin(group);
    const unsigned char* packets = cta.layer().h0_packets;
    return packets ? packets + group * int64_t(slot_bytes) + first_packet : nullptr;
  };
  const uint32_t from = exchange + first_packet;
  auto sent_to = [&] {  // h of this thread's first cell
    constexpr int kPacket = 16 / int(sizeof(S));
    const unsigned me = thread_in_step<Product>();
    const int unit = cta.slot() * kUnits + Partial::unit(me);
    return unit / kPacket * kSequences * 16 + unit % kPacket * int(sizeof(S)) +
           Partial::sequence(0, me) * 16;
  };
  const uint32_t first_sent_to = sent_to();
  wait_async<0>();

  for (int s = 0; s < walk.length; ++s) {
    __syncthreads();
    typename Product::Sums sums;
    auto meanwhile = [&]() -> SequenceRange {
      T initial[kCells][4] = {};
      if (partial.owns()) {
        const unsigned me = thread_in_step<Product>();
        const int local = Partial::unit(me);
        const float* stage = input.stage(s) + local;
#pragma unroll
        for (int r = 0; r < kCells; ++r)
#pragma unroll
          for (int q = 0; q < 4; ++q)
            initial[r][q] = stage[Partial::sequence(r, me) * kLayout.row_floats + q * kUnits] +
                            bias[q * kUnits + local];
      }
      if (s > 0) outputs.store(s - 1);
      partial.begin(sums, initial);
      __syncthreads();
      input.copy(s + kGrid.stages);
      input.look_up(s + kGrid.stages + 1);
      if (looks_ahead) steps.look_up(walk, s + GroupSteps::kAhead);
      if (s == 0 || !cta.layer().h0_packets) return {0, 0};
      return {steps.active(s - 1), steps.active(s)};
    };
    HiddenOperand before{args.exchange + (from + ((s + 1) & 1) * slot_bytes),
                         phase_of(s - 1, Code::kPhase), Code::kPhase};
    if (s == 0) before = {h0_packets(), 0, 0};
    product.multiply(sums, before, args.limit, meanwhile, h0_packets);
    T gates[kCells][4];
    partial.hand_over(sums, gates);
    wait_async<kGrid.stages - 1>();
    __syncthreads();
    if (!partial.owns()) continue;

    const uint32_t to =
        exchange + (s & 1) * slot_bytes + (kShortOfRegisters<Product> ? sent_to() : first_sent_to);
    const int first_sequence = Partial::sequence(0, thread_in_step<Product>());
    const int active = steps.active(s), active_next = steps.active(s + 1);
    partial.add_parts(gates);
    CellForward<T> out[kCells];
    S stored[kCells];
#pragma unroll
    for (int r = 0; r < kCells; ++r) {
      const int n = first_sequence + r;
      if (kStoresCell) c[r] = state[r * kGridThreads];
      if constexpr (kPlain)
        out[r] = cell_forward<Math>(gates[r][0], gates[r][1], gates[r][2], gates[r][3], c[r]);
      else
        out[r] = cell_forward<Math>(
            gates[r][0], gates[r][1], gates[r][2], gates[r][3], c[r], state[r * kGridThreads],
            cta.layer().rules.at(cta.layer().rules.row(walk.time(s), walk.first + n), unit));
      // A sequence that is not in this step keeps its states; zeros are sent for it.
      const bool in = n < active;
      if (in) c[r] = out[r].c;
      from_acc(in ? out[r].h : T(0), stored[r]);
      if (!kPlain && in) state[r * kGridThreads] = to_acc(stored[r]);
      if (kStoresCell) state[r * kGridThreads] = c[r];
    }
    if (s + 1 < walk.length)
      send_hidden<Code>(args.exchange + to, stored, phase_of(s, Code::kPhase));

    // ---- no other CTA waits for what follows ----
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kCells; ++r) outputs.put(r, stored[r], out[r]);
    if (active == active_next) continue;
    const int me = recomputed_thread(), unit = cta.slot() * kUnits + Partial::unit(me);
#pragma unroll
    for (int r = 0; r < kCells; ++r) {
      const int n = Partial::sequence(r, me);
      if (n < active_next || n >= active || unit >= units) continue;
      const int64_t last = int64_t(walk.first + n) * units + unit;
      cta.layer().h_n[last] = stored[r];
      from_acc(out[r].c, cta.layer().c_n[last]);
    }
  }
  __syncthreads();
  if (walk.length > 0) outputs.store(walk.length - 1);
  wait_async<0>();
}

template <class Product, bool kPlain>
__global__ void __launch_bounds__(kGridThreads, 1)
    grid_forward_kernel(const __grid_constant__ GridForwardArgs<typename Product::Storage> args) {
  if constexpr (FASTLSTM_SM80) grid_forward<Product, kPlain>(args);
}

}  // namespace cuda
}  // namespace fastlstm

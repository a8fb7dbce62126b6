// The forward pass in a thread-block cluster: one launch runs all steps of one direction of a layer
// for up to 16 sequences. Clusters exchange nothing: other sequences and directions are other
// clusters.
//
// What it computes: gates = W_hh h + the input part + biases, and the cell, for every step.
//
// Who owns what: a CTA owns kUnits units, with all their weights in registers, or registers and
// shared memory (forward_product.cuh; fp32: forward_fp32.cuh). A thread of its computing warps owns
// whole cells, with c and h in registers. Its mover warps (forward_movers.cuh) load the input part
// and store the outputs.
//
// Turns: 16 sequences are two groups of eight that take turns, so that h of one group travels while
// the other is multiplied. One CTA, and full fp32, multiply all sequences in one turn.
//
// What moves per turn: each CTA sends the h of its units to every CTA of the cluster, 64 bytes for
// each 32 units and sequence of a half type. It arrives in one of the group's two buffers and is
// counted by an mbarrier; in a cluster of 16 by one for each part of K, so that the warps with that
// part start when it is there. A single CTA exchanges h through its own shared memory, and its turn
// has another order (forward_alone.cuh).
//
// Turn v of a computing warp, step s of its group: read the input part | wait for h[s-1] | product,
// cells | store h[s] in the tile | barrier v of the computing warps | send the tile | store the
// outputs in their buffer | arrive at the buffer's mbarrier, for the movers. Nothing that movers do
// stands between the arrival of h and the send.
//
// Why no buffer is overwritten too early:
// - Buffers of h: h[s] overwrites h[s-2] of its group. A peer sends h[s] after it has received all
//   of h[s-1]. This CTA sent its part of that after the barrier of that turn, when all its warps
//   had read h[s-2].
// - Their mbarriers: the phase of h[s] is armed after h[s-2] was seen and before the barrier of the
//   turn of h[s-1], hence before any peer can send h[s]; unarmed it cannot end. So no waiter is two
//   phases behind. This holds for each part of h by itself, for all warps pass that barrier.
// - Tile: turn v overwrites that of turn v-2, which was read and sent before barrier v-1.
// - Partial sums: written in turn v after barrier v-1, before which all warps had read the last.
// - Outputs of turn v go to one of two buffers after the movers have arrived at its mbarrier
//   `freed`, which they do when they have read those of turn v-2. Movers read them after all
//   computing warps have arrived at `filled`.
// - Input ring: a slot is refilled for turn v + kRing after all have arrived at `filled` of turn v,
//   hence have read it.
// - The last step sends nothing, and everything sent has been waited for: no CTA exits while bytes
//   are in flight to it.
// Floor: docs/kernels.md.
#pragma once

#include "forward_alone.cuh"

namespace fastlstm {
namespace cuda {

#if FASTLSTM_SM90

// Sends a CTA's part of h to every CTA of the cluster.
template <class Shape>
class HiddenSender {
  // A job: 16 bytes of the tile to one CTA from each of 32 or 48 neighbouring threads.
  static constexpr int kPieces = Shape::kSentBytes / 16, kJob = kPieces % 32 == 0 ? 32 : kPieces;
  static constexpr int kJobs = kPieces / kJob * Shape::kCtas;
  static constexpr int kAtOnce = 32 * Shape::kWarps / kJob;
  static constexpr int kRounds = (kJobs + kAtOnce - 1) / kAtOnce;
  static constexpr int kPeers = Shape::kCtas > kAtOnce ? Shape::kCtas / kAtOnce : 1;
  static_assert(32 * Shape::kWarps % kJob == 0 && (kJob == 32 || kPieces == kJob), "whole jobs");
  static_assert(kRounds % kPeers == 0, "whole rounds");

 public:
  __device__ __forceinline__ HiddenSender(unsigned char* shared, int rank, int thread) {
    const int job = job_ = thread / kJob, piece = thread % kJob;
    int to;  // of a thread's first piece, in a buffer of h
    if constexpr (kJob == 32) {
      from_ = piece * 16 + job / Shape::kCtas * 512;
      to = from_ + rank * Shape::kSentBytes;
    } else {  // a CTA's units need not begin with a slab
      const int unit = piece / Shape::kSequences * Shape::kPiece;
      from_ = Shape::hidden_at(unit, piece % Shape::kSequences);
      to = Shape::hidden_at(rank * Shape::kUnits + unit, piece % Shape::kSequences);
    }
    const int barrier = Shape::kBarriersAt + rank * Shape::kParts / Shape::kCtas *
                                                 ClusterForwardCta<Shape>::kBuffers *
                                                 int(sizeof(Mbarrier));
    if constexpr (!Shape::kStreams) from_ = opaque(from_);
#pragma unroll
    for (int j = 0; j < kPeers; ++j) {
      // CTAs of different ranks begin with different peers. Where one round does not reach all, the
      // first goes to their own half of the cluster: the h of its half reaches a CTA first.
      const int group = kPeers > 1 ? (rank / kAtOnce + j) % kPeers * kAtOnce : 0;
      constexpr int kReached = kPeers > 1 ? kAtOnce : Shape::kCtas;
      const Remote peer = remote(shared, group + (rank + job) % kReached);
      to_[j] = kept(peer + to);
      barrier_[j] = kept(peer + barrier);
    }
  }

  __device__ __forceinline__ void send(const unsigned char* tile, int buffer) const {
    if (kJobs < kAtOnce && job_ >= kJobs) return;
    // In round j + r * kPeers the piece of job job_ + round * kAtOnce goes to peer j.
    constexpr int kPerPeer = kRounds / kPeers;
    uint4 piece[kPerPeer];
    auto at = [](int r) { return (kPeers > 1 ? r : r * kAtOnce / Shape::kCtas) * 512; };
#pragma unroll
    for (int r = 0; r < kPerPeer; ++r)
      piece[r] = *reinterpret_cast<const uint4*>(tile + from_ + at(r));
#pragma unroll
    for (int j = 0; j < kPeers; ++j)
#pragma unroll
      for (int r = 0; r < kPerPeer; ++r)
        send_async(to_[j] + (buffer * Shape::kHiddenBytes + at(r)), piece[r],
                   barrier_[j] + buffer * int(sizeof(Mbarrier)));
  }

 private:
  // Behind the barrier no address waits for the CTA's rank: registers hold what streaming, which
  // has none left, computes anew in every step.
  __device__ __forceinline__ static Remote kept(Remote place) {
    if constexpr (!Shape::kStreams) place.address = opaque(place.address);
    return place;
  }

  int job_;
  uint32_t from_;  // a thread's first piece in the tile
  Remote to_[kPeers], barrier_[kPeers];
};

template <class Shape>
__device__ __forceinline__ void compute_forward(const ClusterForwardCta<Shape>& cta) {
  typedef typename Shape::S S;
  typedef ForwardProduct<Shape> Product;
  typedef CellMath<typename Shape::Operand> Cell;
  const ClusterForwardArgs<S>& args = cta.args;
  const ClusterForwardDirection<S>& layer = cta.layer;
  const int hidden_size = args.hidden_size;

  const int thread = int(opaque(threadIdx.x));
  Product product(cta.shared, thread);
  const int local = product.unit(), unit = cta.rank * Shape::kUnits + local;
  product.load(layer.w_hh, hidden_size, cta.rank * Shape::kUnits);
  // Of the part of h that this warp multiplies, and whether this thread arms them.
  Mbarrier* const arrived =
      cta.barriers() + (Shape::kParts > 1 ? product.part() * cta.kBuffers : 0);
  const bool arms = thread % (32 * Shape::kWarps / Shape::kParts) == 0;
  // The states of the groups, from that of this turn on.
  float c[Shape::kGroups][Shape::kCells];
  S h[Shape::kGroups][Shape::kCells];
  CellForward<float> out[Shape::kCells];
#pragma unroll
  for (int g = 0; g < Shape::kGroups; ++g) begin_states(cta, product, g, unit, c[g], h[g]);
  auto next_group = [&] {
    if constexpr (Shape::kGroups == 2) {
#pragma unroll
      for (int x = 0; x < Shape::kCells; ++x) {
        const float other_c = c[1][x];
        const S other_h = h[1][x];
        c[1][x] = c[0][x], h[1][x] = h[0][x];
        c[0][x] = other_c, h[0][x] = other_h;
      }
    }
  };
  const HiddenSender<Shape> sender(cta.shared, cta.rank, thread);

  // Registers hold them: constants that a direction indexes take as long as a read of memory.
  const bool plain = opaque(layer.rules.plain), saves = opaque(layer.gates != nullptr);
  const StoredRules<Shape> rules(cta.shared, thread);
  if (!plain) rules.draw(layer.rules, product, cta.time_of_call(0), cta.begin_of(0), unit);

  auto put_outputs = [&](int turn, int local) {
    if (turn >= 2) wait(cta.freed(turn), (turn - 2) >> 1 & 1, args.limit);
#pragma unroll
    for (int x = 0; x < Shape::kCells; ++x) {
      const int sequence = product.sequence(x);
      S* to = cta.output(turn, sequence, local);
      *to = h[0][x];
      if (!saves) continue;
      store_gates(out[x], to + Shape::kUnits, Shape::kUnits);
      *cta.output_c(turn, sequence, local) = c[0][x];
    }
    __syncwarp();
    if (product.thread() % 32 == 0) arrive(cta.filled(turn));
  };

  auto begin_sums = [&](int turn, int local, typename Product::Sums& sums) {
    wait(cta.loaded(turn), turn / Shape::kRing & 1, args.limit);
    const float4 bias = *reinterpret_cast<const float4*>(cta.shared + Shape::kBiasAt + local * 16);
#pragma unroll
    for (int x = 0; x < Shape::kCells; ++x) {
      const float* input = cta.input(turn, product.sequence(x)) + local;
      sums[x][0] = input[0] + bias.x;
      sums[x][1] = input[Shape::kUnits] + bias.y;
      sums[x][2] = input[2 * Shape::kUnits] + bias.z;
      sums[x][3] = input[3 * Shape::kUnits] + bias.w;
    }
  };

  // Streaming leaves no registers for addresses during the product: they are computed behind it.
  auto sender_now = [&] {
    return Shape::kStreams ? HiddenSender<Shape>(cta.shared, cta.rank, product.thread()) : sender;
  };
  auto rules_now = [&] {
    return Shape::kStreams ? StoredRules<Shape>(cta.shared, product.thread()) : rules;
  };
  const uint32_t fragments_at = opaque(product.fragments_at());
  const int turns = cta.turns();
  for (int turn = 0; turn < turns; ++turn) {
    const int s = cta.step_of(turn), buffer = cta.buffer_of(turn);
    typename Product::Sums sums;
    // What does not depend on other CTAs: the input part, addresses. Streaming leaves no registers
    // to hold them during the product.
    if constexpr (!Shape::kStreams) begin_sums(turn, local, sums);
    uint32_t at = buffer * Shape::kHiddenBytes + fragments_at;
    pin(at);
    if (s > 0) wait(arrived + buffer, (s - 1) >> 1 & 1, args.limit);
    product.multiply(cta.shared + at);
    if (arms && s > 0 && s + 2 < cta.steps)
      arrive_expecting(arrived + buffer, Shape::kHiddenBytes / Shape::kParts);
    const int own = Shape::kStreams ? product.unit() : local;  // the same
    if constexpr (Shape::kStreams) begin_sums(turn, own, sums);
    SequenceSpan span[Shape::kCells];
#pragma unroll
    for (int x = 0; x < Shape::kCells; ++x)
      span[x] = *cta.span(cta.begin_of(turn) - cta.begin + product.sequence(x));
    product.add(sums);

    const int next = cta.buffer_of(turn + Shape::kGroups);
    unsigned char* const sent = cta.shared + Shape::kTileAt + turn % 2 * Shape::kTileBytes;
    unsigned char* const tile = sent + Shape::hidden_at(own, product.sequence(0));
    if (plain) {  // all cells at once: a branch in each would put one behind the other
#pragma unroll
      for (int x = 0; x < Shape::kCells; ++x)
        out[x] = cell_forward<Cell>(sums[x][0], sums[x][1], sums[x][2], sums[x][3], c[0][x]);
    } else {
#pragma unroll
      for (int x = 0; x < Shape::kCells; ++x)
        out[x] = cell_forward<Cell>(sums[x][0], sums[x][1], sums[x][2], sums[x][3], c[0][x],
                                    to_acc(h[0][x]), rules_now().of(x, layer.rules.clip));
    }
#pragma unroll
    for (int x = 0; x < Shape::kCells; ++x) {
      // A sequence that is not in this step keeps its states.
      if (span[x].enter <= s && s < span[x].leave) {
        c[0][x] = out[x].c;
        from_acc(out[x].h, h[0][x]);
      }
      *reinterpret_cast<S*>(tile + Product::hidden_offset(x)) = Shape::operand(h[0][x]);
    }
    const HiddenSender<Shape> peers = sender_now();
    compute_barrier<Shape>();
    if (s + 1 < cta.steps) peers.send(sent, next);
    put_outputs(turn, own);
    if (!plain && turn + 1 < turns)
      rules_now().draw(layer.rules, product, cta.time_of_call(cta.step_of(turn + 1)),
                       cta.begin_of(turn + 1),
                       Shape::kStreams ? cta.rank * Shape::kUnits + product.unit() : unit);
    next_group();
  }
  // The addresses below are computed here, and occupy no registers during the steps.
  uint32_t begin = uint32_t(cta.begin);
  pin(begin);
  const int last = Shape::kStreams ? cta.rank * Shape::kUnits + product.unit() : unit;
  if (last >= hidden_size) return;
#pragma unroll
  for (int g = 0; g < Shape::kGroups; ++g) end_states(cta, product, g, begin, last, c[g], h[g]);
}

template <class Shape, bool kAligned>
__device__ __forceinline__ void move_forward(const ClusterForwardCta<Shape>& cta) {
  InputLoader<Shape> loader(cta);
#pragma unroll 1
  for (int turn = 0; turn < Shape::kRing; ++turn) loader.load(turn);
  OutputStorer<Shape, kAligned> storer(cta);
  for (int turn = 0; turn < cta.turns(); ++turn) {
    wait(cta.filled(turn), turn >> 1 & 1, cta.args.limit);
    loader.load(turn + Shape::kRing);
    storer.store(turn);
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(cta.freed(turn));
  }
}

template <class Shape>
__device__ __forceinline__ void cluster_forward(const ClusterForwardArgs<typename Shape::S>& args) {
  typedef typename Shape::S S;
  FASTLSTM_SHARED_BUFFER(shared);
  constexpr int kSequences = Shape::kGroups * Shape::kSequences, kBuffers = 2 * Shape::kGroups;
  const int cluster = blockIdx.x / Shape::kCtas, direction = cluster % args.directions;
  int rank = 0;
  if constexpr (Shape::kCtas > 1) rank = int(cluster_rank());
  const int begin = cluster / args.directions * kSequences;
  const ClusterForwardDirection<S>& layer = args.direction[direction];
  const int steps = args.steps.length_of(begin);
  const ClusterForwardCta<Shape> cta{args, layer, shared, direction, rank, begin, steps};

  const int thread = threadIdx.x;
  if (thread == 0) {
    for (int j = 0; j < kBuffers * Shape::kParts; ++j) init(cta.barriers() + j, 1);
    for (int j = 0; j < Shape::kRing; ++j) init(cta.loaded(j), kLoaders<Shape>);
    for (int j = 0; j < 2; ++j) {
      init(cta.filled(j), Shape::kCtas == 1 ? 1 : Shape::kWarps);
      init(cta.freed(j), Shape::kMovers);
    }
    publish_mbarriers();
  }
  if (thread < kSequences) {
    const int length = args.steps.length_of(begin + thread);
    const bool enters_late = direction == 1 && length > 0;
    *cta.span(thread) = {enters_late ? steps - length : 0, enters_late ? steps : length};
  }
  // h before the first step, of all the cluster's units.
  for (int j = thread; j < Shape::kDepth * kSequences; j += Shape::kThreads) {
    const int unit = j % Shape::kDepth, sequence = j / Shape::kDepth;
    S value;
    from_acc(0.0f, value);
    if (layer.h0 && unit < args.hidden_size && begin + sequence < args.steps.batch)
      value = layer.h0[int64_t(begin + sequence) * args.hidden_size + unit];
    *reinterpret_cast<S*>(shared + sequence / Shape::kSequences * Shape::kHiddenBytes +
                          Shape::hidden_at(unit, sequence % Shape::kSequences)) =
        Shape::operand(value);
  }
  if (thread < Shape::kUnits) {
    const int unit = cta.rank * Shape::kUnits + thread;
    float* bias = reinterpret_cast<float*>(shared + Shape::kBiasAt) + thread * 4;
    for (int q = 0; q < 4; ++q) {
      bias[q] =
          layer.bias && unit < args.hidden_size ? layer.bias[q * args.hidden_size + unit] : 0.0f;
    }
  }
  __syncthreads();
  if constexpr (Shape::kCtas > 1) {
    // h[0] goes to the second half of the buffers, h[1] to the first.
    for (int j = 0; j < kBuffers * Shape::kParts; ++j)
      if (thread == 0 && steps > (j % kBuffers < Shape::kGroups ? 2 : 1))
        arrive_expecting(cta.barriers() + j, Shape::kHiddenBytes / Shape::kParts);
    cluster_barrier();
  }
  if (thread < 32 * Shape::kWarps) {
    if constexpr (Shape::kFillsRegisters) raise_registers<Shape::kComputeRegisters>();
    if constexpr (Shape::kCtas == 1)
      compute_alone(cta);
    else
      compute_forward(cta);
  } else {
    if constexpr (Shape::kFillsRegisters) lower_registers<Shape::kMoveRegisters>();
    if (args.hidden_size % Shape::kPiece == 0)
      move_forward<Shape, true>(cta);
    else
      move_forward<Shape, false>(cta);
  }
}

#endif  // FASTLSTM_SM90

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    cluster_forward_kernel(const __grid_constant__ ClusterForwardArgs<typename Shape::S> args) {
#if FASTLSTM_SM90
  cluster_forward<Shape>(args);
#endif
}

}  // namespace cuda
}  // namespace fastlstm

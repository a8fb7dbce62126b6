// The forward pass in a thread-block cluster: one launch runs all steps of one direction of a layer
// for a group of up to 16 sequences. Clusters exchange nothing: other groups and directions are
// other clusters.
//
// What it computes: gates = W_hh h + the input part + biases, and the cell, for every step.
//
// Who owns what: a CTA owns kUnits units, with all their weights in registers, or registers and
// shared memory (forward_product.cuh; fp32: forward_fp32.cuh). A thread of its computing warps owns
// whole cells, with c and h in registers. Its mover warps (forward_movers.cuh) load the input part
// and store the outputs.
//
// What moves per step: each CTA sends the h of its units to every CTA of the cluster, 64 bytes for
// each 32 units and sequence of a half type. It arrives in one of two buffers and is counted by an
// mbarrier; in a cluster of 16 by one for each part of K, so that the warps with that part start
// when it is there. A single CTA exchanges h through its own shared memory.
//
// Step s of a computing warp: read the input part | wait for h[s-1] | product, cells | store h[s]
// in the tile | barrier s of all the CTA's warps | send the tile | store the outputs in their
// buffer.
//
// Why no buffer is overwritten too early:
// - Buffers of h: h[s] overwrites h[s-2]. A peer sends h[s] after it has received all of h[s-1].
// This
//   CTA sent its part of that after barrier s-1, when all its warps had read h[s-2].
// - Their mbarriers: the phase of h[s] is armed after h[s-2] was seen and before barrier s-1, hence
//   before any peer can send h[s]; unarmed it cannot end. So no waiter is two phases behind. This
//   holds for each part of h by itself, for all warps pass barrier s-1.
// - Tile: h[s] overwrites h[s-2], which was read and sent before barrier s-1.
// - Partial sums: written in step s after barrier s-1, before which all warps had read the last.
// - Input ring: a slot is read before barrier s, and refilled for step s + kRing after it.
// - Outputs of step s are written to one of two buffers between barriers s and s+1, and stored to
//   global memory between barriers s+1 and s+2.
// - The last step sends nothing, and everything sent has been waited for: no CTA exits while bytes
//   are in flight to it.
// Floor: docs/kernels.md.
#pragma once

#include "forward_fp32.cuh"
#include "forward_movers.cuh"
#include "forward_product.cuh"

namespace fastlstm {
namespace cuda {

#if FASTLSTM_SM90

// By tensor cores or, in full fp32, by multiply-adds.
template <class Shape>
using ForwardProduct =
    std::conditional_t<std::is_same_v<typename Shape::Operand, float>,
                       ClusterForwardFp32Product<Shape>, ClusterForwardProduct<Shape>>;

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

 public:
  __device__ __forceinline__ HiddenSender(unsigned char* shared, int rank, int thread) {
    const int job = job_ = thread / kJob, piece = thread % kJob;
#pragma unroll
    for (int j = 0; j < kPeers; ++j) {
      // CTAs of different ranks begin with different peers. Where one round does not reach all, the
      // first goes to their own half of the cluster: the h of its half reaches a CTA first.
      const int group = kPeers > 1 ? (rank / kAtOnce + j) % kPeers * kAtOnce : 0;
      constexpr int kReached = kPeers > 1 ? kAtOnce : Shape::kCtas;
      peer_[j] = remote(shared, group + (rank + job) % kReached);
    }
    if constexpr (kJob == 32) {
      from_ = piece * 16 + job / Shape::kCtas * 512;
      to_ = from_ + rank * Shape::kSentBytes;
    } else {  // a CTA's units need not begin with a slab
      const int unit = piece / Shape::kSequences * Shape::kPiece;
      from_ = Shape::hidden_at(unit, piece % Shape::kSequences);
      to_ = Shape::hidden_at(rank * Shape::kUnits + unit, piece % Shape::kSequences);
    }
    barrier_ = Shape::kBarriersAt + rank * Shape::kParts / Shape::kCtas * 2 * int(sizeof(Mbarrier));
  }

  __device__ __forceinline__ void send(const unsigned char* tile, int buffer) const {
    if (kJobs < kAtOnce && job_ >= kJobs) return;
#pragma unroll
    for (int j = 0; j < kPeers; ++j)
#pragma unroll
      for (int r = j; r < kRounds; r += kPeers) {
        // The piece of job job_ + r * kAtOnce.
        const int at = r * kAtOnce / Shape::kCtas * 512;
        send_async(peer_[j] + (buffer * Shape::kHiddenBytes + to_ + at),
                   *reinterpret_cast<const uint4*>(tile + from_ + at),
                   peer_[j] + (barrier_ + buffer * int(sizeof(Mbarrier))));
      }
  }

 private:
  Remote peer_[kPeers];
  // from_, to_: a thread's first piece in the tile, and its place in a buffer of h.
  int job_, from_, to_, barrier_;
};

template <class Shape>
struct NoSender {
  __device__ __forceinline__ NoSender(unsigned char*, int, int) {}
};

// The rules of this thread's cells in the next step: drawn when registers are free, and kept in
// shared memory that no other thread accesses.
template <class Shape>
class StoredRules {
  typedef ForwardProduct<Shape> Product;
  static constexpr int kStride = 32 * Shape::kWarps;

 public:
  __device__ __forceinline__ StoredRules(unsigned char* shared, int thread)
      : rules_(reinterpret_cast<float*>(shared + Shape::kRulesAt) + thread) {}

  __device__ __forceinline__ void draw(const DrawnRules<float>& rules, const Product& product,
                                       int t, int begin, int unit) const {
#pragma unroll
    for (int x = 0; x < Shape::kCells; ++x) {
      const CellRules<float> drawn = rules.at(rules.row(t, begin + product.sequence(x)), unit);
      rules_[3 * x * kStride] = drawn.update;
      rules_[(3 * x + 1) * kStride] = drawn.new_c;
      rules_[(3 * x + 2) * kStride] = drawn.new_h;
    }
  }
  __device__ __forceinline__ CellRules<float> of(int x, float clip) const {
    return {rules_[3 * x * kStride], clip, rules_[(3 * x + 1) * kStride],
            rules_[(3 * x + 2) * kStride]};
  }

 private:
  float* rules_;
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
  Mbarrier* const arrived = cta.barriers() + (Shape::kParts > 1 ? product.part() * 2 : 0);
  const bool arms = thread % (32 * Shape::kWarps / Shape::kParts) == 0;
  float c[Shape::kCells];
  S h[Shape::kCells];
  CellForward<float> out[Shape::kCells];
#pragma unroll
  for (int x = 0; x < Shape::kCells; ++x) {
    const int sequence = product.sequence(x);
    const bool inside = cta.span(sequence)->leave > 0 && unit < hidden_size;
    const int64_t at = int64_t(cta.begin + sequence) * hidden_size + unit;
    c[x] = !inside ? 0.0f : layer.c_before ? layer.c_before[at] : value_or_zero(layer.c0, at);
    from_acc(inside ? value_or_zero(layer.h0, at) : 0.0f, h[x]);
  }
  typedef std::conditional_t<(Shape::kCtas > 1), HiddenSender<Shape>, NoSender<Shape>> Sender;
  const Sender sender(cta.shared, cta.rank, thread);

  const StoredRules<Shape> rules(cta.shared, thread);
  if (!layer.rules.plain) rules.draw(layer.rules, product, cta.time_of_call(0), cta.begin, unit);

  auto put_outputs = [&](int s, int local) {
#pragma unroll
    for (int x = 0; x < Shape::kCells; ++x) {
      const int sequence = product.sequence(x);
      S* to = cta.output(s, sequence, local);
      *to = h[x];
      if (layer.gates == nullptr) continue;
      store_gates(out[x], to + Shape::kUnits, Shape::kUnits);
      *cta.output_c(s, sequence, local) = c[x];
    }
  };

  auto begin_sums = [&](int s, int local, typename Product::Sums& sums) {
    const float4 bias = *reinterpret_cast<const float4*>(cta.shared + Shape::kBiasAt + local * 16);
#pragma unroll
    for (int x = 0; x < Shape::kCells; ++x) {
      const float* input = cta.input(s, product.sequence(x)) + local;
      sums[x][0] = input[0] + bias.x;
      sums[x][1] = input[Shape::kUnits] + bias.y;
      sums[x][2] = input[2 * Shape::kUnits] + bias.z;
      sums[x][3] = input[3 * Shape::kUnits] + bias.w;
    }
  };

  // Streaming leaves no registers for addresses during the product: they are computed behind it.
  auto sender_now = [&] {
    return Shape::kStreams ? Sender(cta.shared, cta.rank, product.thread()) : sender;
  };
  auto rules_now = [&] {
    return Shape::kStreams ? StoredRules<Shape>(cta.shared, product.thread()) : rules;
  };
  const uint32_t fragments_at = opaque(product.fragments_at());
  wait(cta.loaded(0), 0, args.limit);  // the first input part; movers wait for the later ones
  for (int s = 0; s < cta.steps; ++s) {
    typename Product::Sums sums;
    // What does not depend on other CTAs: the input part, addresses. Streaming leaves no registers
    // to hold them during the product.
    if constexpr (!Shape::kStreams) begin_sums(s, local, sums);
    uint32_t at = s % 2 * Shape::kHiddenBytes + fragments_at;
    pin(at);
    if (Shape::kCtas > 1 && s > 0) wait(arrived + s % 2, (s - 1) >> 1 & 1, args.limit);
    product.multiply(cta.shared + at);
    if (Shape::kCtas > 1 && arms && s > 0 && s + 2 < cta.steps)
      arrive_expecting(arrived + s % 2, Shape::kHiddenBytes / Shape::kParts);
    if (Shape::kCtas == 1 && s > 0) put_outputs(s - 1, local);
    const int own = Shape::kStreams ? product.unit() : local;  // the same
    if constexpr (Shape::kStreams) begin_sums(s, own, sums);
    SequenceSpan span[Shape::kCells];
#pragma unroll
    for (int x = 0; x < Shape::kCells; ++x) span[x] = *cta.span(product.sequence(x));
    product.add(sums);

    unsigned char* const sent = Shape::kCtas > 1
                                    ? cta.shared + Shape::kTileAt + s % 2 * Shape::kTileBytes
                                    : cta.hidden(s + 1);
    unsigned char* const tile = sent + Shape::hidden_at(own, product.sequence(0));
#pragma unroll
    for (int x = 0; x < Shape::kCells; ++x) {
      if (layer.rules.plain)
        out[x] = cell_forward<Cell>(sums[x][0], sums[x][1], sums[x][2], sums[x][3], c[x]);
      else
        out[x] = cell_forward<Cell>(sums[x][0], sums[x][1], sums[x][2], sums[x][3], c[x],
                                    to_acc(h[x]), rules_now().of(x, layer.rules.clip));
      // A sequence that is not in this step keeps its states.
      if (span[x].enter <= s && s < span[x].leave) {
        c[x] = out[x].c;
        from_acc(out[x].h, h[x]);
      }
      *reinterpret_cast<S*>(tile + Product::hidden_offset(x)) = Shape::operand(h[x]);
    }
    const Sender peers = sender_now();
    cta_barrier<Shape>();
    if constexpr (Shape::kCtas > 1) {
      if (s + 1 < cta.steps) peers.send(sent, (s + 1) % 2);
      put_outputs(s, own);
    }
    if (!layer.rules.plain && s + 1 < cta.steps)
      rules_now().draw(layer.rules, product, cta.time_of_call(s + 1), cta.begin,
                       Shape::kStreams ? cta.rank * Shape::kUnits + product.unit() : unit);
  }
  if (Shape::kCtas == 1) put_outputs(cta.steps - 1, local);
  cta_barrier<Shape>();
  // The addresses below are computed here, and occupy no registers during the steps.
  uint32_t begin = uint32_t(cta.begin);
  pin(begin);
  const int last = Shape::kStreams ? cta.rank * Shape::kUnits + product.unit() : unit;
  if (last >= hidden_size) return;
#pragma unroll
  for (int x = 0; x < Shape::kCells; ++x) {
    if (cta.span(product.sequence(x))->leave == 0) continue;
    const int64_t at = int64_t(begin + product.sequence(x)) * hidden_size + last;
    layer.h_n[at] = h[x];
    from_acc(c[x], layer.c_n[at]);
    if (layer.c_after) layer.c_after[at] = c[x];
  }
}

template <class Shape, bool kAligned>
__device__ __forceinline__ void move_forward(const ClusterForwardCta<Shape>& cta) {
  InputLoader<Shape> loader(cta);
#pragma unroll 1
  for (int s = 0; s < Shape::kRing; ++s) loader.load(s);
  OutputStorer<Shape, kAligned> storer(cta);
  const bool waits = threadIdx.x / 32 == Shape::kWarps;
  for (int s = 0; s < cta.steps; ++s) {
    if (waits && s + 1 < cta.steps) loader.await(s + 1);
    cta_barrier<Shape>();
    loader.load(s + Shape::kRing);
    if (s > 0) storer.store(s - 1);
  }
  cta_barrier<Shape>();
  storer.store(cta.steps - 1);
}

template <class Shape>
__device__ __forceinline__ void cluster_forward(const ClusterForwardArgs<typename Shape::S>& args) {
  typedef typename Shape::S S;
  FASTLSTM_SHARED_BUFFER(shared);
  const int cluster = blockIdx.x / Shape::kCtas, direction = cluster % args.directions;
  int rank = 0;
  if constexpr (Shape::kCtas > 1) rank = int(cluster_rank());
  const int begin = cluster / args.directions * Shape::kSequences;
  const ClusterForwardDirection<S>& layer = args.direction[direction];
  const int steps = args.steps.length_of(begin);
  const ClusterForwardCta<Shape> cta{args, layer, shared, direction, rank, begin, steps};

  const int thread = threadIdx.x;
  if (thread == 0) {
    for (int j = 0; j < 2 * Shape::kParts; ++j) init(cta.barriers() + j, 1);
    for (int j = 0; j < Shape::kRing; ++j) init(cta.loaded(j), Shape::kMovers);
    publish_mbarriers();
  }
  if (thread < Shape::kSequences) {
    const int length = args.steps.length_of(begin + thread);
    const bool enters_late = direction == 1 && length > 0;
    *cta.span(thread) = {enters_late ? steps - length : 0, enters_late ? steps : length};
  }
  // h before the first step, of all the cluster's units.
  for (int j = thread; j < Shape::kDepth * Shape::kSequences; j += Shape::kThreads) {
    const int unit = j % Shape::kDepth, sequence = j / Shape::kDepth;
    S value;
    from_acc(0.0f, value);
    if (layer.h0 && unit < args.hidden_size && begin + sequence < args.steps.batch)
      value = layer.h0[int64_t(begin + sequence) * args.hidden_size + unit];
    *reinterpret_cast<S*>(shared + Shape::hidden_at(unit, sequence)) = Shape::operand(value);
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
    // h[0] goes to buffer 1, h[1] to buffer 0.
    for (int part = 0; part < Shape::kParts; ++part)
      for (int buffer = 0; buffer < 2; ++buffer)
        if (thread == 0 && steps > 2 - buffer)
          arrive_expecting(cta.barriers() + 2 * part + buffer, Shape::kHiddenBytes / Shape::kParts);
    cluster_barrier();
  }
  if (thread < 32 * Shape::kWarps) {
    if constexpr (Shape::kFillsRegisters) raise_registers<Shape::kComputeRegisters>();
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

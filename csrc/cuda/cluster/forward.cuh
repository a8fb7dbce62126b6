// The forward pass in a thread-block cluster: one launch runs all steps of one direction of a layer
// for a group of up to 16 sequences. Clusters exchange nothing: other groups and directions are
// other clusters.
//
// What it computes: gates = W_hh h + the input part + biases, and the cell, for every step.
//
// Who owns what: a CTA owns kUnits units, with all their weights in registers
// (forward_product.cuh). A thread of its eight computing warps owns whole cells, with c and h in
// registers. Its mover warps (forward_movers.cuh) load the input part and store the outputs.
//
// What moves per step: each CTA sends the h of its units to every CTA of the cluster, 64 bytes for
// each 32 units and sequence of a half type. It arrives in one of two buffers and is counted by an
// mbarrier. A single CTA exchanges h through its own shared memory.
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
//   before any peer can send h[s]; unarmed it cannot end. So no waiter is two phases behind.
// - Tile: h[s] overwrites h[s-2], which was read and sent before barrier s-1.
// - Partial sums: written in step s after barrier s-1, before which both warps had read the last.
// - Input ring: a slot is read before barrier s, and refilled for step s + kRing after it.
// - Outputs of step s are written to one of two buffers between barriers s and s+1, and stored to
//   global memory between barriers s+1 and s+2.
// - The last step sends nothing, and everything sent has been waited for: no CTA exits while bytes
//   are in flight to it.
// Floor: docs/kernels.md.
#pragma once

#include "forward_movers.cuh"
#include "forward_product.cuh"

namespace fastlstm {
namespace cuda {

#if FASTLSTM_SM90

// Sends a CTA's part of h to every CTA of the cluster.
template <class Shape>
class HiddenSender {
  // A job: 512 bytes of the tile to one CTA, by one warp.
  static constexpr int kPieces = Shape::kSentBytes / 512, kJobs = kPieces * Shape::kCtas;
  static constexpr int kRounds = (kJobs + Shape::kWarps - 1) / Shape::kWarps;
  static constexpr int kPeers = Shape::kCtas > Shape::kWarps ? Shape::kCtas / Shape::kWarps : 1;

 public:
  __device__ __forceinline__ HiddenSender(unsigned char* shared, int rank, int thread) {
    const int warp = warp_ = thread / 32;
#pragma unroll
    for (int j = 0; j < kPeers; ++j)  // CTAs of different ranks begin with different peers
      peer_[j] = remote(shared, (rank + warp + j * Shape::kWarps) % Shape::kCtas);
    offset_ = thread % 32 * 16 + warp / Shape::kCtas * 512;
    part_ = rank * Shape::kSentBytes;
  }

  __device__ __forceinline__ void send(const unsigned char* tile, int buffer) const {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      if (kJobs < Shape::kWarps && warp_ >= kJobs) continue;
      // The piece of job warp + r * kWarps.
      const int at = offset_ + r * Shape::kWarps / Shape::kCtas * 512;
      const Remote to = peer_[r % kPeers];
      send_async(to + (buffer * Shape::kHiddenBytes + part_ + at),
                 *reinterpret_cast<const uint4*>(tile + at),
                 to + (Shape::kBarriersAt + buffer * int(sizeof(Mbarrier))));
    }
  }

 private:
  Remote peer_[kPeers];
  int warp_, offset_, part_;  // part_: where this CTA's h begins in a buffer
};

template <class Shape>
struct NoSender {
  __device__ __forceinline__ NoSender(unsigned char*, int, int) {}
};

// The rules of this thread's cells in the next step: drawn when registers are free, and kept in
// shared memory that no other thread accesses.
template <class Shape>
class StoredRules {
  typedef ClusterForwardProduct<Shape> Product;
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
  typedef ClusterForwardProduct<Shape> Product;
  const ClusterForwardArgs<S>& args = cta.args;
  const ClusterForwardDirection<S>& layer = cta.layer;
  const int hidden_size = args.hidden_size;
  Mbarrier* arrived = reinterpret_cast<Mbarrier*>(cta.shared + Shape::kBarriersAt);

  const int thread = int(opaque(threadIdx.x));
  Product product(cta.shared, thread);
  const int local = product.unit(), unit = cta.rank * Shape::kUnits + local;
  product.load(layer.w_hh, hidden_size, unit);
  float c[Shape::kCells];
  S h[Shape::kCells];
  SequenceSpan span[Shape::kCells];
  CellForward<float> out[Shape::kCells];
#pragma unroll
  for (int x = 0; x < Shape::kCells; ++x) {
    const int sequence = product.sequence(x);
    span[x] = *cta.span(sequence);
    const bool inside = span[x].leave > 0 && unit < hidden_size;
    const int64_t at = int64_t(cta.begin + sequence) * hidden_size + unit;
    c[x] = inside ? value_or_zero(layer.c0, at) : 0.0f;
    from_acc(inside ? value_or_zero(layer.h0, at) : 0.0f, h[x]);
  }
  const float4 bias = *reinterpret_cast<const float4*>(cta.shared + Shape::kBiasAt + local * 16);
  const std::conditional_t<(Shape::kCtas > 1), HiddenSender<Shape>, NoSender<Shape>> sender(
      cta.shared, cta.rank, thread);

  const StoredRules<Shape> rules(cta.shared, thread);
  if (!layer.rules.plain) rules.draw(layer.rules, product, cta.time(0), cta.begin, unit);

  auto put_outputs = [&](int s) {
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

  wait(arrived + 2, 0, args.limit);  // the first input part; movers wait for the later ones
  for (int s = 0; s < cta.steps; ++s) {
    // What does not depend on other CTAs: the input part, addresses.
    typename Product::Sums sums;
#pragma unroll
    for (int x = 0; x < Shape::kCells; ++x) {
      const float* input = cta.input(s, product.sequence(x)) + local;
      sums[x][0] = input[0] + bias.x;
      sums[x][1] = input[Shape::kUnits] + bias.y;
      sums[x][2] = input[2 * Shape::kUnits] + bias.z;
      sums[x][3] = input[3 * Shape::kUnits] + bias.w;
    }
    uint32_t at = s % 2 * Shape::kHiddenBytes + product.fragments_at();
    pin(at);
    if (Shape::kCtas > 1 && s > 0) wait(arrived + s % 2, (s - 1) >> 1 & 1, args.limit);
    product.multiply(cta.shared + at);
    if (Shape::kCtas > 1 && thread == 0 && s > 0 && s + 2 < cta.steps)
      arrive_expecting(arrived + s % 2, Shape::kHiddenBytes);
    if (Shape::kCtas == 1 && s > 0) put_outputs(s - 1);
    product.add(sums);

    unsigned char* const sent = Shape::kCtas > 1
                                    ? cta.shared + Shape::kTileAt + s % 2 * Shape::kSentBytes
                                    : cta.hidden(s + 1);
    unsigned char* const tile = sent + hidden_at<Shape>(local, product.sequence(0));
#pragma unroll
    for (int x = 0; x < Shape::kCells; ++x) {
      if (layer.rules.plain)
        out[x] = cell_forward<FastMath>(sums[x][0], sums[x][1], sums[x][2], sums[x][3], c[x]);
      else
        out[x] = cell_forward<FastMath>(sums[x][0], sums[x][1], sums[x][2], sums[x][3], c[x],
                                        to_acc(h[x]), rules.of(x, layer.rules.clip));
      // A sequence that is not in this step keeps its states.
      if (span[x].enter <= s && s < span[x].leave) {
        c[x] = out[x].c;
        from_acc(out[x].h, h[x]);
      }
      *reinterpret_cast<S*>(tile + Product::sequence_offset(x) * 64) = rounded(h[x]);
    }
    cta_barrier<Shape>();
    if constexpr (Shape::kCtas > 1) {
      if (s + 1 < cta.steps) sender.send(sent, (s + 1) % 2);
      put_outputs(s);
    }
    if (!layer.rules.plain && s + 1 < cta.steps)
      rules.draw(layer.rules, product, cta.time(s + 1), cta.begin, unit);
  }
  if (Shape::kCtas == 1) put_outputs(cta.steps - 1);
  cta_barrier<Shape>();
  if (unit >= hidden_size) return;
  uint32_t begin = uint32_t(cta.begin);
  pin(begin);  // the addresses below are computed here, and occupy no registers during the steps
#pragma unroll
  for (int x = 0; x < Shape::kCells; ++x) {
    if (span[x].leave == 0) continue;
    const int64_t at = int64_t(begin + product.sequence(x)) * hidden_size + unit;
    layer.h_n[at] = h[x];
    from_acc(c[x], layer.c_n[at]);
  }
}

template <class Shape>
__device__ __forceinline__ void move_forward(const ClusterForwardCta<Shape>& cta) {
  InputLoader<Shape> loader(cta);
#pragma unroll 1
  for (int s = 0; s < Shape::kRing; ++s) loader.load(s);
  OutputStorer<Shape> storer(cta);
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
  Mbarrier* arrived = reinterpret_cast<Mbarrier*>(shared + Shape::kBarriersAt);

  const int thread = threadIdx.x;
  if (thread == 0) {
    for (int j = 0; j < 2; ++j) init(arrived + j, 1);
    for (int j = 0; j < Shape::kRing; ++j) init(arrived + 2 + j, Shape::kMovers);
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
    *reinterpret_cast<S*>(shared + hidden_at<Shape>(unit, sequence)) = rounded(value);
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
    if (thread == 0 && steps > 1) arrive_expecting(arrived + 1, Shape::kHiddenBytes);
    if (thread == 0 && steps > 2) arrive_expecting(arrived, Shape::kHiddenBytes);
    cluster_barrier();
  }
  if (thread < 32 * Shape::kWarps) {
    if constexpr (Shape::kFillsRegisters) raise_registers<Shape::kComputeRegisters>();
    compute_forward(cta);
  } else {
    if constexpr (Shape::kFillsRegisters) lower_registers<Shape::kMoveRegisters>();
    move_forward(cta);
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

// Forward in a thread-block cluster: all steps of one direction of a layer for a group of up to 16
// sequences, in one launch. Clusters never meet: groups and directions are other clusters.
//
// What it computes: gates = W_hh h + the input's part + biases, and the cell, for every step.
// Who owns what: a CTA has kUnits units, with all their weights in registers (forward_product.cuh);
// a thread of its eight computing warps has whole cells, their c and h in registers. Its moving
// warps (forward_movers.cuh) load the input's part and store what leaves.
// What moves per step: h, 64 bytes of kUnits units' h to every CTA of the cluster for each of
// kUnits / 32 * sequences; it arrives in one of two buffers and is counted by an mbarrier. A CTA
// alone exchanges through its own shared memory.
//
// A step s of a computing warp: input part | wait for h[s-1] | product, cell | h[s] into the tile |
// meeting s of all the CTA's warps | send the tile | outputs into their buffer. Why nothing is
// overwritten too early:
// - Buffer of h: h[s] takes the place of h[s-2]. A peer sends h[s] after it has all of h[s-1], of
//   which a part left this CTA behind meeting s-1, where all its warps had read h[s-2].
// - Its mbarrier: the phase of h[s] is armed once h[s-2] was seen, before meeting s-1, hence before
//   any peer can send h[s]; it cannot end unarmed. So a waiter never is two phases behind.
// - Tile: h[s] takes the place of h[s-2], whose sends were read from it before meeting s-1.
// - Partial sums: written in step s behind meeting s-1, before which both warps had read theirs.
// - Input ring: a slot is read before meeting s, and loaded for step s + kRing behind it.
// - Outputs of step s stand in one of two buffers between the meetings s and s+1, and are stored
//   between s+1 and s+2.
// - The last step sends nothing, and all that was sent was waited for: no CTA leaves too early.
// Floor: docs/kernels.md.
#pragma once

#include "forward_movers.cuh"
#include "forward_product.cuh"

namespace fastlstm {
namespace cuda {

#if FASTLSTM_SM90

// Where a CTA's own part of h goes, and the mbarriers that count it.
template <class F>
class HiddenSender {
  // Jobs: a piece of 512 bytes to one CTA.
  static constexpr int kPieces = F::kSent / 512, kJobs = kPieces * F::kCtas;
  static constexpr int kRounds = (kJobs + F::kWarps - 1) / F::kWarps;
  static constexpr int kPeers = F::kCtas > F::kWarps ? F::kCtas / F::kWarps : 1;

 public:
  __device__ __forceinline__ HiddenSender(unsigned char* shared, int rank, int thread) {
    const int warp = warp_ = thread / 32;
#pragma unroll
    for (int j = 0; j < kPeers; ++j)  // each CTA begins with another
      peer_[j] = remote(shared, (rank + warp + j * F::kWarps) % F::kCtas);
    offset_ = thread % 32 * 16 + warp / F::kCtas * 512;
    own_ = rank * F::kSent;
  }

  __device__ __forceinline__ void send(const unsigned char* tile, int buffer) const {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      if (kJobs < F::kWarps && warp_ >= kJobs) continue;
      // The piece of job warp + r * kWarps.
      const int at = offset_ + r * F::kWarps / F::kCtas * 512;
      const Remote to = peer_[r % kPeers];
      send_async(to + (buffer * F::kHidden + own_ + at), *reinterpret_cast<const uint4*>(tile + at),
                 to + (F::kBarriersAt + buffer * int(sizeof(Mbarrier))));
    }
  }

 private:
  Remote peer_[kPeers];
  int warp_, offset_, own_;
};

template <class F>
struct NoSender {
  __device__ __forceinline__ NoSender(unsigned char*, int, int) {}
};

// The rules of this thread's cells in the next step: drawn while nothing else needs registers, and
// kept in shared memory, where no other thread looks.
template <class F>
class KeptRules {
  typedef ForwardProduct<F> Product;
  static constexpr int kStride = 32 * F::kWarps;

 public:
  __device__ __forceinline__ KeptRules(unsigned char* shared, int thread)
      : kept_(reinterpret_cast<float*>(shared + F::kRulesAt) + thread) {}

  __device__ __forceinline__ void draw(const DrawnRules<float>& rules, const Product& product,
                                       int t, int begin, int unit) const {
#pragma unroll
    for (int x = 0; x < F::kCells; ++x) {
      const CellRules<float> drawn = rules.at(rules.row(t, begin + product.sequence(x)), unit);
      kept_[3 * x * kStride] = drawn.update;
      kept_[(3 * x + 1) * kStride] = drawn.new_c;
      kept_[(3 * x + 2) * kStride] = drawn.new_h;
    }
  }
  __device__ __forceinline__ CellRules<float> of(int x, float clip) const {
    return {kept_[3 * x * kStride], clip, kept_[(3 * x + 1) * kStride],
            kept_[(3 * x + 2) * kStride]};
  }

 private:
  float* kept_;
};

template <class F>
__device__ __forceinline__ void compute_forward(const ForwardCta<F>& cta) {
  typedef typename F::S S;
  typedef ForwardProduct<F> Product;
  const ClusterForwardArgs<S>& args = cta.args;
  const ForwardDirection<S>& own = cta.own;
  const int hidden_size = args.hidden_size;
  Mbarrier* arrived = reinterpret_cast<Mbarrier*>(cta.shared + F::kBarriersAt);

  const int thread = int(kept(threadIdx.x));
  Product product(cta.shared, thread);
  const int local = product.unit(), unit = cta.rank * F::kUnits + local;
  product.load(own.w_hh, hidden_size, unit);
  float c[F::kCells];
  S h[F::kCells];
  SequenceSpan span[F::kCells];
  CellForward<float> out[F::kCells];
#pragma unroll
  for (int x = 0; x < F::kCells; ++x) {
    const int sequence = product.sequence(x);
    span[x] = *cta.span(sequence);
    const bool inside = span[x].leave > 0 && unit < hidden_size;
    const int64_t at = int64_t(cta.begin + sequence) * hidden_size + unit;
    c[x] = inside ? value_or_zero(own.c0, at) : 0.0f;
    from_acc(inside ? value_or_zero(own.h0, at) : 0.0f, h[x]);
  }
  const float4 bias = *reinterpret_cast<const float4*>(cta.shared + F::kBiasAt + local * 16);
  const std::conditional_t<(F::kCtas > 1), HiddenSender<F>, NoSender<F>> sender(cta.shared,
                                                                                cta.rank, thread);

  const KeptRules<F> rules(cta.shared, thread);
  if (!own.rules.plain) rules.draw(own.rules, product, cta.time(0), cta.begin, unit);

  auto put = [&](int s) {  // what leaves, into its buffer
#pragma unroll
    for (int x = 0; x < F::kCells; ++x) {
      const int sequence = product.sequence(x);
      S* to = cta.output(s, sequence, local);
      *to = h[x];
      if (own.gates == nullptr) continue;
      from_acc(out[x].i, to[F::kUnits]);
      from_acc(out[x].f, to[2 * F::kUnits]);
      from_acc(out[x].g, to[3 * F::kUnits]);
      from_acc(out[x].o, to[4 * F::kUnits]);
      *cta.output_cell(s, sequence, local) = c[x];
    }
  };

  wait(arrived + 2, 0, args.limit);  // the first input part; movers wait for the others
  for (int s = 0; s < cta.steps; ++s) {
    // What does not wait for other CTAs: the input part, addresses.
    typename Product::Sums sums;
#pragma unroll
    for (int x = 0; x < F::kCells; ++x) {
      const float* input = cta.input(s, product.sequence(x)) + local;
      sums[x][0] = input[0] + bias.x;
      sums[x][1] = input[F::kUnits] + bias.y;
      sums[x][2] = input[2 * F::kUnits] + bias.z;
      sums[x][3] = input[3 * F::kUnits] + bias.w;
    }
    uint32_t at = s % 2 * F::kHidden + product.fragments_at();
    pin(at);
    if (F::kCtas > 1 && s > 0) wait(arrived + s % 2, (s - 1) >> 1 & 1, args.limit);
    product.multiply(cta.shared + at);
    if (F::kCtas > 1 && thread == 0 && s > 0 && s + 2 < cta.steps)
      arrive_expecting(arrived + s % 2, F::kHidden);
    if (F::kCtas == 1 && s > 0) put(s - 1);
    product.add(sums);

    unsigned char* const sent =
        F::kCtas > 1 ? cta.shared + F::kTileAt + s % 2 * F::kSent : cta.hidden(s + 1);
    unsigned char* const tile = sent + hidden_at<F>(local, product.sequence(0));
#pragma unroll
    for (int x = 0; x < F::kCells; ++x) {
      if (own.rules.plain)
        out[x] = cell_forward<FastMath>(sums[x][0], sums[x][1], sums[x][2], sums[x][3], c[x]);
      else
        out[x] = cell_forward<FastMath>(sums[x][0], sums[x][1], sums[x][2], sums[x][3], c[x],
                                        to_acc(h[x]), rules.of(x, own.rules.clip));
      // A sequence that is not in this step keeps its states.
      if (span[x].enter <= s && s < span[x].leave) {
        c[x] = out[x].c;
        from_acc(out[x].h, h[x]);
      }
      *reinterpret_cast<S*>(tile + Product::further(x) * 64) = rounded(h[x]);
    }
    meet<F>();
    if constexpr (F::kCtas > 1) {
      if (s + 1 < cta.steps) sender.send(sent, (s + 1) % 2);
      put(s);
    }
    if (!own.rules.plain && s + 1 < cta.steps)
      rules.draw(own.rules, product, cta.time(s + 1), cta.begin, unit);
  }
  if (F::kCtas == 1) put(cta.steps - 1);
  meet<F>();
  if (unit >= hidden_size) return;
  uint32_t begin = uint32_t(cta.begin);
  pin(begin);  // no register keeps what follows through all steps
#pragma unroll
  for (int x = 0; x < F::kCells; ++x) {
    if (span[x].leave == 0) continue;
    const int64_t at = int64_t(begin + product.sequence(x)) * hidden_size + unit;
    own.h_n[at] = h[x];
    from_acc(c[x], own.c_n[at]);
  }
}

template <class F>
__device__ __forceinline__ void move_forward(const ForwardCta<F>& cta) {
  InputLoader<F> loader(cta);
#pragma unroll 1
  for (int s = 0; s < F::kRing; ++s) loader.load(s);
  OutputStorer<F> storer(cta);
  const bool waits = threadIdx.x / 32 == F::kWarps;
  for (int s = 0; s < cta.steps; ++s) {
    if (waits && s + 1 < cta.steps) loader.await(s + 1);
    meet<F>();
    loader.load(s + F::kRing);
    if (s > 0) storer.store(s - 1);
  }
  meet<F>();
  storer.store(cta.steps - 1);
}

template <class F>
__device__ __forceinline__ void cluster_forward(const ClusterForwardArgs<typename F::S>& args) {
  typedef typename F::S S;
  FASTLSTM_SHARED_BUFFER(shared);
  const int cluster = blockIdx.x / F::kCtas, direction = cluster % args.directions;
  int rank = 0;
  if constexpr (F::kCtas > 1) rank = int(cluster_rank());
  const int begin = cluster / args.directions * F::kSequences;
  const ForwardDirection<S>& own = args.direction[direction];
  const int steps = sequence_steps(args.map, begin);
  const ForwardCta<F> cta{args, own, shared, direction, rank, begin, steps};
  Mbarrier* arrived = reinterpret_cast<Mbarrier*>(shared + F::kBarriersAt);

  const int thread = threadIdx.x;
  if (thread == 0) {
    for (int j = 0; j < 2; ++j) init(arrived + j, 1);
    for (int j = 0; j < F::kRing; ++j) init(arrived + 2 + j, F::kMovers);
    publish_mbarriers();
  }
  if (thread < F::kSequences) {
    const int length = sequence_steps(args.map, begin + thread);
    const bool enters_late = direction == 1 && length > 0;
    *cta.span(thread) = {enters_late ? steps - length : 0, enters_late ? steps : length};
  }
  // What precedes the first step, of all the cluster's units.
  for (int j = thread; j < F::kDepth * F::kSequences; j += F::kThreads) {
    const int unit = j % F::kDepth, sequence = j / F::kDepth;
    S value;
    from_acc(0.0f, value);
    if (own.h0 && unit < args.hidden_size && begin + sequence < args.map.batch)
      value = own.h0[int64_t(begin + sequence) * args.hidden_size + unit];
    *reinterpret_cast<S*>(shared + hidden_at<F>(unit, sequence)) = rounded(value);
  }
  if (thread < F::kUnits) {
    const int unit = cta.rank * F::kUnits + thread;
    float* bias = reinterpret_cast<float*>(shared + F::kBiasAt) + thread * 4;
    for (int q = 0; q < 4; ++q) {
      bias[q] = own.bias && unit < args.hidden_size ? own.bias[q * args.hidden_size + unit] : 0.0f;
    }
  }
  __syncthreads();
  if constexpr (F::kCtas > 1) {
    // h[0] goes to buffer 1, h[1] to buffer 0.
    if (thread == 0 && steps > 1) arrive_expecting(arrived + 1, F::kHidden);
    if (thread == 0 && steps > 2) arrive_expecting(arrived, F::kHidden);
    cluster_barrier();
  }
  if (thread < 32 * F::kWarps) {
    if constexpr (F::kCrowded) raise_registers<F::kComputeRegisters>();
    compute_forward(cta);
  } else {
    if constexpr (F::kCrowded) lower_registers<F::kMoveRegisters>();
    move_forward(cta);
  }
}

#endif  // FASTLSTM_SM90

template <class F>
__global__ void __launch_bounds__(F::kThreads, 1)
    cluster_forward_kernel(const __grid_constant__ ClusterForwardArgs<typename F::S> args) {
#if FASTLSTM_SM90
  cluster_forward<F>(args);
#endif
}

}  // namespace cuda
}  // namespace fastlstm

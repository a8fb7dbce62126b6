// A forward step of a large layer in one launch, for which the L2 cache delivers far fewer bytes
// than for the tiles of step_kernel.cuh: h reaches a whole cluster by one copy.
//
// What it computes: h_{t-1} W_hh^T plus the input part, and the cells, of half types. The product
// is W_hh times h transposed: rows are gates, columns are sequences.
//
// Who owns what: a CTA owns 16 units, that is 64 rows, for Shape::kSequences sequences (blockIdx.y
// names them) in one direction (blockIdx.z). The CTAs of a cluster are neighbours: they multiply
// different rows by the same h. K goes by blocks of 16 and by stages of some blocks. A warp owns
// all 64 rows and Shape::kWarpSequences sequences of every Shape::kSplit-th block; at the end the
// warps of a split divide their sequences, and each adds up its share in a fixed order. A thread
// has the four gates of two neighbouring units, for one sequence at a time.
//
// What moves per step: one thread of each CTA copies. A stage of a CTA's W is contiguous, and so is
// that of h (wide_pack.cuh packs both in the order of mma's registers, and the cells write h in
// that order): each is one copy, W to the CTA itself, and of h the CTA's part to all of its
// cluster. Then eight warps load their registers by 16-byte accesses without bank conflicts.
//
// Why the ring is safe: a slot is full when as many bytes have come as the slot holds, whoever sent
// them. It is empty when all warps of all CTAs in the cluster have read it, and so have said to
// every CTA of the cluster: each may then overwrite its part of h in all of them. A warp says so
// after its reads, which the arrival follows. No CTA ends before every arrival has come to it and
// everything that it sent was read: the copying thread waits for its last slots to be empty.
//
// When it begins: early, as other steps do. Before it waits for h, it copies W's first stages and
// loads the input part.
//
// Floor: docs/kernels.md.
#pragma once

#include "../shared/exchange.cuh"
#include "forward_steps.cuh"
#include "tiles.h"

namespace fastlstm {
namespace cuda {

template <class S_, int kIndex>
struct WideShape {
  typedef S_ S;
  static constexpr WideTile kTile = wide_tile(kIndex);
  static constexpr int kSequences = kTile.sequences, kWarpSequences = kTile.warp_sequences;
  static constexpr int kStages = kTile.stages, kStageBlocks = kTile.stage_blocks;
  static constexpr int kWarps = 8, kThreads = 32 * kWarps;
  static constexpr int kColumnWarps = kSequences / kWarpSequences, kSplit = kWarps / kColumnWarps;
  // A slot is filled again so many stages after it was read: none of the warps has to wait for it.
  static constexpr int kLag = kStages / 4;
  static constexpr int kTiles = kWarpSequences / 8;  // of a warp: eight sequences each
  // A thread has two sequences of each tile. At the end it keeps so many of a warp's.
  static constexpr int kShare = 2 * kTiles / kSplit;
  // Of a block, of a stage, and of the ring.
  static constexpr int kWeightBytes = kWideUnits * 4 * 32, kHiddenBytes = kSequences * 32;
  static constexpr int kStageWeights = kStageBlocks * kWeightBytes,
                       kStageHidden = kStageBlocks * kHiddenBytes,
                       kStageBytes = kStageWeights + kStageHidden;
  static constexpr int kBarriersAt = kStages * kStageBytes;
  static constexpr int kSharedBytes = kTile.shared();

  static_assert(sizeof(S) == 2, "a word is a pair of elements");
  static_assert(kBarriersAt + kStages * 2 * int(sizeof(Mbarrier)) == kSharedBytes,
                "the planner knows the kernel's memory");
  static_assert(kStageBlocks % kSplit == 0, "the warps of a split take equal parts of a stage");
  static_assert(kShare * kSplit == 2 * kTiles, "and equal parts of the sequences");
  static_assert(kColumnWarps * kSplit * (kSplit - 1) * kShare * 1024 <= kBarriersAt,
                "the partial sums fit where the operands were");
};

template <class S>
struct WideArgs {
  CellForwardStep<S> step[2];  // by direction; h_before is the product's operand
  const S* weights[2];
  int active[2];   // sequences in the step
  int cluster;     // its CTAs
  int slots;       // parts of the rows: CTAs beyond them only help to copy
  int blocks;      // of K, whole stages
  uint64_t limit;  // of a wait, in nanoseconds; 0: none
};

// The element of packed h that belongs to a unit of a sequence. Of 16 sequences and 16 units, lane
// 4 * (sequence % 8) + place holds units 2 * place, 2 * place + 1 and those eight further on, of
// both sequences.
__host__ __device__ __forceinline__ int64_t wide_place(int sequences, int blocks, int sequence,
                                                       int unit) {
  const int of_group = sequence % sequences, pair = unit % 16 / 2;
  const int64_t block = int64_t(sequence / sequences) * blocks + unit / 16;
  return (block * (sequences / 16) + of_group / 16) * 256 + (of_group % 8 * 4 + pair % 4) * 8 +
         of_group / 8 % 2 * 4 + pair / 4 * 2 + unit % 2;
}

#if FASTLSTM_SM90

template <class Shape>
class WideCta {
  typedef typename Shape::S S;
  typedef float Sums[4][Shape::kTiles][4];

 public:
  __device__ __forceinline__ WideCta(const WideArgs<S>& args, unsigned char* shared)
      : args_(args),
        step_(args.step[blockIdx.z]),
        shared_(shared),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32),
        stages_(args.blocks / Shape::kStageBlocks) {}

  // By the thread that copies, before the barrier of the cluster.
  __device__ __forceinline__ void begin_copies() const {
    for (int slot = 0; slot < Shape::kStages; ++slot) {
      init(full(slot), 1);
      init(empty(slot), Shape::kWarps * args_.cluster);
    }
    publish_mbarriers();
    fence_async_copies();  // the copies below count on the mbarriers before any barrier
#pragma unroll 1
    for (int k = 0; k < Shape::kStages && k < stages_; ++k) copy_weights(k, k);
  }
  // And when h is complete.
  __device__ __forceinline__ void begin_hidden() const {
#pragma unroll 1
    for (int k = 0; k < Shape::kStages && k < stages_; ++k) copy_hidden(k, k);
  }
  // Before the CTA ends.
  __device__ __forceinline__ void end_copies() {
#pragma unroll 1
    for (int j = min_of(stages_, Shape::kStages); j > 0; --j) await_empty();
  }

  // By all threads. Each sum begins in the warp that has it at the end.
  __device__ __forceinline__ void begin_sums() {
    float pre[Shape::kShare][4][2] = {};
#pragma unroll
    for (int j = 0; j < Shape::kShare; ++j)
      if (has(j)) step_.initial_units(row(j), unit(), pre[j]);
#pragma unroll
    for (int owner = 0; owner < Shape::kSplit; ++owner)
#pragma unroll
      for (int j = 0; j < Shape::kShare; ++j)
#pragma unroll
        for (int q = 0; q < 4; ++q)
#pragma unroll
          for (int u = 0; u < 2; ++u) {
            const int at = owner * Shape::kShare + j;
            sums_[q][at / 2][at % 2 + 2 * u] = owner == split() ? pre[j][q][u] : 0;
          }
  }
  // When c is complete: long before the cells need it.
  __device__ __forceinline__ void load_states() {
#pragma unroll
    for (int j = 0; j < Shape::kShare; ++j)
      if (has(j)) step_.load_states(row(j), unit(), before_[j]);
  }
  __device__ __forceinline__ void multiply() {
    const bool signals = lane_ < args_.cluster;
    const Remote readers = remote(empty(0), signals ? lane_ : 0);
    int slot = 0;
    unsigned parity = 0;
#pragma unroll 1
    for (int k = 0; k < stages_; ++k) {
      const int next_stage = k - Shape::kLag + Shape::kStages;
      if (k >= Shape::kLag && next_stage < stages_ && copies()) {
        const int emptied = await_empty();
        copy_weights(next_stage, emptied);
        copy_hidden(next_stage, emptied);
      }
      wait(full(slot), parity, args_.limit);
      const unsigned char* stage = shared_ + slot * Shape::kStageBytes + lane_ * 16;
#pragma unroll
      for (int j = 0; j < Shape::kStageBlocks / Shape::kSplit; ++j)
        multiply_block(stage, j * Shape::kSplit + split());
      __syncwarp();
      if (signals) arrive(readers + slot * 2 * unsigned(sizeof(Mbarrier)));
      next(slot, parity);
    }
  }
  __device__ __forceinline__ void finish() {
    float own[Shape::kShare][4][2];
    add_splits(own);
#pragma unroll
    for (int j = 0; j < Shape::kShare; ++j)
      if (has(j))
        step_.finish_units(row(j), unit(),
                           wide_place(Shape::kSequences, args_.blocks, row(j), unit()), before_[j],
                           own[j]);
  }

  __device__ __forceinline__ bool copies() const { return threadIdx.x == 0; }

 private:
  __device__ __forceinline__ static void next(int& slot, unsigned& parity) {
    if (++slot < Shape::kStages) return;
    slot = 0;
    parity ^= 1;
  }
  // The next slot of the ring, when it is empty.
  __device__ __forceinline__ int await_empty() {
    const int slot = emptied_;
    wait(empty(slot), emptied_parity_, args_.limit);
    next(emptied_, emptied_parity_);
    return slot;
  }
  __device__ __forceinline__ Mbarrier* full(int slot) const {
    return reinterpret_cast<Mbarrier*>(shared_ + Shape::kBarriersAt) + 2 * slot;
  }
  __device__ __forceinline__ Mbarrier* empty(int slot) const { return full(slot) + 1; }

  __device__ __forceinline__ int split() const { return warp_ / Shape::kColumnWarps; }
  __device__ __forceinline__ int column_warp() const { return warp_ % Shape::kColumnWarps; }
  __device__ __forceinline__ int unit() const { return blockIdx.x * kWideUnits + lane_ / 4 * 2; }
  // The sequences of a thread's share, and whether its units of the j-th one are in the step.
  __device__ __forceinline__ int row(int j) const {
    const int at = split() * Shape::kShare + j;
    return blockIdx.y * Shape::kSequences + column_warp() * Shape::kWarpSequences + at / 2 * 8 +
           lane_ % 4 * 2 + at % 2;
  }
  __device__ __forceinline__ bool has(int j) const {
    return row(j) < args_.active[blockIdx.z] && unit() < step_.width;
  }

  __device__ __forceinline__ void copy_weights(int stage, int slot) const {
    const int64_t part = min_of(int(blockIdx.x), args_.slots - 1);
    const unsigned char* from = reinterpret_cast<const unsigned char*>(args_.weights[blockIdx.z]) +
                                (part * stages_ + stage) * Shape::kStageWeights;
    arrive_expecting(full(slot), Shape::kStageBytes);
    bulk_load(shared_ + slot * Shape::kStageBytes, from, Shape::kStageWeights, full(slot));
  }
  // This CTA's part of a stage, in pieces of 16 sequences of a block.
  __device__ __forceinline__ void copy_hidden(int stage, int slot) const {
    constexpr int kPiece = 512;
    constexpr unsigned kPieces = Shape::kStageHidden / kPiece;
    const unsigned rank = cluster_rank(), ctas = args_.cluster,
                   begin = kPieces * rank / ctas * kPiece,
                   end = kPieces * (rank + 1) / ctas * kPiece;
    const unsigned char* from = reinterpret_cast<const unsigned char*>(step_.h_before) +
                                (int64_t(blockIdx.y) * stages_ + stage) * Shape::kStageHidden;
    unsigned char* to = shared_ + slot * Shape::kStageBytes + Shape::kStageWeights;
    bulk_multicast(to + begin, from + begin, end - begin, full(slot), (1u << ctas) - 1);
  }

  __device__ __forceinline__ void multiply_block(const unsigned char* stage, int block) {
    const uint4* w = reinterpret_cast<const uint4*>(stage + block * Shape::kWeightBytes);
    const uint4* h =
        reinterpret_cast<const uint4*>(stage + Shape::kStageWeights + block * Shape::kHiddenBytes) +
        column_warp() * Shape::kTiles / 2 * 32;
    uint4 right[Shape::kTiles / 2];
#pragma unroll
    for (int p = 0; p < Shape::kTiles / 2; ++p) right[p] = h[p * 32];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const uint4 left = w[q * 32];
      const uint32_t a[4] = {left.x, left.y, left.z, left.w};
#pragma unroll
      for (int p = 0; p < Shape::kTiles / 2; ++p) {
        const uint32_t even[2] = {right[p].x, right[p].y}, odd[2] = {right[p].z, right[p].w};
        mma(sums_[q][2 * p], a, even, S());
        mma(sums_[q][2 * p + 1], a, odd, S());
      }
    }
  }

  // The whole sums of this thread's share of sequences: a float4 has the gates of a unit.
  __device__ __forceinline__ void add_splits(float (&own)[Shape::kShare][4][2]) {
    float4* partial = reinterpret_cast<float4*>(shared_) +
                      column_warp() * Shape::kSplit * (Shape::kSplit - 1) * Shape::kShare * 64 +
                      lane_;
    const auto place = [&](int owner, int from, int j, int u) {
      return ((owner * (Shape::kSplit - 1) + from) * Shape::kShare + j) * 64 + u * 32;
    };
    __syncthreads();  // all have read the operands
#pragma unroll
    for (int owner = 0; owner < Shape::kSplit; ++owner)
#pragma unroll
      for (int j = 0; j < Shape::kShare; ++j)
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          const int at = owner * Shape::kShare + j, e = at % 2 + 2 * u;
          const float4 x = make_float4(sums_[0][at / 2][e], sums_[1][at / 2][e],
                                       sums_[2][at / 2][e], sums_[3][at / 2][e]);
          if (owner != split()) {
            partial[place(owner, split() - (split() > owner), j, u)] = x;
          } else {
            own[j][0][u] = x.x;
            own[j][1][u] = x.y;
            own[j][2][u] = x.z;
            own[j][3][u] = x.w;
          }
        }
    __syncthreads();
#pragma unroll
    for (int from = 0; from < Shape::kSplit - 1; ++from)
#pragma unroll
      for (int j = 0; j < Shape::kShare; ++j)
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          const float4 x = partial[place(split(), from, j, u)];
          own[j][0][u] += x.x;
          own[j][1][u] += x.y;
          own[j][2][u] += x.z;
          own[j][3][u] += x.w;
        }
  }

  const WideArgs<S>& args_;
  const CellForwardStep<S>& step_;
  unsigned char* const shared_;
  const int lane_, warp_, stages_;
  int emptied_ =
      0;  // the slot that is filled next, and the parity of the phase in which it is read
  unsigned emptied_parity_ = 0;
  Sums sums_;  // by gate, tile and element
  float before_[Shape::kShare][2];
};

#endif  // FASTLSTM_SM90

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kTile.ctas)
    wide_step_kernel(const __grid_constant__ WideArgs<typename Shape::S> args) {
#if FASTLSTM_SM90
  FASTLSTM_SHARED_BUFFER(shared);
  // The whole cluster has the same sequences.
  if (int(blockIdx.y) * Shape::kSequences >= args.active[blockIdx.z]) return;
  WideCta<Shape> cta(args, shared);
  if (cta.copies()) cta.begin_copies();
  cluster_barrier();
  cta.begin_sums();
  wait_for_primary();
  start_dependents();
  if (cta.copies()) cta.begin_hidden();
  cta.load_states();
  cta.multiply();
  cta.finish();
  if (cta.copies()) cta.end_copies();
#endif
}

}  // namespace cuda
}  // namespace fastlstm

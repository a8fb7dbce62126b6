// The rows that a forward CTA reads and writes in a step: the input part and the outputs. Both move
// in pieces of 16 bytes while h travels, by all threads, those without cells first.
#pragma once

#include "forward_product.cuh"
#include "rules.h"
#include "walk.cuh"

namespace fastlstm {
namespace cuda {

template <class S>
struct GridForwardDirection {  // one direction of a layer
  typedef Acc<S> T;
  const uint4* fragments;           // of all CTAs (GridPackArgs)
  const unsigned char* h0_packets;  // h0 as packets, group after group; or null
  const T* start;                   // the input part by slots, one slot for each CTA
  const int* index;                 // or null
  const T* bias;                    // (4H) or null
  const S *h0, *c0;                 // (B, H) or null
  S *y, *gates, *h_n, *c_n;         // gates: (rows, 4H) or null
  T* cell_states;
  DrawnRules<T> rules;
};

template <class S>
struct GridForwardArgs {
  GridForwardDirection<S> direction[2];
  unsigned char* exchange;  // (teams of the launch, 2, slot_bytes), zeroed
  // Team number: direction * groups + group. This launch has those from first_team on.
  int groups, first_team;
  GridTeam team;
  StepRows steps;
  int units;  // H
  int64_t y_stride;
  bool aligned;    // rows of H elements, to 16 bytes
  uint64_t limit;  // of a wait, in nanoseconds; 0: none
};

// A CTA of a team: blockIdx.x is its slot of units. The slot and the direction's arguments are
// loaded where they are used: in registers from step to step, they would leave too few for weights.
template <class S>
struct GridForwardCta {
  const GridForwardArgs<S>& args;
  const int direction;

  __device__ __forceinline__ int slot() const {
    uint32_t slot = blockIdx.x;
    pin(slot);
    return int(slot);
  }
  __device__ __forceinline__ const GridForwardDirection<S>& layer() const {
    uint32_t d = direction;
    pin(d);
    return args.direction[d];
  }
};

// Where registers are short, what follows from a thread's index is computed anew in every step.
template <class Product>
constexpr bool kShortOfRegisters =
    Product::kBlocks * Product::kTiles > 2 || Product::kGrid.staged_slabs > 0;
template <class Product>
__device__ __forceinline__ unsigned thread_in_step() {
  return kShortOfRegisters<Product> ? unsigned(recomputed_thread()) : threadIdx.x;
}
// Its number where pieces are dealt out: the last four warps, which may have no cells, come first.
template <class Product>
__device__ __forceinline__ unsigned mover() {
  return thread_in_step<Product>() ^ kGridThreads / 2;
}

// Loads the input part by asynchronous copies, kStages steps ahead.
template <class S, class Product>
class GridInput {
  typedef Acc<S> T;
  static constexpr ForwardLayout kLayout = Product::kLayout;
  static constexpr int kUnits = Product::kGrid.units, kSequences = Product::kSequences;
  // A sequence has kUnits pieces.
  static constexpr int kJobs = (kSequences * kUnits + kGridThreads - 1) / kGridThreads;

 public:
  static constexpr int kStages = Product::kGrid.stages;

  __device__ __forceinline__ GridInput(const GridForwardCta<S>& cta, const GroupSteps& steps,
                                       unsigned char* stages)
      : cta_(cta), steps_(steps), stages_(stages) {}

  __device__ __forceinline__ const float* stage(int s) const {
    return reinterpret_cast<const float*>(stages_ + s % kStages * kLayout.stage_bytes);
  }

  // Called for steps 0, 1, 2, ..., each after look_up(s).
  __device__ __forceinline__ void copy(int s) const {
    const unsigned me = mover<Product>();
    unsigned char* stage = stages_ + s % kStages * kLayout.stage_bytes;
    const int stride = cta_.args.team.ctas * 4 * kUnits, slot = cta_.slot();
#pragma unroll
    for (int j = 0; j < kJobs; ++j) {
      const unsigned x = me + j * kGridThreads, n = x / kUnits, chunk = x % kUnits;
      if (n >= kSequences) continue;
      const T* from = cta_.layer().start;
      if (source_[j] >= 0) from += int64_t(source_[j]) * stride + (slot * kUnits + int(chunk)) * 4;
      copy_async(stage + (n * kLayout.row_floats + chunk * 4) * 4, from, source_[j] >= 0 ? 16 : 0);
    }
    commit_async();
  }
  __device__ __forceinline__ void look_up(int s) {
    const unsigned me = mover<Product>();
    const int row = int(steps_.row(s)), count = steps_.active(s);
#pragma unroll
    for (int j = 0; j < kJobs; ++j) {
      const int n = int(me + j * kGridThreads) / kUnits;
      source_[j] = n >= count ? -1 : cta_.layer().index ? cta_.layer().index[row + n] : row + n;
    }
  }

 private:
  const GridForwardCta<S>& cta_;
  const GroupSteps& steps_;
  unsigned char* const stages_;
  int source_[kJobs];  // the row of `start` of the next copies, or -1
};

// Hands the outputs of a step from the owners of cells to the threads that store them. An owner
// warp has eight units of four or eight sequences, and puts them where its partial sums were, which
// it alone has read: for each sequence h, gates and c, of which each is one or two pieces.
template <class S, class Product>
class GridOutputs {
  typedef Acc<S> T;
  typedef PartialSums<Product> Partial;
  static constexpr int kUnits = Product::kGrid.units, kTiles = Product::kTiles;
  static constexpr int kBlocks = Product::kBlocks, kCells = Partial::kCells;
  static constexpr int kPiece = 16 / int(sizeof(S));            // elements
  static constexpr int kHiddenPieces = kBlocks * (8 / kPiece);  // of a sequence; and of a gate
  static constexpr int kPieces = 5 * kHiddenPieces + 2 * kBlocks;
  static constexpr int kJobs = Product::kSequences * kPieces;
  static constexpr int kRounds = (kJobs + kGridThreads - 1) / kGridThreads;
  static constexpr int kGatesAt = 8 * int(sizeof(S)), kCellAt = 5 * kGatesAt;
  static constexpr int kRowBytes = kCellAt + 8 * int(sizeof(T));
  static_assert(kCells <= 2 && 4 * kCells * kRowBytes <= Partial::kOwnerBytes, "they fit");

 public:
  __device__ __forceinline__ GridOutputs(const GridForwardCta<S>& cta, const GroupSteps& steps,
                                         unsigned char* partial)
      : cta_(cta),
        steps_(steps),
        shared_(partial),
        own_(partial + warp_of_thread() * Partial::kOwnerBytes +
             lane_of_thread() % 4 * kCells * kRowBytes + lane_of_thread() / 4 * int(sizeof(S))) {}

  // By the cell's owner, when all lanes of its warp have read their partial sums.
  __device__ __forceinline__ void put(int r, S h, const CellForward<T>& cell) const {
    unsigned char* const to = own_ + r * kRowBytes;
    S* const element = reinterpret_cast<S*>(to);
    *element = h;
    store_gates(cell, element + 8, 8);
    constexpr int kFurther = int(sizeof(T) - sizeof(S));  // of an element of c
    *reinterpret_cast<T*>(to + kCellAt + lane_of_thread() / 4 * kFurther) = cell.c;
  }

  // Between two barriers, the first behind all put() of step s.
  __device__ __forceinline__ void store(int s) const {
    if (cta_.args.aligned)
      store_pieces(s);
    else
      store_elements(s);
  }

 private:
  // Where a sequence's eight units of one block are.
  __device__ __forceinline__ const unsigned char* row(int block, int n) const {
    const int x = (block * kTiles + n / 8) * 2 + n % 2;
    return shared_ + x / kCells * Partial::kOwnerBytes +
           (kCells == 2 ? n % 8 : n % 8 / 2) * kRowBytes;
  }

  __device__ __forceinline__ void store_pieces(int s) const {
    const GridForwardArgs<S>& args = cta_.args;
    const unsigned me = mover<Product>();
    const int count = steps_.active(s);
    const int64_t first = steps_.row(s);
    const bool saves = cta_.layer().gates != nullptr;
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const unsigned job = me + r * kGridThreads;
      const int n = int(job / kPieces), piece = int(job % kPieces);
      const int kind = piece / kHiddenPieces;  // 0: h; 1 to 4: a gate; from 5 on: c
      if (n >= count || (kind > 0 && !saves)) continue;
      const bool is_c = kind >= 5;
      const int in_row = piece - (is_c ? 5 : kind) * kHiddenPieces;
      const int block = is_c ? in_row / 2 : in_row / (8 / kPiece);  // of eight units
      const int part = is_c ? in_row % 2 : in_row % (8 / kPiece);
      const int unit = cta_.slot() * kUnits + block * 8 + part * (is_c ? 4 : kPiece);
      if (unit >= args.units) continue;
      const uint4 value = *reinterpret_cast<const uint4*>(
          row(block, n) + (is_c ? kCellAt : kind * kGatesAt) + part * 16);
      const int64_t at = first + n;
      void* to = kind == 0 ? cta_.layer().y + at * args.y_stride + unit
                           : cta_.layer().gates + (at * 4 + kind - 1) * args.units + unit;
      if (is_c) to = cta_.layer().cell_states + at * args.units + unit;
      *static_cast<uint4*>(to) = value;
    }
  }

  __device__ __forceinline__ void store_elements(int s) const {
    const GridForwardArgs<S>& args = cta_.args;
    const int count = steps_.active(s), units = args.units;
    const int64_t first = steps_.row(s);
#pragma unroll 1
    for (int j = int(mover<Product>()); j < count * kUnits; j += kGridThreads) {
      const int n = j / kUnits, local = j % kUnits, unit = cta_.slot() * kUnits + local;
      if (unit >= units) continue;
      const unsigned char* from = row(local / 8, n);
      const S* element = reinterpret_cast<const S*>(from) + local % 8;
      const int64_t at = first + n;
      cta_.layer().y[at * args.y_stride + unit] = *element;
      if (cta_.layer().gates == nullptr) continue;
      S* gates = cta_.layer().gates + at * 4 * units + unit;
      for (int q = 0; q < 4; ++q) gates[q * units] = element[(q + 1) * 8];
      cta_.layer().cell_states[at * units + unit] =
          reinterpret_cast<const T*>(from + kCellAt)[local % 8];
    }
  }

  const GridForwardCta<S>& cta_;
  const GroupSteps& steps_;
  unsigned char *const shared_, *const own_;  // own_: h of this thread's first cell
};

}  // namespace cuda
}  // namespace fastlstm

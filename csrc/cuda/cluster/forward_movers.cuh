// The forward cluster kernel's moving warps: they load the input's part some steps ahead and store
// a step's results behind it, so that nothing scattered stands in a computing warp's way.
#pragma once

#include "forward_shape.cuh"
#include "group.cuh"
#include "rules.h"

namespace fastlstm {
namespace cuda {

// One direction of a layer.
template <class S>
struct ForwardDirection {
  const float* start;  // the input's part by slots, one for each CTA of a cluster
  const S* w_hh;       // (4H, H)
  const float* bias;   // (4H) or null
  const S *h0, *c0;    // (B, H) or null
  S *y, *h_n, *c_n;    // y: (rows, y_wide)
  S* gates;            // (rows, 4H) or null
  float* cells;        // (rows, H), with gates
  DrawnRules<float> rules;
};

template <class S>
struct ClusterForwardArgs {
  ForwardDirection<S> direction[2];
  RowMap map;
  const int* index;  // the row of `start` that belongs to a row; null: its own
  int directions, hidden_size;
  int64_t y_wide;
  uint64_t limit;  // nanoseconds that a wait may take; 0: any
};

#if FASTLSTM_SM90

// The steps in which a sequence is: from `enter` on, up to `leave`.
struct SequenceSpan {
  int enter, leave;
};

// What a CTA of a cluster knows of itself.
template <class F>
struct ForwardCta {
  typedef typename F::S S;
  const ClusterForwardArgs<S>& args;
  const ForwardDirection<S>& own;
  unsigned char* shared;
  int direction, rank, begin;  // its cluster's first sequence
  int steps;                   // of its cluster

  __device__ __forceinline__ int time(int s) const { return direction == 0 ? s : steps - 1 - s; }
  __device__ __forceinline__ unsigned char* hidden(int s) const {
    return shared + s % 2 * F::kHidden;
  }
  __device__ __forceinline__ SequenceSpan* span(int sequence) const {
    return reinterpret_cast<SequenceSpan*>(shared + F::kSpansAt) + sequence;
  }
  // Of step s: a sequence's input part, and what leaves of it. Step -1 stands where step 1 does.
  __device__ __forceinline__ float* input(int s, int sequence) const {
    return reinterpret_cast<float*>(shared + F::kInputAt +
                                    (s % F::kRing * F::kSequences + sequence) * F::kInput);
  }
  __device__ __forceinline__ S* output(int s, int sequence, int unit) const {
    return reinterpret_cast<S*>(shared + F::kOutputAt +
                                ((s & 1) * F::kSequences + sequence) * F::kOutput) +
           unit;
  }
  __device__ __forceinline__ float* output_cell(int s, int sequence, int unit) const {
    return reinterpret_cast<float*>(output(s, sequence, 5 * F::kUnits)) + unit;
  }
};

// All warps of a CTA.
template <class F>
__device__ __forceinline__ void meet() {
  named_barrier(1, F::kThreads);
}

// A moving warp loads an equal share of the sequences. A lane has the place in `start` of one of
// them in one of the next steps: those of several steps are looked up at once, long before they are
// needed.
template <class F>
class InputLoader {
  static constexpr int kShare = F::kSequences / F::kMovers;
  static constexpr int kSteps = 32 / kShare;  // that a warp looks up at once

 public:
  __device__ __forceinline__ explicit InputLoader(const ForwardCta<F>& cta)
      : cta_(cta), begin_((threadIdx.x / 32 - F::kWarps) * kShare) {
    find(lane() / kShare);
  }

  // For steps in turn, from 0 on.
  __device__ __forceinline__ void load(int s) {
    if (s % kSteps == 0) {
      from_ = next_;
      count_ = next_count_;
      find(s + kSteps + lane() / kShare);
    }
    if (s >= cta_.steps) return;
    const int j = lane() % kShare;
    const bool turn = lane() / kShare == s % kSteps;
    if (turn && j == 0) arrive_expecting(loaded(s), count_ * 16 * F::kUnits);
    __syncwarp();
    if (turn && j < count_) bulk_load(cta_.input(s, begin_ + j), from_, 16 * F::kUnits, loaded(s));
  }
  // Until a step's input part is there.
  __device__ __forceinline__ void await(int s) const {
    wait(loaded(s), s / F::kRing % 2, cta_.args.limit);
  }

 private:
  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }

  __device__ __forceinline__ Mbarrier* loaded(int s) const {
    return reinterpret_cast<Mbarrier*>(cta_.shared + F::kBarriersAt) + 2 + s % F::kRing;
  }

  __device__ __forceinline__ void find(int s) {
    next_count_ = 0;
    if (s >= cta_.steps) return;
    const GroupRows rows = group_rows(cta_.args.map, cta_.time(s), cta_.begin + begin_, kShare);
    next_count_ = rows.count;
    if (lane() % kShare >= rows.count) return;
    const int64_t row = rows.first + lane() % kShare;
    const int64_t source = cta_.args.index ? int64_t(cta_.args.index[row]) : row;
    next_ = cta_.own.start + (source * F::kCtas + cta_.rank) * 4 * F::kUnits;
  }

  const ForwardCta<F>& cta_;
  const int begin_;  // of its share
  const float *from_ = nullptr, *next_ = nullptr;
  int count_ = 0, next_count_ = 0;  // of the share's sequences, those in the step
};

// All moving warps store a step, 16 bytes a thread and turn, neighbouring threads at neighbouring
// places. What a thread stores in a turn differs between steps by the row alone.
template <class F>
class OutputStorer {
  typedef typename F::S S;
  // Pieces of a sequence: h, four gates, the cell state.
  static constexpr int kHiddenPieces = F::kUnits / F::kPiece;
  static constexpr int kPieces = 5 * kHiddenPieces + F::kUnits / 4;
  static constexpr int kStep = 32 * F::kMovers;
  static constexpr int kTurns = (F::kSequences * kPieces + kStep - 1) / kStep;

 public:
  __device__ __forceinline__ explicit OutputStorer(const ForwardCta<F>& cta)
      : cta_(cta), aligned_(cta.args.hidden_size % F::kPiece == 0), rows_(rows(0)) {
    const int hidden_size = cta.args.hidden_size;
#pragma unroll
    for (int r = 0; r < kTurns; ++r) {
      const int j = mover() + r * kStep, sequence = j / kPieces, piece = j % kPieces;
      const int kind = piece / kHiddenPieces;  // 0: h; 1 to 4: a gate; from 5 on the cell state
      const int unit = cta.rank * F::kUnits + (kind < 5 ? piece % kHiddenPieces * F::kPiece
                                                        : (piece - 5 * kHiddenPieces) * 4);
      char* to = reinterpret_cast<char*>(cta.own.y + unit);
      wide_[r] = uint32_t(cta.args.y_wide) * F::kSize;
      if (kind > 0) {
        to = reinterpret_cast<char*>(cta.own.gates + (kind - 1) * int64_t(hidden_size) + unit);
        wide_[r] = 4u * hidden_size * F::kSize;
      }
      if (kind > 4) {
        to = reinterpret_cast<char*>(cta.own.cells + unit);
        wide_[r] = 4u * hidden_size;
      }
      to_[r] = to + int64_t(sequence) * wide_[r];
      from_[r] = sequence * F::kOutput + piece * 16;
      const bool kept = unit < hidden_size && (kind == 0 || cta.own.gates);
      sequence_[r] = kept ? sequence : F::kSequences;
    }
  }

  // For steps in turn, from 0 on.
  __device__ __forceinline__ void store(int s) {
    if (aligned_)
      store_pieces(s);
    else
      store_elements(s);
    if (s + 1 < cta_.steps) rows_ = rows(s + 1);
  }

 private:
  __device__ __forceinline__ static int mover() { return int(threadIdx.x) - 32 * F::kWarps; }
  __device__ __forceinline__ GroupRows rows(int s) const {
    return group_rows(cta_.args.map, cta_.time(s), cta_.begin, F::kSequences);
  }

  __device__ __forceinline__ void store_pieces(int s) const {
    const unsigned char* from = reinterpret_cast<const unsigned char*>(cta_.output(s, 0, 0));
    const uint32_t row = uint32_t(rows_.first);
    constexpr int kAtOnce = 4;
#pragma unroll
    for (int begin = 0; begin < kTurns; begin += kAtOnce) {
      uint4 piece[kAtOnce];
#pragma unroll
      for (int r = begin; r < min_of(begin + kAtOnce, kTurns); ++r)
        if (sequence_[r] < rows_.count)
          piece[r - begin] = *reinterpret_cast<const uint4*>(from + from_[r]);
#pragma unroll
      for (int r = begin; r < min_of(begin + kAtOnce, kTurns); ++r)
        if (sequence_[r] < rows_.count)
          *reinterpret_cast<uint4*>(to_[r] + uint64_t(row) * wide_[r]) = piece[r - begin];
    }
  }

  // Where rows are not aligned: a unit of a sequence a thread and turn.
  __device__ __forceinline__ void store_elements(int s) const {
    const ForwardDirection<S>& own = cta_.own;
    const int hidden_size = cta_.args.hidden_size;
#pragma unroll 1
    for (int j = mover(); j < rows_.count * F::kUnits; j += kStep) {
      const int sequence = j / F::kUnits, local = j % F::kUnits;
      const int unit = cta_.rank * F::kUnits + local;
      if (unit >= hidden_size) continue;
      const int64_t row = rows_.first + sequence;
      const S* from = cta_.output(s, sequence, local);
      own.y[row * cta_.args.y_wide + unit] = from[0];
      if (own.gates == nullptr) continue;
      S* gates = own.gates + row * 4 * hidden_size + unit;
      for (int q = 0; q < 4; ++q) gates[q * hidden_size] = from[(q + 1) * F::kUnits];
      own.cells[row * hidden_size + unit] = *cta_.output_cell(s, sequence, local);
    }
  }

  const ForwardCta<F>& cta_;
  const bool aligned_;     // whether a row's pieces are
  GroupRows rows_;         // of the next step
  char* to_[kTurns];       // in row 0 of the call
  uint32_t wide_[kTurns];  // bytes from row to row
  int from_[kTurns];       // in the buffer of what leaves
  int sequence_[kTurns];   // beyond all: nothing to store
};

#endif

}  // namespace cuda
}  // namespace fastlstm

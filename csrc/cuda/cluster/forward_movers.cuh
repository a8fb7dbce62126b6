// The movers of the forward cluster kernel: warps that load the input part some steps ahead and
// store a step's results behind it. The computing warps have no scattered accesses to wait for.
#pragma once

#include "../shared/step_rows.cuh"
#include "forward_shape.cuh"
#include "rules.h"

namespace fastlstm {
namespace cuda {

// One direction of a layer.
template <class S>
struct ClusterForwardDirection {
  const float* start;  // the input part by slots, one slot for each CTA of a cluster
  const S* w_hh;       // (4H, H)
  const float* bias;   // (4H) or null
  const S *h0, *c0;    // (B, H) or null
  S *y, *h_n, *c_n;    // y: (rows, y_stride)
  // Between ranges of steps, c as it is computed, (B, H), or null: instead of c0, and besides c_n.
  const float* c_before;
  float* c_after;
  S* gates;            // (rows, 4H) or null
  float* cell_states;  // (rows, H), with gates
  DrawnRules<float> rules;
};

template <class S>
struct ClusterForwardArgs {
  ClusterForwardDirection<S> direction[2];
  StepRows steps;
  const int* index;   // for each row, its row of `start`; null: the same
  int64_t start_row;  // the row whose input part `start` begins with
  int directions, hidden_size;
  int64_t y_stride;
  uint64_t limit;  // of a wait, in nanoseconds; 0: none
};

#if FASTLSTM_SM90

// The steps of a sequence: from `enter` to `leave` - 1.
struct SequenceSpan {
  int enter, leave;
};

// A CTA's place in its cluster, its part of the batch, and the layout of its shared memory. Groups
// take turns: turn 0 is step 0 of the first group, turn 1 that of the second, and so on.
template <class Shape>
struct ClusterForwardCta {
  typedef typename Shape::S S;
  const ClusterForwardArgs<S>& args;
  const ClusterForwardDirection<S>& layer;
  unsigned char* shared;
  int direction, rank, begin;  // begin: its cluster's first sequence
  int steps;                   // of its cluster's first sequence, the longest

  __device__ __forceinline__ int turns() const { return steps * Shape::kGroups; }
  __device__ __forceinline__ static int step_of(int turn) {
    return int(unsigned(turn) / Shape::kGroups);
  }
  // The first sequence of a turn's group.
  __device__ __forceinline__ int begin_of(int turn) const {
    return begin + int(unsigned(turn) % Shape::kGroups) * Shape::kSequences;
  }
  __device__ __forceinline__ int time(int s) const { return direction == 0 ? s : steps - 1 - s; }
  __device__ __forceinline__ int time_of_call(int s) const { return args.steps.begin + time(s); }
  // The buffer of h that a turn multiplies; what it computes goes to that of its group's next turn.
  static constexpr int kBuffers = 2 * Shape::kGroups;
  __device__ __forceinline__ static int buffer_of(int turn) {
    return int(unsigned(turn) % kBuffers);
  }
  // The mbarriers: for each part of h those of its buffers; those of the input ring; those by which
  // computing warps say that the outputs of a turn are in their buffer, and movers that they have
  // read them.
  __device__ __forceinline__ Mbarrier* barriers() const {
    return reinterpret_cast<Mbarrier*>(shared + Shape::kBarriersAt);
  }
  __device__ __forceinline__ Mbarrier* loaded(int turn) const {
    return barriers() + kBuffers * Shape::kParts + turn % Shape::kRing;
  }
  __device__ __forceinline__ Mbarrier* filled(int turn) const { return loaded(0) + ring_end(turn); }
  __device__ __forceinline__ Mbarrier* freed(int turn) const {
    return loaded(0) + ring_end(turn) + 2;
  }
  // Of a sequence of the cluster.
  __device__ __forceinline__ SequenceSpan* span(int sequence) const {
    return reinterpret_cast<SequenceSpan*>(shared + Shape::kSpansAt) + sequence;
  }
  // The input part of a sequence of a turn's group, and its outputs.
  __device__ __forceinline__ float* input(int turn, int sequence) const {
    return reinterpret_cast<float*>(shared + Shape::kInputAt +
                                    (turn % Shape::kRing * Shape::kSequences + sequence) *
                                        Shape::kInputBytes);
  }
  __device__ __forceinline__ S* output(int turn, int sequence, int unit) const {
    return reinterpret_cast<S*>(shared + Shape::kOutputAt +
                                ((turn & 1) * Shape::kSequences + sequence) * Shape::kOutputBytes) +
           unit;
  }
  __device__ __forceinline__ float* output_c(int turn, int sequence, int unit) const {
    return reinterpret_cast<float*>(output(turn, sequence, 5 * Shape::kUnits)) + unit;
  }

 private:
  __device__ __forceinline__ static int ring_end(int turn) { return Shape::kRing + (turn & 1); }
};

// How many mover warps load a turn's input part.
template <class Shape>
constexpr int kLoaders = Shape::kSequences > Shape::kMovers ? Shape::kMovers : 1;

// The mover warps load equal shares of a turn's sequences or, where a share would be one sequence,
// whole turns, each every fourth. A lane holds the address in `start` of one sequence in one of the
// warp's next turns: a warp looks up several turns at once, long before they are needed.
template <class Shape>
class InputLoader {
  static constexpr int kEvery = Shape::kMovers / kLoaders<Shape>;  // turns of which a warp has one
  static constexpr int kShare = Shape::kSequences / kLoaders<Shape>;
  static constexpr int kTurns = 32 / kShare;  // that a warp looks up at once

 public:
  __device__ __forceinline__ explicit InputLoader(const ClusterForwardCta<Shape>& cta)
      : cta_(cta),
        first_((int(threadIdx.x) / 32 - Shape::kWarps) % kEvery),
        begin_((int(threadIdx.x) / 32 - Shape::kWarps) / kEvery * kShare) {
    look_up(lane() / kShare);
  }

  // Called for turns 0, 1, 2, ...
  __device__ __forceinline__ void load(int turn) {
    if (kEvery > 1 && turn % kEvery != first_) return;
    const int n = turn / kEvery;
    if (n % kTurns == 0) {
      from_ = next_;
      count_ = next_count_;
      look_up(n + kTurns + lane() / kShare);
    }
    if (turn >= cta_.turns()) return;
    const int j = lane() % kShare;
    const bool loads = lane() / kShare == n % kTurns;
    if (loads && j == 0) arrive_expecting(cta_.loaded(turn), count_ * 16 * Shape::kUnits);
    __syncwarp();
    if (loads && j < count_)
      bulk_load(cta_.input(turn, begin_ + j), from_, 16 * Shape::kUnits, cta_.loaded(turn));
  }

 private:
  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }

  // The warp's nth turn.
  __device__ __forceinline__ void look_up(int n) {
    const int turn = n * kEvery + first_;
    next_count_ = 0;
    if (turn >= cta_.turns()) return;
    const GroupRows rows =
        cta_.args.steps.group(cta_.time(cta_.step_of(turn)), cta_.begin_of(turn) + begin_, kShare);
    next_count_ = rows.count;
    if (lane() % kShare >= rows.count) return;
    const int64_t row = rows.first + lane() % kShare;
    const int64_t source =
        cta_.args.index ? int64_t(cta_.args.index[row]) : row - cta_.args.start_row;
    next_ = cta_.layer.start + (source * Shape::kCtas + cta_.rank) * 4 * Shape::kUnits;
  }

  const ClusterForwardCta<Shape>& cta_;
  const int first_, begin_;  // its first turn; its share begins at this one of the sequences
  const float *from_ = nullptr, *next_ = nullptr;
  int count_ = 0, next_count_ = 0;  // sequences of the share that the turn has
};

// All mover warps store a turn together, 16 bytes of each thread in a round, neighbouring threads
// to neighbouring addresses. From turn to turn only the row of a thread's pieces changes. Where
// rows are not aligned to 16 bytes (kAligned), they store element by element: a loop of its own,
// for it has other registers.
template <class Shape, bool kAligned>
class OutputStorer {
  typedef typename Shape::S S;
  // Pieces of a sequence: h, four gates, c.
  static constexpr int kHiddenPieces = Shape::kUnits / Shape::kPiece;
  static constexpr int kPieces = 5 * kHiddenPieces + Shape::kUnits / 4;
  static constexpr int kStep = 32 * Shape::kMovers;
  static constexpr int kRounds = (Shape::kSequences * kPieces + kStep - 1) / kStep;

 public:
  __device__ __forceinline__ explicit OutputStorer(const ClusterForwardCta<Shape>& cta)
      : cta_(cta),
        packed_(opaque(cta.args.steps.first != nullptr)),
        to_next_(opaque(cta.direction == 0 ? cta.args.steps.batch : -cta.args.steps.batch)),
        rows_(rows(0)) {
    const int hidden_size = cta.args.hidden_size;
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int j = mover() + r * kStep, sequence = j / kPieces, piece = j % kPieces;
      const int kind = piece / kHiddenPieces;  // 0: h; 1 to 4: a gate; from 5 on: c
      const int unit = cta.rank * Shape::kUnits + (kind < 5 ? piece % kHiddenPieces * Shape::kPiece
                                                            : (piece - 5 * kHiddenPieces) * 4);
      char* to = reinterpret_cast<char*>(cta.layer.y + unit);
      row_bytes_[r] = uint32_t(cta.args.y_stride) * Shape::kElementBytes;
      if (kind > 0) {
        to = reinterpret_cast<char*>(cta.layer.gates + (kind - 1) * int64_t(hidden_size) + unit);
        row_bytes_[r] = 4u * hidden_size * Shape::kElementBytes;
      }
      if (kind > 4) {
        to = reinterpret_cast<char*>(cta.layer.cell_states + unit);
        row_bytes_[r] = 4u * hidden_size;
      }
      to_[r] = to + int64_t(sequence) * row_bytes_[r];
      from_[r] = sequence * Shape::kOutputBytes + piece * 16;
      const bool real = unit < hidden_size && (kind == 0 || cta.layer.gates);
      sequence_[r] = real ? sequence : Shape::kSequences;
    }
  }

  // Called for turns 0, 1, 2, ...
  __device__ __forceinline__ void store(int turn) {
    if constexpr (kAligned)
      store_pieces(turn);
    else
      store_elements(turn);
    if (turn + 1 >= cta_.turns()) return;
    if (Shape::kCtas == 1 && !packed_)
      rows_.first += to_next_;
    else
      rows_ = rows(turn + 1);
  }

 private:
  __device__ __forceinline__ static int mover() { return int(threadIdx.x) - 32 * Shape::kWarps; }
  __device__ __forceinline__ GroupRows rows(int turn) const {
    return cta_.args.steps.group(cta_.time(cta_.step_of(turn)), cta_.begin_of(turn),
                                 Shape::kSequences);
  }

  __device__ __forceinline__ void store_pieces(int turn) const {
    const unsigned char* from = reinterpret_cast<const unsigned char*>(cta_.output(turn, 0, 0));
    const uint32_t row = uint32_t(rows_.first);
    constexpr int kAtOnce = Shape::kStreams ? 2 : 4;
#pragma unroll
    for (int begin = 0; begin < kRounds; begin += kAtOnce) {
      uint4 piece[kAtOnce];
#pragma unroll
      for (int r = begin; r < min_of(begin + kAtOnce, kRounds); ++r)
        if (sequence_[r] < rows_.count)
          piece[r - begin] = *reinterpret_cast<const uint4*>(from + from_[r]);
#pragma unroll
      for (int r = begin; r < min_of(begin + kAtOnce, kRounds); ++r)
        if (sequence_[r] < rows_.count)
          *reinterpret_cast<uint4*>(to_[r] + uint64_t(row) * row_bytes_[r]) = piece[r - begin];
    }
  }

  __device__ __forceinline__ void store_elements(int turn) const {
    const ClusterForwardDirection<S>& layer = cta_.layer;
    const int hidden_size = cta_.args.hidden_size;
#pragma unroll 1
    for (int j = mover(); j < rows_.count * Shape::kUnits; j += kStep) {
      const int sequence = j / Shape::kUnits, local = j % Shape::kUnits;
      const int unit = cta_.rank * Shape::kUnits + local;
      if (unit >= hidden_size) continue;
      const int64_t row = rows_.first + sequence;
      const S* from = cta_.output(turn, sequence, local);
      layer.y[row * cta_.args.y_stride + unit] = from[0];
      if (layer.gates == nullptr) continue;
      S* gates = layer.gates + row * 4 * hidden_size + unit;
      for (int q = 0; q < 4; ++q) gates[q * hidden_size] = from[(q + 1) * Shape::kUnits];
      layer.cell_states[row * hidden_size + unit] = *cta_.output_c(turn, sequence, local);
    }
  }

  const ClusterForwardCta<Shape>& cta_;
  // One CTA, whose turns are steps, reads no table where all steps have the same sequences.
  const bool packed_;
  const int to_next_;            // rows from turn to turn
  GroupRows rows_;               // of the next turn
  char* to_[kRounds];            // in row 0 of the call
  uint32_t row_bytes_[kRounds];  // bytes from row to row
  int from_[kRounds];            // in the buffer of outputs
  int sequence_[kRounds];        // kSequences: nothing to store
};

#endif

}  // namespace cuda
}  // namespace fastlstm

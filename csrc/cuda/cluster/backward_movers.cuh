// The movers of the backward kernel in clusters: warps that load what cells need, kStages steps
// ahead, and store a step's dgates behind it. The computing warps have no scattered accesses to
// wait for.
#pragma once

#include "backward_shape.cuh"

namespace fastlstm {
namespace cuda {

#if FASTLSTM_SM90

// A CTA's place in its cluster, its part of the batch, and the layout of its shared memory.
template <class Shape>
struct ClusterBackwardCta {
  typedef typename Shape::S S;
  static constexpr int kGroups = Shape::kGroups, kStages = Shape::kStages;
  const ClusterBackwardArgs<S>& args;
  const ClusterBackwardDirection<S>& layer;
  unsigned char* shared;
  int rank, first_sequence;
  int length[kGroups];  // steps of a group's longest sequence

  __device__ __forceinline__ int first_unit() const { return rank * Shape::kUnits; }
  __device__ __forceinline__ int time(int g, int s) const {
    return layer.direction == 0 ? length[g] - 1 - s : s;
  }
  __device__ __forceinline__ int time_of_call(int g, int s) const {
    return args.steps.begin + time(g, s);
  }
  // How many steps of a group an exchange follows.
  __device__ __forceinline__ int exchanges(int g) const { return length[g] - !args.hands_on; }
  __device__ __forceinline__ Mbarrier* arrived(int g, int s) const {
    return reinterpret_cast<Mbarrier*>(shared) + 2 * g + (s & 1);
  }
  // Offsets in shared memory.
  __device__ __forceinline__ uint32_t sums_at(int g, int s) const {
    return Shape::kSumsAt + (2 * g + (s & 1)) * Shape::kSumsBytes;
  }
  __device__ __forceinline__ uint32_t dgates_at(int g, int s) const {
    return Shape::kDgatesAt + (2 * g + (s & 1)) * Shape::kDgatesBytes;
  }
  __device__ __forceinline__ unsigned char* stage(int g, int s) const {
    return shared + Shape::kStagesAt + (kStages * g + (s & (kStages - 1))) * Shape::kStageBytes;
  }
};

// A barrier of all warps of a CTA, those that compute and the movers.
template <class Shape>
__device__ __forceinline__ void cta_barrier(const ClusterBackwardCta<Shape>&) {
  named_barrier(1, Shape::kThreads);
}

// The rows of a group in one step after another, from the first on. Where sequences are packed,
// what a step takes from the table was loaded during the step before.
class GroupWalk {
 public:
  template <class Shape>
  __device__ __forceinline__ void begin(const ClusterBackwardCta<Shape>& cta, int g) {
    const StepRows& steps = cta.args.steps;
    const int time = cta.length[g] > 0 ? cta.time(g, 0) : 0;
    const bool down = cta.layer.direction == 0;
    most_ = Shape::kSequences;
    from_ = cta.first_sequence + most_ * g;
    low_ = unsigned(steps.first_row(time));
    high_ = low_ + unsigned(steps.sequences(time));
    packed_ = steps.first != nullptr;
    move_ = (down ? -1 : 1) * (packed_ ? 1 : steps.batch);
    entry_ = steps.begin + time + !down;
    prefetch(steps);
  }
  __device__ __forceinline__ unsigned first() const { return low_ + unsigned(from_); }
  __device__ __forceinline__ int count() const {
    const int left = int(high_ - low_) - from_;
    return left < 0 ? 0 : left < most_ ? left : most_;
  }
  __device__ __forceinline__ void advance(const StepRows& steps) {
    if (packed_) {
      if (move_ < 0)
        high_ = low_, low_ = next_;
      else
        low_ = high_, high_ = next_;
      prefetch(steps);
    } else {
      low_ += unsigned(move_), high_ += unsigned(move_);
    }
  }

 private:
  // The row at which the step after the next begins, or where steps go up, ends. Beyond the steps
  // of this launch nothing is needed.
  __device__ __forceinline__ void prefetch(const StepRows& steps) {
    if (!packed_) return;
    const int entry = entry_ + move_;
    if (entry >= steps.begin && entry <= steps.begin + steps.count) entry_ = entry;
    next_ = unsigned(steps.first[entry_]);
  }

  int from_, most_;      // first sequence; sequences of a group
  int move_, entry_;     // entries, or rows, from step to step; entry of next_
  unsigned low_, high_;  // the first row of the step, and the row that follows its last
  unsigned next_ = 0;    // packed: the row that takes the place of one of them
  bool packed_;
};

// A mover thread copies the same pieces of 16 bytes in every step, neighbouring threads
// neighbouring pieces. All of their addresses but the step's first row are computed once. kBulk:
// rows of H elements are aligned to 16 bytes; otherwise they are copied element by element.
template <class Shape, bool kBulk>
class GradientMover {
  typedef typename Shape::S S;
  static constexpr int kGroups = Shape::kGroups, kStages = Shape::kStages;
  static constexpr int kUnits = Shape::kUnits, kElementBytes = int(sizeof(S));

  __device__ __forceinline__ static int thread() { return int(threadIdx.x) - 32 * Shape::kWarps; }
  // A thread's piece of an array whose rows have kRowBytes in this CTA, from thread kFirst on. All
  // movers together copy kRows rows at once; those beyond copy nothing.
  template <int kRowBytes, int kFirst>
  struct Piece {
    static constexpr int kPieces = kRowBytes / 16, kMost = kBackwardMovers / kPieces;
    static constexpr int kRows = kMost < 8 ? kMost : kMost / 8 * 8;
    __device__ __forceinline__ static int number() {
      return (thread() + kBackwardMovers - kFirst) % kBackwardMovers;
    }
    __device__ __forceinline__ static int row() { return number() / kPieces; }
    __device__ __forceinline__ static int byte() { return number() % kPieces * 16; }
  };
  static constexpr int kStoredBytes = kUnits * kElementBytes, kStateBytes = 4 * kUnits;
  static constexpr int kHalf = kBackwardMovers / 2, kChunks = kUnits / Shape::kChunk;
  static constexpr int kGateRows = 4 * 8;  // of a step: (gate, sequence)
  typedef Piece<kStoredBytes, 0> Gates;
  typedef Piece<kStateBytes, 0> States;       // c, and gradients of c
  typedef Piece<kStoredBytes, kHalf> Output;  // gradients of the output, by other warps
  typedef Piece<kStateBytes, kHalf> Upper;    // ... as floats, from the layer above
  typedef Piece<kStoredBytes, kBackwardMovers - 8 * kChunks> Dgates;  // by the last warps
  static_assert(Gates::kRows % 8 == 0 && Gates::kRows <= kGateRows, "a mover has one row's gates");
  static_assert(kChunks == Dgates::kPieces && 8 * kChunks <= kBackwardMovers, "dgates");

 public:
  __device__ __forceinline__ explicit GradientMover(const ClusterBackwardCta<Shape>& cta)
      : cta_(cta) {
    const ClusterBackwardDirection<S>& layer = cta.layer;
    const int units = cta.args.units, first = cta.first_unit();
    auto inside = [&](int byte, int bytes) { return first + byte / bytes < units; };
    auto at = [&](const void* array, int unit, int bytes, int byte) {
      return array ? static_cast<const unsigned char*>(array) + int64_t(unit) * bytes + byte
                   : nullptr;
    };
    gates_row_ =
        inside(Gates::byte(), kElementBytes) && Gates::row() < Gates::kRows ? Gates::row() % 8 : 8;
    gates_ = at(layer.gates, Gates::row() / 8 * units + first, kElementBytes, Gates::byte());
    gates_place_ = opaque(Gates::row() * Shape::kGateStride + Gates::byte());

    states_row_ = inside(States::byte(), 4) && States::row() < States::kRows ? States::row() : 8;
    states_ = at(layer.cell_states, first, 4, States::byte());
    grad_states_ = at(layer.grad_cell_states, first, 4, States::byte());
    states_place_ = opaque(States::row() * Shape::kStateStride + States::byte());

    upper_ = layer.upper_input != nullptr;
    const unsigned stride = unsigned(cta.args.output_stride);
    if (upper_) {
      above_row_ = inside(Upper::byte(), 4) && Upper::row() < Upper::kRows ? Upper::row() : 8;
      above_ = at(layer.upper_input, first, 4, Upper::byte());
      above_stride_ = 4 * stride;
      above_place_ = opaque(Upper::row() * Shape::kStateStride + Upper::byte());
    } else {
      above_row_ = layer.grad_output && inside(Output::byte(), kElementBytes) ? Output::row() : 8;
      above_ = at(layer.grad_output, first, kElementBytes, Output::byte());
      above_stride_ = kElementBytes * stride;
      above_place_ = opaque(Output::row() * Shape::kStateStride + Output::byte());
    }

    const int chunk = Dgates::number() % kChunks * Shape::kChunk;
    dgates_row_ = first + chunk < units ? Dgates::row() : 8;
    dgates_ = layer.dgates + first + chunk;
    dgates_place_ = opaque(Shape::kStoredAt + Shape::operand_at(chunk, Dgates::row() % 8));
  }

  // load() and store() are called for steps 0, 1, 2, ... Each load() closes one group of copies.
  __device__ __forceinline__ void load(int g, int s, GroupWalk& walk) const {
    if (s < cta_.length[g]) {
      if constexpr (kBulk)
        load_pieces(cta_.stage(g, s), walk.first(), walk.count());
      else
        load_elements(cta_.stage(g, s), walk.first(), walk.count());
      walk.advance(cta_.args.steps);
    }
    commit_async();
  }
  __device__ __forceinline__ void store(int g, int s, GroupWalk& walk) const {
    const unsigned char* const from = cta_.shared + cta_.dgates_at(g, s);
    if constexpr (!kBulk) {
      store_elements(from + Shape::kStoredAt, walk.first(), walk.count());
    } else if (dgates_row_ < walk.count()) {
      uint4 gates[4];
      Shape::load_chunk(from + dgates_place_, gates);
      S* const to =
          dgates_ + uint64_t(walk.first() + dgates_row_) * unsigned(cta_.args.dgates_stride);
#pragma unroll
      for (int q = 0; q < 4; ++q)
        *reinterpret_cast<uint4*>(to + q * int64_t(cta_.args.units)) = gates[q];
    }
    walk.advance(cta_.args.steps);
  }

 private:
  __device__ __forceinline__ void load_pieces(unsigned char* stage, unsigned first,
                                              int count) const {
    const unsigned units = unsigned(cta_.args.units);
    if (gates_row_ < count) {
      const unsigned char* const from =
          gates_ + uint64_t(first + gates_row_) * (4 * units * kElementBytes);
#pragma unroll
      for (int r = 0; r < kGateRows; r += Gates::kRows)
        copy_async(stage + gates_place_ + r * Shape::kGateStride,
                   from + r / 8 * units * kElementBytes, 16);
    }
#pragma unroll
    for (int r = 0; r < 8; r += States::kRows) {
      if (states_row_ + r >= count) continue;
      unsigned char* const to = stage + states_place_ + r * Shape::kStateStride;
      const uint64_t offset = uint64_t(first + states_row_ + r) * (4 * units);
      copy_async(to + Shape::kStatesAt, states_ + offset, 16);
      if (grad_states_) copy_async(to + Shape::kGradStatesAt, grad_states_ + offset, 16);
    }
#pragma unroll
    for (int r = 0; r < 8; r += Upper::kRows)
      if (above_row_ + r < count && (r == 0 || upper_))
        copy_async(stage + above_place_ + Shape::kGradOutputAt + r * Shape::kStateStride,
                   above_ + uint64_t(first + above_row_ + r) * above_stride_, 16);
  }

  __device__ __forceinline__ void load_elements(unsigned char* to, unsigned first,
                                                int count) const {
    const ClusterBackwardDirection<S>& layer = cta_.layer;
    const int64_t units = cta_.args.units, stride = cta_.args.output_stride;
#pragma unroll 2
    for (int j = thread(); j < count * kUnits; j += kBackwardMovers) {
      const int sequence = j / kUnits, local = j % kUnits, unit = cta_.first_unit() + local;
      if (unit >= units) continue;
      const int64_t row = int64_t(first) + sequence;
#pragma unroll
      for (int q = 0; q < 4; ++q)
        reinterpret_cast<S*>(to + (q * 8 + sequence) * Shape::kGateStride)[local] =
            layer.gates[(row * 4 + q) * units + unit];
      unsigned char* const state = to + sequence * Shape::kStateStride;
      float* const at = reinterpret_cast<float*>(state) + local;
      at[Shape::kStatesAt / 4] = layer.cell_states[row * units + unit];
      if (layer.grad_output)
        reinterpret_cast<S*>(state + Shape::kGradOutputAt)[local] =
            layer.grad_output[row * stride + unit];
      if (layer.upper_input) at[Shape::kGradOutputAt / 4] = layer.upper_input[row * stride + unit];
      if (layer.grad_cell_states)
        at[Shape::kGradStatesAt / 4] = layer.grad_cell_states[row * units + unit];
    }
  }
  __device__ __forceinline__ void store_elements(const unsigned char* from, unsigned first,
                                                 int count) const {
    const int units = cta_.args.units;
#pragma unroll 2
    for (int j = thread(); j < count * kUnits; j += kBackwardMovers) {
      const int sequence = j / kUnits, local = j % kUnits, unit = cta_.first_unit() + local;
      if (unit >= units) continue;
      S* const to =
          cta_.layer.dgates + (int64_t(first) + sequence) * cta_.args.dgates_stride + unit;
      const unsigned char* const at = from + Shape::operand_at(local, sequence);
#pragma unroll
      for (int q = 0; q < 4; ++q)
        to[q * units] = *reinterpret_cast<const S*>(at + q * Shape::kOperandGate);
    }
  }

  const ClusterBackwardCta<Shape>& cta_;
  // A thread's pieces in row 0, or null; their sequence, or 8 where there is none; and where in a
  // stage, and in the dgates, they belong.
  const unsigned char *gates_, *states_, *grad_states_, *above_;
  S* dgates_;
  int gates_row_, states_row_, above_row_, dgates_row_;
  uint32_t gates_place_, states_place_, above_place_, dgates_place_;
  unsigned above_stride_;
  bool upper_;  // whether the gradients from above are floats
};

template <class Shape, bool kBulk>
__device__ __forceinline__ void move_steps(const ClusterBackwardCta<Shape>& cta) {
  constexpr int kGroups = Shape::kGroups, kStages = Shape::kStages;
  // The next cells read the stages of two steps of their group. So many groups of copies have been
  // closed after the later of the two, so all but the last kLater must have arrived.
  constexpr int kLater = (kStages - 2) * kGroups - 1;
  const GradientMover<Shape, kBulk> mover(cta);
  GroupWalk loaded[kGroups], stored[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    loaded[g].begin(cta, g);
    stored[g] = loaded[g];
  }
  for (int s = 0; s < kStages; ++s)
#pragma unroll
    for (int g = 0; g < kGroups; ++g) mover.load(g, s, loaded[g]);
  wait_async<kLater>();
  cta_barrier(cta);
  for (int s = 0; s < cta.length[0]; ++s)
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (s < cta.length[g]) {
        wait_async<kLater>();
        cta_barrier(cta);
        mover.store(g, s, stored[g]);
      }
      mover.load(g, s + kStages, loaded[g]);
    }
}

template <class Shape>
__device__ __forceinline__ void move_gradients(const ClusterBackwardCta<Shape>& cta) {
  cta.args.bulk ? move_steps<Shape, true>(cta) : move_steps<Shape, false>(cta);
}

#endif  // FASTLSTM_SM90

}  // namespace cuda
}  // namespace fastlstm

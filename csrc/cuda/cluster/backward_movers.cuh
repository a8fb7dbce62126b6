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
  __device__ __forceinline__ unsigned char* sums(int g, int s) const {
    return shared + Shape::kSumsAt + (2 * g + (s & 1)) * Shape::kSumsBytes;
  }
  __device__ __forceinline__ unsigned char* dgates(int g, int s) const {
    return shared + Shape::kDgatesAt + (2 * g + (s & 1)) * Shape::kDgatesBytes;
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

// A mover thread copies the same pieces of 16 bytes in every step, neighbouring threads
// neighbouring pieces. All of their addresses but the step's first row are computed once.
template <class Shape>
class GradientMover {
  typedef typename Shape::S S;
  static constexpr int kGroups = Shape::kGroups, kStages = Shape::kStages;
  static constexpr int kElementBytes = int(sizeof(S)), kUnits = Shape::kUnits;

  // A thread's piece and row, for elements of kBytes. All movers together copy kRows rows at once;
  // those beyond copy nothing.
  template <int kBytes>
  struct Piece {
    static constexpr int kPieces = kUnits * kBytes / 16, kMost = kBackwardMovers / kPieces;
    static constexpr int kRows = kMost < 8 ? kMost : kMost / 8 * 8;
    __device__ __forceinline__ static int row() { return thread() / kPieces; }
    __device__ __forceinline__ static int unit() { return thread() % kPieces * (16 / kBytes); }
  };
  typedef Piece<kElementBytes> Stored;     // of elements of the storage type: gates, grad_output
  typedef Piece<4> State;                  // of floats: c and the other gradients
  static constexpr int kGateRows = 4 * 8;  // of a step: (gate, sequence)
  static_assert(Stored::kRows % 8 == 0 && Stored::kRows <= kGateRows,
                "a mover has one row's gates");

 public:
  __device__ __forceinline__ explicit GradientMover(const ClusterBackwardCta<Shape>& cta)
      : cta_(cta) {
    const ClusterBackwardDirection<S>& layer = cta.layer;
    const int units = cta.args.units, stored = cta.first_unit() + Stored::unit();
    const int state = cta.first_unit() + State::unit(), gate = Stored::row() / 8;
    stored_inside_ = stored < units && Stored::row() < Stored::kRows;
    state_inside_ = state < units && State::row() < State::kRows;
    gates_ = layer.gates + gate * units + stored;
    dgates_ = layer.dgates + gate * units + stored;
    cell_states_ = layer.cell_states + state;
    grad_output_ = layer.grad_output ? layer.grad_output + stored : nullptr;
    upper_input_ = layer.upper_input ? layer.upper_input + state : nullptr;
    grad_cell_states_ = layer.grad_cell_states ? layer.grad_cell_states + state : nullptr;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) to_load_[g] = rows(g, 0), to_store_[g] = rows(g, 0);
  }

  // load() and store() are called for steps 0, 1, 2, ... Each load() closes one group of copies.
  __device__ __forceinline__ void load(int g, int s) {
    if (s < cta_.length[g]) {
      const GroupRows step = to_load_[g];
      to_load_[g] = rows(g, s + 1);
      unsigned char* const to = cta_.stage(g, s);
      if (cta_.args.bulk)
        load_pieces(to, step);
      else
        load_elements(to, step);
    }
    commit_async();
  }
  __device__ __forceinline__ void store(int g, int s) {
    const GroupRows step = to_store_[g];
    to_store_[g] = rows(g, s + 1);
    const unsigned char* const from = cta_.dgates(g, s) + Shape::kStoredAt;
    if (!cta_.args.bulk) return store_elements(from, step);
    const int row = Stored::row() % 8;
    if (row >= step.count || !stored_inside_) return;
    const unsigned char* const piece =
        from + Shape::operand_at(Stored::unit(), row) + Stored::row() / 8 * Shape::kOperandGate;
    S* const to =
        dgates_ + uint64_t(unsigned(step.first) + row) * unsigned(cta_.args.dgates_stride);
#pragma unroll
    for (int r = 0; r < kGateRows; r += Stored::kRows)
      *reinterpret_cast<uint4*>(to + r / 8 * cta_.args.units) =
          Shape::stored_piece(piece + r / 8 * Shape::kOperandGate);
  }

 private:
  __device__ __forceinline__ static int thread() { return int(threadIdx.x) - 32 * Shape::kWarps; }
  __device__ __forceinline__ GroupRows rows(int g, int s) const {
    if (s >= cta_.length[g]) return {0, 0};
    return cta_.args.steps.group(cta_.time(g, s), cta_.first_sequence + 8 * g, 8);
  }

  __device__ __forceinline__ void load_pieces(unsigned char* to, const GroupRows& step) const {
    const unsigned units = unsigned(cta_.args.units), first = unsigned(step.first);
    const unsigned output_stride = unsigned(cta_.args.output_stride);
    const int row = Stored::row() % 8;
    if (stored_inside_ && row < step.count) {
      const S* const from = gates_ + uint64_t(first + row) * (4 * units);
#pragma unroll
      for (int r = 0; r < kGateRows; r += Stored::kRows)
        copy_async(to + (r + Stored::row()) * Shape::kGateStride + Stored::unit() * kElementBytes,
                   from + r / 8 * units, 16);
      if (grad_output_ && Stored::row() < 8)
        copy_async(
            to + Shape::kGradOutputAt + row * Shape::kStateStride + Stored::unit() * kElementBytes,
            grad_output_ + uint64_t(first + row) * output_stride, 16);
    }
    if (!state_inside_) return;
#pragma unroll
    for (int r = 0; r < 8; r += State::kRows) {
      const int row = r + State::row();
      if (row >= step.count) continue;
      unsigned char* const at = to + row * Shape::kStateStride + State::unit() * 4;
      const uint64_t source = first + row;
      copy_async(at + Shape::kStatesAt, cell_states_ + source * units, 16);
      if (upper_input_)
        copy_async(at + Shape::kGradOutputAt, upper_input_ + source * output_stride, 16);
      if (grad_cell_states_)
        copy_async(at + Shape::kGradStatesAt, grad_cell_states_ + source * units, 16);
    }
  }

  // Element by element, where rows of H elements are not aligned to 16 bytes.
  __device__ __forceinline__ void load_elements(unsigned char* to, const GroupRows& step) const {
    const ClusterBackwardDirection<S>& layer = cta_.layer;
    const int64_t units = cta_.args.units, stride = cta_.args.output_stride;
#pragma unroll 2
    for (int j = thread(); j < step.count * kUnits; j += kBackwardMovers) {
      const int sequence = j / kUnits, local = j % kUnits, unit = cta_.first_unit() + local;
      if (unit >= units) continue;
      const int64_t row = step.first + sequence;
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
  __device__ __forceinline__ void store_elements(const unsigned char* from,
                                                 const GroupRows& step) const {
    const int units = cta_.args.units;
#pragma unroll 2
    for (int j = thread(); j < step.count * kUnits; j += kBackwardMovers) {
      const int sequence = j / kUnits, local = j % kUnits, unit = cta_.first_unit() + local;
      if (unit >= units) continue;
      S* const to = cta_.layer.dgates + (step.first + sequence) * cta_.args.dgates_stride + unit;
      const unsigned char* const at = from + Shape::operand_at(local, sequence);
#pragma unroll
      for (int q = 0; q < 4; ++q)
        to[q * units] = *reinterpret_cast<const S*>(at + q * Shape::kOperandGate);
    }
  }

  const ClusterBackwardCta<Shape>& cta_;
  bool stored_inside_, state_inside_;  // whether this thread has pieces, with units below H
  // Its pieces in row 0, or null.
  const S *gates_, *grad_output_;
  const float *cell_states_, *upper_input_, *grad_cell_states_;
  S* dgates_;
  GroupRows to_load_[kGroups], to_store_[kGroups];  // of the next step, looked up one step ahead
};

template <class Shape>
__device__ __forceinline__ void move_gradients(const ClusterBackwardCta<Shape>& cta) {
  constexpr int kGroups = Shape::kGroups, kStages = Shape::kStages;
  // The next cells read the stages of two steps of their group. So many groups of copies have been
  // closed after the later of the two, so all but the last kLater must have arrived.
  constexpr int kLater = (kStages - 2) * kGroups - 1;
  GradientMover<Shape> mover(cta);
  for (int s = 0; s < kStages; ++s)
#pragma unroll
    for (int g = 0; g < kGroups; ++g) mover.load(g, s);
  wait_async<kLater>();
  cta_barrier(cta);
  for (int s = 0; s < cta.length[0]; ++s)
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (s < cta.length[g]) {
        wait_async<kLater>();
        cta_barrier(cta);
        mover.store(g, s);
      }
      mover.load(g, s + kStages);
    }
}

#endif  // FASTLSTM_SM90

}  // namespace cuda
}  // namespace fastlstm

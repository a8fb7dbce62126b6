// The moving warps of the backward kernel in clusters: they load what its cells need, kStages steps
// ahead, and store a step's dgates behind it, so that nothing scattered stands in the way of the
// warps that compute.
#pragma once

#include "backward_shape.cuh"

namespace fastlstm {
namespace cuda {

#if FASTLSTM_SM90

// What a CTA of a cluster knows of itself.
template <class Shape>
struct BackwardCta {
  typedef typename Shape::S S;
  static constexpr int kGroups = Shape::kGroups, kStages = Shape::kStages;
  const ClusterGradientArgs<S>& args;
  const ClusterGradient<S>& cell;
  unsigned char* shared;
  int rank, first_sequence;
  int length[kGroups];  // steps of a group's longest sequence

  __device__ __forceinline__ int own() const { return rank * Shape::kUnits; }
  __device__ __forceinline__ int time(int g, int s) const {
    return cell.direction == 0 ? length[g] - 1 - s : s;
  }
  __device__ __forceinline__ Mbarrier* arrived(int g, int s) const {
    return reinterpret_cast<Mbarrier*>(shared) + 2 * g + (s & 1);
  }
  __device__ __forceinline__ unsigned char* sums(int g, int s) const {
    return shared + Shape::kSumsAt + (2 * g + (s & 1)) * Shape::kSums;
  }
  __device__ __forceinline__ unsigned char* dgates(int g, int s) const {
    return shared + Shape::kDgatesAt + (2 * g + (s & 1)) * Shape::kDgates;
  }
  __device__ __forceinline__ unsigned char* stage(int g, int s) const {
    return shared + Shape::kStagesAt + (kStages * g + (s & (kStages - 1))) * Shape::kStage;
  }
};

// All warps of a CTA.
template <class Shape>
__device__ __forceinline__ void meet(const BackwardCta<Shape>&) {
  named_barrier(1, kBackwardThreads);
}

// A mover has the same pieces of 16 bytes in every step, neighbouring movers neighbouring pieces:
// where they are is worked out once, up to the step's first row.
template <class Shape>
class GradientMover {
  typedef typename Shape::S S;
  static constexpr int kGroups = Shape::kGroups, kStages = Shape::kStages;
  static constexpr int kSize = int(sizeof(S)), kUnits = Shape::kUnits;

  // Which piece of which row, where elements have kBytes: movers take kRows rows at once.
  template <int kBytes>
  struct Piece {
    static constexpr int kPieces = kUnits * kBytes / 16, kRows = kBackwardMovers / kPieces;
    __device__ __forceinline__ static int row() { return thread() / kPieces; }
    __device__ __forceinline__ static int unit() { return thread() % kPieces * (16 / kBytes); }
  };
  typedef Piece<kSize> Own;
  typedef Piece<4> State;
  static constexpr int kGateRows = 4 * 8;  // of a step: (gate, sequence)
  static_assert(Own::kRows % 8 == 0 && Own::kRows <= kGateRows, "a mover has one row's gates");

 public:
  __device__ __forceinline__ explicit GradientMover(const BackwardCta<Shape>& cta) : cta_(cta) {
    const ClusterGradient<S>& cell = cta.cell;
    const int units = cta.args.units, own = cta.own() + Own::unit();
    const int state = cta.own() + State::unit(), gate = Own::row() / 8;
    own_inside_ = own < units;
    state_inside_ = state < units;
    gates_ = cell.gates + gate * units + own;
    dgates_ = cell.dgates + gate * units + own;
    cells_ = cell.cells + state;
    grad_output_ = cell.grad_output ? cell.grad_output + own : nullptr;
    upper_input_ = cell.upper_input ? cell.upper_input + state : nullptr;
    grad_cells_ = cell.grad_cells ? cell.grad_cells + state : nullptr;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) to_load_[g] = rows(g, 0), to_store_[g] = rows(g, 0);
  }

  // Both for steps in turn, from 0 on. Every call of load closes a group of copies.
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
    const int row = Own::row() % 8;
    if (row >= step.count || !own_inside_) return;
    const unsigned char* const piece =
        from + Own::unit() / Shape::kChunk * Shape::kChunkPitch + row * 64 + Own::row() / 8 * 16;
    S* const to = dgates_ + uint64_t(unsigned(step.first) + row) * unsigned(cta_.args.dgates_wide);
#pragma unroll
    for (int r = 0; r < kGateRows; r += Own::kRows)
      *reinterpret_cast<uint4*>(to + r / 8 * cta_.args.units) =
          *reinterpret_cast<const uint4*>(piece + r / 8 * 16);
  }

 private:
  __device__ __forceinline__ static int thread() { return int(threadIdx.x) - 32 * kBackwardWarps; }
  __device__ __forceinline__ GroupRows rows(int g, int s) const {
    if (s >= cta_.length[g]) return {0, 0};
    return group_rows(cta_.args.map, cta_.time(g, s), cta_.first_sequence + 8 * g, 8);
  }

  __device__ __forceinline__ void load_pieces(unsigned char* to, const GroupRows& step) const {
    const unsigned units = unsigned(cta_.args.units), first = unsigned(step.first);
    const unsigned output_wide = unsigned(cta_.args.output_wide);
    const int row = Own::row() % 8;
    if (own_inside_ && row < step.count) {
      const S* const from = gates_ + uint64_t(first + row) * (4 * units);
#pragma unroll
      for (int r = 0; r < kGateRows; r += Own::kRows)
        copy_async(to + (r + Own::row()) * Shape::kGateRow + Own::unit() * kSize,
                   from + r / 8 * units, 16);
      if (grad_output_ && Own::row() < 8)
        copy_async(to + Shape::kAboveAt + row * Shape::kStateRow + Own::unit() * kSize,
                   grad_output_ + uint64_t(first + row) * output_wide, 16);
    }
    if (!state_inside_) return;
#pragma unroll
    for (int r = 0; r < 8; r += State::kRows) {
      const int row = r + State::row();
      if (row >= step.count) continue;
      unsigned char* const at = to + row * Shape::kStateRow + State::unit() * 4;
      const uint64_t source = first + row;
      copy_async(at + Shape::kCellsAt, cells_ + source * units, 16);
      if (upper_input_) copy_async(at + Shape::kAboveAt, upper_input_ + source * output_wide, 16);
      if (grad_cells_) copy_async(at + Shape::kGradCellsAt, grad_cells_ + source * units, 16);
    }
  }

  // Where rows leave the pieces unaligned.
  __device__ __forceinline__ void load_elements(unsigned char* to, const GroupRows& step) const {
    const ClusterGradient<S>& cell = cta_.cell;
    const int64_t units = cta_.args.units, wide = cta_.args.output_wide;
#pragma unroll 2
    for (int j = thread(); j < step.count * kUnits; j += kBackwardMovers) {
      const int sequence = j / kUnits, local = j % kUnits, unit = cta_.own() + local;
      if (unit >= units) continue;
      const int64_t row = step.first + sequence;
#pragma unroll
      for (int q = 0; q < 4; ++q)
        reinterpret_cast<S*>(to + (q * 8 + sequence) * Shape::kGateRow)[local] =
            cell.gates[(row * 4 + q) * units + unit];
      unsigned char* const state = to + sequence * Shape::kStateRow;
      float* const at = reinterpret_cast<float*>(state) + local;
      at[Shape::kCellsAt / 4] = cell.cells[row * units + unit];
      if (cell.grad_output)
        reinterpret_cast<S*>(state + Shape::kAboveAt)[local] = cell.grad_output[row * wide + unit];
      if (cell.upper_input) at[Shape::kAboveAt / 4] = cell.upper_input[row * wide + unit];
      if (cell.grad_cells) at[Shape::kGradCellsAt / 4] = cell.grad_cells[row * units + unit];
    }
  }
  __device__ __forceinline__ void store_elements(const unsigned char* from,
                                                 const GroupRows& step) const {
    const int units = cta_.args.units;
#pragma unroll 2
    for (int j = thread(); j < step.count * kUnits; j += kBackwardMovers) {
      const int sequence = j / kUnits, local = j % kUnits, unit = cta_.own() + local;
      if (unit >= units) continue;
      S* const to = cta_.cell.dgates + (step.first + sequence) * cta_.args.dgates_wide + unit;
      const unsigned char* const at = from + local / Shape::kChunk * Shape::kChunkPitch +
                                      sequence * 64 + local % Shape::kChunk * kSize;
#pragma unroll
      for (int q = 0; q < 4; ++q) to[q * units] = *reinterpret_cast<const S*>(at + q * 16);
    }
  }

  const BackwardCta<Shape>& cta_;
  bool own_inside_, state_inside_;  // whether this mover's pieces are no padding
  // Its pieces in row 0; null where there is nothing.
  const S *gates_, *grad_output_;
  const float *cells_, *upper_input_, *grad_cells_;
  S* dgates_;
  GroupRows to_load_[kGroups], to_store_[kGroups];  // of the next step, looked up one ahead
};

template <class Shape>
__device__ __forceinline__ void move_gradients(const BackwardCta<Shape>& cta) {
  constexpr int kGroups = Shape::kGroups, kStages = Shape::kStages;
  // The cells that come next need two steps of their group, of which the later was loaded so many
  // calls before the latest; a group that has ended leaves its calls out of the order.
  constexpr int kLater = (kStages - 2) * kGroups - 1;
  GradientMover<Shape> mover(cta);
  for (int s = 0; s < kStages; ++s)
#pragma unroll
    for (int g = 0; g < kGroups; ++g) mover.load(g, s);
  wait_async<kLater>();
  meet(cta);
  for (int s = 0; s < cta.length[0]; ++s)
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (s < cta.length[g]) {
        wait_async<kLater>();
        meet(cta);
        mover.store(g, s);
      }
      mover.load(g, s + kStages);
    }
}

#endif  // FASTLSTM_SM90

}  // namespace cuda
}  // namespace fastlstm

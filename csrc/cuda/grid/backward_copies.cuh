// What the cells of a backward CTA read from global memory, copied to shared memory some steps
// ahead. A thread copies the same pieces of 16 bytes in every step, all of one sequence, whose
// cells are its own warp's. Of their addresses only the step's row is not computed beforehand. They
// wait in shared memory: registers are full of weights, and nothing waits for these copies.
#pragma once

#include "../shared/numeric.cuh"
#include "rules.h"
#include "threads.cuh"
#include "walk.cuh"

namespace fastlstm {
namespace cuda {

template <class S>
struct GridBackwardDirection {  // one direction of a layer
  typedef Acc<S> T;
  const uint4* fragments;             // of all CTAs (GridTransposeArgs)
  const S* grad_output;               // gradient of the output, this direction's columns; or null
  const T* upper_input;               // gradient of the upper layer's input, likewise
  const S *grad_h_n, *grad_c_n, *c0;  // (B, H) or null
  const S* gates;                     // (rows, 4H)
  const T *cell_states, *grad_cell_states;  // (rows, H); the gradients of all cells may be null
  S *dgates, *grad_c0;
  T* dh_zoneout;  // (B, H), the share of dh that zoneout passes to h0; or null
  DrawnRules<T> rules;
};

template <class S>
struct GridBackwardArgs {
  GridBackwardDirection<S> direction[2];
  unsigned char* exchange;  // (teams of the launch, CTAs, 2, received_bytes), zeroed
  int groups, first_team;   // as GridForwardArgs
  GridBackwardTeam team;
  StepRows steps;
  int units;  // H
  int64_t output_stride, dgates_stride;
  bool aligned;  // rows of H elements, to 16 bytes
  uint64_t limit;
};

template <class Product>
class GridBackwardCopies {
  typedef typename Product::Storage S;
  static constexpr GridBackwardShape kGrid = Product::kGrid;
  static constexpr BackwardLayout kLayout = Product::kLayout;
  static constexpr int kUnits = kGrid.units, kBytes = int(sizeof(S));
  static constexpr int kLanes = 32 / kGrid.tiles, kPieces = kLayout.pieces;
  struct alignas(16) Piece {
    const unsigned char* from;  // in row 0; null where there is nothing to read
    uint32_t stride;            // from row to row, in bytes
    uint32_t previous;          // whether it is c of the step before in time
  };
  static constexpr int kGatePieces = kUnits * kBytes / 16, kStatePieces = kUnits / 4;

 public:
  __device__ __forceinline__ GridBackwardCopies(const GridBackwardArgs<S>& args, int direction,
                                                int slot, unsigned char* stages,
                                                unsigned char* pieces)
      : args_(args),
        direction_(direction),
        first_unit_(slot * kUnits),
        stages_(stages),
        pieces_(reinterpret_cast<Piece*>(pieces)) {
    const GridBackwardDirection<S>& layer = args.direction[direction];
    const int thread = threadIdx.x, lane = thread % kLanes, sequence = sequence_of(thread);
    const int units = args.units;
#pragma unroll
    for (int r = 0; r < kPieces; ++r) {
      const int piece = r * kLanes + lane, state = piece - 4 * kGatePieces;
      Piece p{};
      auto reads = [&](const auto* from, int unit, int64_t stride, int bytes) {
        if (from == nullptr || first_unit_ + unit >= units) return;
        p.from =
            reinterpret_cast<const unsigned char*>(from + first_unit_ + unit + sequence * stride);
        p.stride = uint32_t(stride * bytes);
      };
      if (state < 0) {
        reads(layer.gates + piece / kGatePieces * units, piece % kGatePieces * (16 / kBytes),
              4 * int64_t(units), kBytes);
      } else if (state < kStatePieces) {
        reads(layer.cell_states, state * 4, units, 4);
        p.previous = 1;
      } else if (state < 2 * kStatePieces) {
        const int at = state - kStatePieces;
        if (layer.upper_input)
          reads(layer.upper_input, at * 4, args.output_stride, 4);
        else if (at < kGatePieces)
          reads(layer.grad_output, at * (16 / kBytes), args.output_stride, kBytes);
      } else if (state < 3 * kStatePieces) {
        reads(layer.grad_cell_states, (state - 2 * kStatePieces) * 4, units, 4);
      }
      pieces_[r * kGridThreads + thread] = p;
    }
  }

  // Copies what step s needs into its stage. now: its rows, next: those of the step after it, whose
  // cells began from the states that c_prev is.
  __device__ __forceinline__ void load(unsigned stage, const GroupRows& now,
                                       const GroupRows& next) const {
    if (args_.aligned)
      load_pieces(stage, now, next);
    else
      load_elements(stage, now, next);
    commit_async();
  }

 private:
  __device__ __forceinline__ void load_pieces(unsigned stage, const GroupRows& now,
                                              const GroupRows& next) const {
    const int thread = recomputed_thread(), sequence = sequence_of(thread);
    unsigned char* const to = row_of(thread, stage) + thread % kLanes * 16;
#pragma unroll
    for (int r = 0; r < kPieces; ++r) {
      const Piece p = pieces_[r * kGridThreads + thread];
      const uint32_t row = uint32_t(p.previous ? next.first : now.first);
      const bool exists = sequence < (p.previous ? next.count : now.count);
      if (p.from)
        copy_async(to + r * kLanes * 16, p.from + uint64_t(row) * p.stride, exists ? 16 : 0);
    }
  }

  // Element by element, where rows of H elements are not aligned to 16 bytes.
  __device__ __forceinline__ void load_elements(unsigned stage, const GroupRows& now,
                                                const GroupRows& next) const {
    uint32_t direction = direction_;
    pin(direction);
    const GridBackwardDirection<S>& layer = args_.direction[direction];
    const int64_t units = args_.units, stride = args_.output_stride;
    const int thread = recomputed_thread(), sequence = sequence_of(thread);
    const bool exists = sequence < now.count, continues = sequence < next.count;
    const int64_t row = now.first + sequence;
    unsigned char* const to = row_of(thread, stage);
#pragma unroll 1
    for (int local = thread % kLanes; local < kUnits; local += kLanes) {
      const int unit = first_unit_ + local;
      if (unit >= units) break;
      S gates[4] = {}, above = {};
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        if (exists) gates[q] = layer.gates[(row * 4 + q) * units + unit];
        reinterpret_cast<S*>(to)[q * kUnits + local] = gates[q];
      }
      float* const floats = reinterpret_cast<float*>(to + kLayout.gate_bytes) + local;
      floats[0] = continues ? layer.cell_states[(next.first + sequence) * units + unit] : 0.0f;
      if (layer.upper_input) {
        floats[kUnits] = exists ? layer.upper_input[row * stride + unit] : 0.0f;
      } else {
        if (exists && layer.grad_output) above = layer.grad_output[row * stride + unit];
        reinterpret_cast<S*>(floats + kUnits - local)[local] = above;
      }
      floats[2 * kUnits] =
          exists ? value_or_zero(layer.grad_cell_states, row * units + unit) : 0.0f;
    }
  }

  const GridBackwardArgs<S>& args_;
  // The sequence of the group whose pieces a thread copies, and where its row begins in a stage.
  __device__ __forceinline__ static int sequence_of(int thread) {
    return thread / 32 + thread % 32 / kLanes * kGridWarps;
  }
  __device__ __forceinline__ unsigned char* row_of(int thread, unsigned stage) const {
    return stages_ + stage + sequence_of(thread) * kLayout.row_bytes;
  }

  const int direction_, first_unit_;
  unsigned char* const stages_;
  Piece* const pieces_;
};

}  // namespace cuda
}  // namespace fastlstm

// fp32 in the forward cluster kernel: its sizes, its shared memory, and the product by
// multiply-adds (fma_tile.cuh).
//
// A thread multiplies the rows of two units, all four gates, by h. The lanes that share these rows
// end up with the gates of whole cells: one or two for each thread and eight sequences. Four
// sequences are one plane, half as long; every thread then has one cell of 64 units.
#pragma once

#include "fma_tile.cuh"
#include "forward_shape.cuh"

namespace fastlstm {
namespace cuda {

// The fp32 counterpart of ClusterForwardShape.
template <int kCtas_, int kUnits_, int kSequences_>
struct ClusterForwardFp32 {
  typedef float S;
  typedef float Operand;  // of the product: h as it is
  static constexpr int kCtas = kCtas_, kUnits = kUnits_, kSequences = kSequences_;
  static constexpr int kElementBytes = 4, kPiece = 4;
  static constexpr bool kStreams = false;
  static constexpr int kParts = 1;  // of a buffer of h
  static constexpr int kGroups = 1;
  static constexpr int kWarps = kFmaThreads / 32, kDepth = kCtas * kUnits;
  // A tile: two planes of four sequences or, where a group has no more, one.
  static constexpr int kTilePlanes = kSequences == 4 ? 1 : 2,
                       kTiles = kSequences / (4 * kTilePlanes);
  static constexpr int kTileCells = kUnits * kTilePlanes / 64;  // of a thread
  static constexpr int kCells = kTiles * kTileCells;
  static_assert(kTileCells > 0, "whole cells");

  // K of a thread. Its registers hold the weights of eight columns beside the sums of two planes
  // and all that a step keeps, or twelve where shared memory has no room for more.
  typedef FmaSplit<4 * kUnits, kDepth> Split;
  static constexpr int kLanes = Split::kLanes;
  static constexpr int kRegisterDepth = Split::kThreadDepth > 16  ? 12
                                        : Split::kThreadDepth > 8 ? 8
                                                                  : Split::kThreadDepth;
  static constexpr int kSharedDepth = Split::kThreadDepth - kRegisterDepth;
  // Two planes at once, where some weights are in shared memory, load them once.
  static constexpr int kPlanesAtOnce = kSharedDepth > 0 ? 2 : 1;

  static constexpr bool kFillsRegisters = Split::kThreadDepth > 8;
  static constexpr int kComputeRegisters = kTiles == 1 ? 216 : 200,
                       kMoveRegisters = kTiles == 1 ? 72 : 104;
  static constexpr int kMovers = 4, kThreads = 32 * (kWarps + kMovers);
  static_assert(32 * (kWarps * kComputeRegisters + kMovers * kMoveRegisters) <=
                    kThreads * registers_at_entry(kThreads),
                "registers");

  // Steps by which the input part is loaded ahead.
  static constexpr int kRing = kCtas == 16 ? 4 : 8;

  // ---- h: slabs of 32 units; in each, planes of four sequences ----
  static constexpr int kPlaneBytes = 512, kSlabBytes = kPlaneBytes * kSequences / 4;
  // The place of a unit of a sequence, in bytes from the beginning of a buffer of h (or from that
  // of a CTA's part, with the unit counted from its first).
  __device__ __forceinline__ static constexpr int hidden_at(int unit, int sequence) {
    return unit / 32 * kSlabBytes + sequence / 4 * kPlaneBytes + unit % 32 * 16 + sequence % 4 * 4;
  }
  __device__ __forceinline__ static float operand(float h) { return h; }
  // For FmaTile. Sums by unit, sequence, gate.
  __device__ __forceinline__ static constexpr int offset(int j) { return hidden_at(j * kLanes, 0); }
  __device__ __forceinline__ static constexpr int sum_of(int row, int sequence) {
    return row / 4 * 16 + sequence * 4 + row % 4;
  }

  // ---- bytes of shared memory ----
  static constexpr int kHiddenBytes = kDepth * kSequences * 4;
  static constexpr int kSentBytes = kUnits * kSequences * 4, kTileBytes = kSentBytes;
  // A sequence's input part, and its outputs: h, the four gates, c. Both are a multiple of 64 bytes
  // and 16 more, so that a warp's accesses have no bank conflicts.
  static constexpr int kInputBytes = 16 * kUnits + 16, kOutputBytes = 24 * kUnits + 16;

  static constexpr int kTileAt = 2 * kHiddenBytes;
  static constexpr int kInputAt = kTileAt + (kCtas > 1 ? 2 * kSentBytes : 0);
  static constexpr int kOutputAt = kInputAt + kRing * kSequences * kInputBytes;
  static constexpr int kBiasAt = kOutputAt + 2 * kSequences * kOutputBytes;
  static constexpr int kRulesAt = kBiasAt + 16 * kUnits;
  static constexpr int kSpansAt = kRulesAt + 12 * kCells * kFmaThreads;
  static constexpr int kWeightsAt = kSpansAt + 8 * kSequences;
  static constexpr int kBarriersAt = kWeightsAt + kSharedDepth * 4 * kFmaRows * kFmaThreads;
  static constexpr int kSharedBytes =
      kBarriersAt + (2 + kRing + kOutputBarriers) * int(sizeof(Mbarrier));
  static_assert(kWeightsAt % 16 == 0 && kSharedBytes <= 227 * 1024, "fits an SM");
};

#if FASTLSTM_SM90

template <class Shape>
class ClusterForwardFp32Product {
  static constexpr int kUnitLanes = Shape::kLanes / 2;  // those with cells of one unit
  static constexpr int kPlanes = Shape::kTilePlanes;

 public:
  typedef float Sums[Shape::kCells][4];  // i, f, g, o of a cell

  // thread: its number in the CTA.
  __device__ __forceinline__ ClusterForwardFp32Product(unsigned char* shared, int thread)
      : thread_(thread), tile_(shared + Shape::kWeightsAt, thread) {}

  __device__ __forceinline__ int thread() const { return thread_; }
  __device__ __forceinline__ static int part() { return 0; }  // of K: warps do not split it
  __device__ __forceinline__ int unit() const { return thread_ / kUnitLanes; }  // of the CTA's
  __device__ __forceinline__ int sequence(int cell) const {
    return thread_ % kUnitLanes + sequence_offset(cell);
  }
  // sequence(cell) - sequence(0).
  __device__ __forceinline__ static constexpr int sequence_offset(int cell) {
    return cell * kUnitLanes;
  }
  // Where h of a cell stands, relative to the first cell's.
  __device__ __forceinline__ static constexpr int hidden_offset(int cell) {
    return Shape::hidden_at(0, cell * kUnitLanes);
  }

  // Loads this thread's weights: `first` is the CTA's first row of each gate of W_hh (4H, H).
  __device__ __forceinline__ void load(const float* w_hh, int hidden_size, int first) {
    // This thread keeps the sums of its own unit; its lanes have another besides.
    const int row = first + unit(), other = row ^ 1;
    tile_.load([&](int j, int r) {
      const int unit = existing_unit(r < 4 ? row : other, hidden_size),
                k = j * Shape::kLanes + thread_ % Shape::kLanes;
      return k < hidden_size ? w_hh[(r % 4 * int64_t(hidden_size) + unit) * hidden_size + k] : 0.0f;
    });
  }

  // Where this thread's first column begins in a buffer of h.
  __device__ __forceinline__ uint32_t fragments_at() const { return thread_ % Shape::kLanes * 16; }

  // Computes W_hh h; this thread's first column of h begins at `from`.
  __device__ __forceinline__ void multiply(const unsigned char* from) {
#pragma unroll 1
    for (int tile = 0; tile < Shape::kTiles; ++tile) {
      float cells[4 * kPlanes];  // a cell's gates, for each plane
      multiply_planes(from + tile * kPlanes * Shape::kPlaneBytes, cells);
      if constexpr (Shape::kTileCells < kPlanes) {
        order_halves<8>(cells, kUnitLanes / 2);
        add_halves<8>(cells, kUnitLanes / 2);
      }
#pragma unroll
      for (int x = 0; x < Shape::kCells; ++x)
        if (x / Shape::kTileCells == tile) {
#pragma unroll
          for (int q = 0; q < 4; ++q) sums_[x][q] = cells[x % Shape::kTileCells * 4 + q];
        }
    }
  }

  // Adds the result to the sums of this thread's cells.
  __device__ __forceinline__ void add(Sums& sums) const {
#pragma unroll
    for (int x = 0; x < Shape::kCells; ++x)
#pragma unroll
      for (int q = 0; q < 4; ++q) sums[x][q] += sums_[x][q];
  }

 private:
  // The planes of a tile.
  __device__ __forceinline__ void multiply_planes(const unsigned char* from,
                                                  float (&cells)[4 * kPlanes]) {
    constexpr int kAtOnce = Shape::kPlanesAtOnce;
#pragma unroll
    for (int p = 0; p < kPlanes; p += kAtOnce) {
      float sums[kAtOnce][kPlaneSums] = {};
      tile_.multiply(from + p * Shape::kPlaneBytes, sums);
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        add_halves<32>(sums[n], kUnitLanes);
        order_halves<16>(sums[n], 2);
        add_halves<16>(sums[n], 2);
        order_halves<8>(sums[n], 1);
        add_halves<8>(sums[n], 1);
#pragma unroll
        for (int q = 0; q < 4; ++q) cells[(p + n) * 4 + q] = sums[n][q];
      }
    }
  }

  const int thread_;
  FmaTile<Shape> tile_;
  float sums_[Shape::kCells][4];
};

#endif

}  // namespace cuda
}  // namespace fastlstm

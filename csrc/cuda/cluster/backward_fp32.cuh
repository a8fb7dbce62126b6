// fp32 in the backward cluster kernel: its sizes, its shared memory, and the product by
// multiply-adds (fma_tile.cuh).
//
// A thread multiplies eight columns of the CTA's rows of W_hh by the dgates of four sequences at a
// time. The lanes that share these columns end up with pieces of 16 bytes: two units of two
// sequences, which go to the CTA that owns the units. Of one plane in one CTA each lane ends up
// with one sum.
#pragma once

#include "backward_shape.cuh"
#include "fma_tile.cuh"

namespace fastlstm {
namespace cuda {

// The fp32 counterpart of ClusterBackwardShape.
template <int kUnits_, int kCtas_, int kGroups_, int kSequences_ = 8>
struct ClusterBackwardFp32 {
  typedef float S;
  typedef float Operand;  // of the product: dgates as they are
  static constexpr int kUnits = kUnits_, kCtas = kCtas_, kGroups = kGroups_;
  static constexpr int kSequences = kSequences_, kPlanes = kSequences / 4;
  static constexpr bool kStreams = false;
  static constexpr int kWarps = kFmaThreads / 32, kThreads = kFmaThreads + kBackwardMovers;
  static constexpr int kSpread = 2 * kWarps / kSequences;  // warps that share two sequences
  static constexpr int kCellStride = 16 * kSpread;         // from a thread's cell to its next
  static constexpr int kCells = kUnits / kCellStride;      // of a thread
  static constexpr int kSources = kCtas;                   // of sums
  static_assert(kCells * kCellStride == kUnits, "whole cells");

  // K of a thread, of the CTA's 4 * kUnits rows. Its registers hold the weights of eight of them,
  // or fourteen where shared memory has no room for more.
  typedef FmaSplit<kCtas * kUnits, 4 * kUnits> Split;
  static constexpr int kLanes = Split::kLanes;
  static constexpr int kRegisterDepth = Split::kThreadDepth > 16  ? 14
                                        : Split::kThreadDepth > 8 ? 8
                                                                  : Split::kThreadDepth;
  static constexpr int kSharedDepth = Split::kThreadDepth - kRegisterDepth;
  static constexpr int kStages = kGroups == 1 && kCtas < 16 ? 8 : 4;

  static constexpr bool kMovesRegisters = Split::kThreadDepth >= 8;
  static constexpr int kComputingRegisters = 216, kMoverRegisters = 72;
  static_assert(kFmaThreads * kComputingRegisters + kBackwardMovers * kMoverRegisters <=
                    kThreads * registers_at_entry(kThreads),
                "registers");

  // dgates of a step: planes of four sequences; in each, gate after gate, the units.
  static constexpr int kPlaneBytes = 64 * kUnits;
  static constexpr int kOperandGate = 16 * kUnits,
                       kOperandNext = 16 * kCellStride;  // to the next cell
  __device__ __forceinline__ static constexpr unsigned operand_at(int unit, int sequence) {
    return sequence / 4 * kPlaneBytes + unit * 16 + sequence % 4 * 4;
  }
  // Stores a cell's dgates.
  __device__ __forceinline__ static void store_cell(const float (&d)[4], unsigned char* to) {
#pragma unroll
    for (int q = 0; q < 4; ++q) *reinterpret_cast<float*>(to + q * kOperandGate) = d[q];
  }
  // Of a sequence, the dgates of four units, by gate.
  static constexpr int kChunk = 4;
  __device__ __forceinline__ static void load_chunk(const unsigned char* from, uint4 (&gates)[4]) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const uint32_t* const words = reinterpret_cast<const uint32_t*>(from + q * kOperandGate);
      gates[q] = make_uint4(words[0], words[4], words[8], words[12]);
    }
  }
  // For FmaTile. Sums by pair of columns, pair of sequences; then, as they are sent, by column and
  // sequence.
  __device__ __forceinline__ static constexpr int offset(int j) { return j * kLanes * 16; }
  __device__ __forceinline__ static constexpr int sum_of(int row, int sequence) {
    return row / 2 * 8 + sequence / 2 * 4 + row % 2 * 2 + sequence % 2;
  }

  // Shared memory, in bytes; stages as those of ClusterBackwardShape.
  static constexpr int kGateStride = 4 * kUnits + 64, kStateStride = kGateStride;
  static constexpr int kStatesAt = 4 * 8 * kGateStride,
                       kGradOutputAt = kStatesAt + 8 * kStateStride,
                       kGradStatesAt = kGradOutputAt + 8 * kStateStride,
                       kStageBytes = kGradStatesAt + 8 * kStateStride;
  static constexpr int kStoredAt = 0, kDgatesBytes = kPlanes * kPlaneBytes;
  static constexpr int kSourceBytes = 32 * kUnits, kSumsBytes = kSources * kSourceBytes;
  static constexpr int kBarrierBytes = 128;
  static constexpr int kSumsAt = kBarrierBytes, kDgatesAt = kSumsAt + 2 * kGroups * kSumsBytes,
                       kWeightsAt = kDgatesAt + 2 * kGroups * kDgatesBytes,
                       kStagesAt = kWeightsAt + kSharedDepth * 4 * kFmaRows * kFmaThreads,
                       kSharedBytes = kStagesAt + kGroups * kStages * kStageBytes;
  static_assert(2 * kGroups * 8 <= kBarrierBytes, "barriers");
  static_assert(kWeightsAt % 16 == 0 && kSharedBytes <= 227 * 1024, "shared memory");
};

#if FASTLSTM_SM90

template <class Shape>
class ClusterBackwardFp32Product {
  static constexpr int kLanes = Shape::kLanes, kPairSumBytes = 8 * Shape::kUnits;
  // Lanes that share columns divide the sums: by pairs of columns, then by pairs of sequences.
  static constexpr int kPieces = kLanes == 4 ? 2 : 1;  // of a thread and plane
  static constexpr bool kSharesPlanes = kLanes >= 16;  // a thread has one piece of both planes
  static constexpr bool kOneSum = Shape::kPlanes == 1;
  static_assert(!kOneSum || (Shape::kCtas == 1 && kLanes == 32), "a sum for each lane");

 public:
  typedef float Sums[kOneSum ? 1 : 4];  // of one CTA alone: what a thread stores

  __device__ __forceinline__ ClusterBackwardFp32Product(const ClusterBackwardArgs<float>& args,
                                                        const float* w_hh, unsigned char* shared,
                                                        unsigned rank, uint32_t thread)
      : shared_(shared), tile_(shared + Shape::kWeightsAt, int(thread)) {
    const int lane = thread % kLanes, units = args.units;
    from_ = opaque(lane * 16);
    // Each CTA begins with its own columns: otherwise all would send to one CTA at a time.
    constexpr int kBlocks = Shape::kCtas * Shape::kUnits / kFmaRows;
    const int first_unit = int(rank) * Shape::kUnits;
    const int block = (first_unit / kFmaRows + int(thread) / kLanes) % kBlocks;
    // The pair that this thread keeps comes first, or the column.
    const int kept = lane / (kLanes / 4) * 2 + (kOneSum ? lane / 2 % 2 : 0),
              column = block * kFmaRows + kept;
    tile_.load([&](int j, int c) {
      const int k = j * kLanes + lane;  // gate, unit
      const int unit = first_unit + k % Shape::kUnits, from = block * kFmaRows + (c ^ kept);
      return unit < units && from < units
                 ? w_hh[(k / Shape::kUnits * int64_t(units) + unit) * units + from]
                 : 0.0f;
    });

    int pair = 0;  // of sequences, of the thread's first piece
    if constexpr (kLanes >= 8) pair = lane / (kLanes / 8) % 2;
    if constexpr (kSharesPlanes && !kOneSum) pair += lane / (kLanes / 16) % 2 * 2;
    to_ = opaque(unsigned(Shape::kSumsAt + int(rank) * Shape::kSourceBytes + pair * kPairSumBytes +
                          column % Shape::kUnits * 8 + (kOneSum ? lane % 2 * 4 : 0)));
    sends_ = kLanes < 32 || lane % 2 == 0;
    if constexpr (Shape::kCtas > 1) {
      peer_ = remote(shared, unsigned(column / Shape::kUnits));
      peer_.address = opaque(peer_.address);
    }
  }

  // This thread's first operand in the dgates at `dgates`; both are offsets in shared memory.
  __device__ __forceinline__ uint32_t operands(uint32_t dgates) const { return dgates + from_; }

  // One CTA: the product alone, and the stores of its sums.
  __device__ __forceinline__ void multiply(uint32_t at, Sums& own) const {
    if constexpr (kOneSum) {
      float sums[1][kPlaneSums] = {};
      multiply_plane(at, sums);
      add_halves<4>(sums[0], 2);
      order_halves<2>(sums[0], 1);
      add_halves<2>(sums[0], 1);
      own[0] = sums[0][0];
    } else {
      float both[8];
      multiply_planes(at, both);
#pragma unroll
      for (int e = 0; e < 4; ++e) own[e] = both[e];
    }
  }
  __device__ __forceinline__ void store(const Sums& own, int buffer) const {
    unsigned char* const to = shared_ + to_ + buffer * Shape::kSumsBytes;
    if constexpr (kOneSum)
      *reinterpret_cast<float*>(to) = own[0];
    else if (sends_)
      *reinterpret_cast<uint4*>(to) =
          make_uint4(bits_of(own[0]), bits_of(own[1]), bits_of(own[2]), bits_of(own[3]));
  }

  // Multiplies the dgates (this thread's begin at `at`) and sends the sums to buffer `buffer` of
  // their owners, whose mbarriers of that number count them.
  __device__ __forceinline__ void send(uint32_t at, int buffer) const {
    const unsigned barrier = unsigned(buffer) * sizeof(Mbarrier);
    const uint32_t to = to_ + buffer * Shape::kSumsBytes;
    if constexpr (kSharesPlanes) {
      float both[8];
      multiply_planes(at, both);
      if (sends_) send_piece(both, to, barrier);
    } else {
#pragma unroll 1
      for (int p = 0; p < 2; ++p) {
        float sums[1][kPlaneSums] = {};
        multiply_plane(at + p * Shape::kPlaneBytes, sums);
#pragma unroll
        for (int n = 0; n < kPieces; ++n)
          send_piece(sums[0] + 4 * n, to + (2 * p + n) * kPairSumBytes, barrier);
      }
    }
  }

 private:
  __device__ __forceinline__ void multiply_plane(uint32_t at, float (&sums)[1][kPlaneSums]) const {
    tile_.multiply(shared_ + at, sums);
    add_halves<32>(sums[0], kLanes / 2);
    add_halves<16>(sums[0], kLanes / 4);
    if constexpr (kLanes >= 8) {
      order_halves<8>(sums[0], kLanes / 8);
      add_halves<8>(sums[0], kLanes / 8);
    }
  }
  // Both planes; the first four sums are this thread's.
  __device__ __forceinline__ void multiply_planes(uint32_t at, float (&both)[8]) const {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      float sums[1][kPlaneSums] = {};
      multiply_plane(at + p * Shape::kPlaneBytes, sums);
#pragma unroll
      for (int e = 0; e < 4; ++e) both[4 * p + e] = sums[0][e];
    }
    order_halves<8>(both, kLanes / 16);
    add_halves<8>(both, kLanes / 16);
    if constexpr (kLanes == 32) {
#pragma unroll
      for (int e = 0; e < 4; ++e) both[e] += __shfl_xor_sync(0xffffffffu, both[e], 1);
    }
  }
  __device__ __forceinline__ void send_piece(const float* sums, uint32_t to,
                                             unsigned barrier) const {
    const uint4 piece =
        make_uint4(bits_of(sums[0]), bits_of(sums[1]), bits_of(sums[2]), bits_of(sums[3]));
    send_async(peer_ + to, piece, peer_ + barrier);
  }

  unsigned char* shared_;
  FmaTile<Shape> tile_;
  uint32_t from_, to_;
  bool sends_;
  Remote peer_;
};

#endif  // FASTLSTM_SM90

}  // namespace cuda
}  // namespace fastlstm

// The product of the forward cluster kernel. The recurrent weights of a warp's eight units stay in
// its registers, as A fragments of mma.m16n8. h comes from shared memory: a piece of 16 bytes holds
// a lane's B fragments of two mma. The order of K within a slab is permuted, in A and B alike, so
// that a lane's share is contiguous.
#pragma once

#include "forward_shape.cuh"

namespace fastlstm {
namespace cuda {

#if FASTLSTM_SM90

// 16 bytes of a row from column k on, zero beyond `columns`.
template <class S>
__device__ __forceinline__ uint4 row_piece(const S* row, int k, int columns, bool aligned) {
  constexpr int kPiece = 16 / int(sizeof(S));
  uint4 piece = make_uint4(0, 0, 0, 0);
  if (aligned) {
    if (k < columns) piece = *reinterpret_cast<const uint4*>(row + k);
  } else {
    alignas(16) S value[kPiece];
#pragma unroll
    for (int e = 0; e < kPiece; ++e) {
      from_acc(0.0f, value[e]);
      if (k + e < columns) value[e] = row[k + e];
    }
    memcpy(&piece, value, 16);
  }
  if constexpr (std::is_same_v<S, float>)
    piece = make_uint4(round_tf32(piece.x), round_tf32(piece.y), round_tf32(piece.z),
                       round_tf32(piece.w));
  return piece;
}

// A thread finishes cells of one unit of its warp's block, lane / 4, in kCells sequences.
template <class Shape>
class ClusterForwardProduct {
  typedef typename Shape::S S;

 public:
  typedef float Sums[Shape::kCells][4];  // i, f, g, o of a cell

  // thread: its number in the CTA.
  __device__ __forceinline__ ClusterForwardProduct(unsigned char* shared, int thread)
      : shared_(shared), thread_(thread) {}

  __device__ __forceinline__ int lane() const { return thread_ % 32; }
  __device__ __forceinline__ int block() const { return thread_ / 32 % Shape::kBlocks; }
  __device__ __forceinline__ int part() const {  // of K
    return Shape::kSplit == 1 ? 0 : thread_ / 32 / Shape::kBlocks;
  }
  __device__ __forceinline__ int unit() const { return block() * 8 + lane() / 4; }  // of the CTA's
  // Two warps that split a block finish alternate columns.
  __device__ __forceinline__ int sequence(int cell) const {
    return lane() % 4 * 2 + part() + sequence_offset(cell);
  }
  // sequence(cell) - sequence(0).
  __device__ __forceinline__ static constexpr int sequence_offset(int cell) {
    return cell * Shape::kSplit / 2 * 8 + cell * Shape::kSplit % 2;
  }

  // Loads the weights of this thread's unit, which is `row` of each gate of W_hh (4H, H).
  __device__ __forceinline__ void load(const S* w_hh, int hidden_size, int row) {
    const bool aligned =
        hidden_size % Shape::kPiece == 0 && reinterpret_cast<uintptr_t>(w_hh) % 16 == 0;
    const int columns = row < hidden_size ? hidden_size : 0;
    const int64_t gate = int64_t(hidden_size) * hidden_size;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const S* from = w_hh + 2 * tile * gate + int64_t(row) * hidden_size;
#pragma unroll
      for (int j = 0; j < Shape::kWarpSlabs; ++j) {
        const int k = (part() * Shape::kWarpSlabs + j) * Shape::kSlab + lane() % 4 * Shape::kPiece;
        const uint4 top = row_piece(from, k, columns, aligned),
                    low = row_piece(from + gate, k, columns, aligned);
        const uint32_t halves[2][4] = {{top.x, low.x, top.y, low.y}, {top.z, low.z, top.w, low.w}};
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (j < Shape::kRegisterSlabs) {
#pragma unroll
            for (int r = 0; r < 4; ++r) weights_[j][half][tile][r] = halves[half][r];
          } else {
            const uint32_t (&a)[4] = halves[half];
            *shared_fragment(j, half, tile) = make_uint4(a[0], a[1], a[2], a[3]);
          }
      }
    }
  }

  // Where this thread's fragments begin in a buffer of h.
  __device__ __forceinline__ uint32_t fragments_at() const {
    return part() * Shape::kWarpSlabs * Shape::kSlabBytes + lane() / 4 * 64 +
           (lane() % 4 ^ lane() / 8) * 16;
  }

  // Computes W_hh h; this thread's fragments of h begin at `from`. Where two warps split a block,
  // stores the partner's half of the sums for it.
  __device__ __forceinline__ void multiply(const unsigned char* from) {
    // With one tile of sequences there are few independent sums: each is split in two chains.
    constexpr int kChains = Shape::kTiles == 1 ? 2 : 1;
    float acc[kChains][2][Shape::kTiles][4] = {};
#pragma unroll
    for (int j = 0; j < Shape::kWarpSlabs; ++j)
#pragma unroll
      for (int n = 0; n < Shape::kTiles; ++n) {
        const uint4 b = *reinterpret_cast<const uint4*>(from + j * Shape::kSlabBytes + n * 512);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t right[2] = {half ? b.z : b.x, half ? b.w : b.y};
#pragma unroll
          for (int tile = 0; tile < 2; ++tile) {
            if (j < Shape::kRegisterSlabs) {
              mma(acc[half % kChains][tile][n], weights_[j][half][tile], right, MmaElement<S>());
            } else {
              const uint4 a = *shared_fragment(j, half, tile);
              const uint32_t left[4] = {a.x, a.y, a.z, a.w};
              mma(acc[half % kChains][tile][n], left, right, MmaElement<S>());
            }
          }
        }
      }
    if (kChains == 2) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int n = 0; n < Shape::kTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[0][tile][n][e] += acc[kChains - 1][tile][n][e];
    }
    // A fragment has the columns 2 * (lane % 4) + {0, 1} of two gates.
    auto gate = [&](int column, int q) {
      return acc[0][q / 2][column / 2][q % 2 * 2 + column % 2];
    };
    if constexpr (Shape::kSplit == 1) {
#pragma unroll
      for (int x = 0; x < Shape::kCells; ++x)
#pragma unroll
        for (int q = 0; q < 4; ++q) sums_[x][q] = gate(x, q);
    } else {
      const bool second = part() == 1;
#pragma unroll
      for (int x = 0; x < Shape::kCells; ++x) {
        float handed[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const float even = gate(2 * x, q), odd = gate(2 * x + 1, q);
          handed[q] = second ? even : odd;
          sums_[x][q] = second ? odd : even;
        }
        partial_of(1 - part())[x * 32] = make_float4(handed[0], handed[1], handed[2], handed[3]);
      }
    }
  }

  // Adds the result to the sums of this thread's cells.
  __device__ __forceinline__ void add(Sums& sums) const {
    if constexpr (Shape::kSplit == 2) named_barrier(2 + block(), 64);
#pragma unroll
    for (int x = 0; x < Shape::kCells; ++x) {
#pragma unroll
      for (int q = 0; q < 4; ++q) sums[x][q] += sums_[x][q];
      if constexpr (Shape::kSplit == 2) {
        const float4 half = partial_of(part())[x * 32];
        sums[x][0] += half.x, sums[x][1] += half.y, sums[x][2] += half.z, sums[x][3] += half.w;
      }
    }
  }

 private:
  // The sums that the warp with that part of K finishes.
  __device__ __forceinline__ float4* partial_of(int part) const {
    return reinterpret_cast<float4*>(shared_ + Shape::kSumsAt) +
           (block() * 2 + part) * Shape::kCells * 32 + lane();
  }

  // A weight fragment of a slab that is in shared memory instead of registers.
  __device__ __forceinline__ uint4* shared_fragment(int slab, int half, int tile) const {
    return reinterpret_cast<uint4*>(shared_ + Shape::kSharedSlabsAt) +
           (((slab - Shape::kRegisterSlabs) * 2 + half) * 2 + tile) * 32 * Shape::kWarps + thread_;
  }

  unsigned char* shared_;
  const int thread_;
  uint32_t weights_[Shape::kRegisterSlabs][2][2][4];
  float sums_[Shape::kCells][4];
};

#endif

}  // namespace cuda
}  // namespace fastlstm

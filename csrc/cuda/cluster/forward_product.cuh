// The forward cluster kernel's product: the recurrent weights of a warp's eight units stay in its
// registers, as A fragments of mma.m16n8; h comes from shared memory, a B fragment of two mma in a
// piece of 16 bytes. K is permuted within a slab, in A and B alike: a lane's share is contiguous.
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
template <class F>
class ForwardProduct {
  typedef typename F::S S;

 public:
  typedef float Sums[F::kCells][4];  // i, f, g, o of a cell

  // thread: its number in the CTA.
  __device__ __forceinline__ ForwardProduct(unsigned char* shared, int thread)
      : shared_(shared), thread_(thread) {}

  __device__ __forceinline__ int lane() const { return thread_ % 32; }
  __device__ __forceinline__ int block() const { return thread_ / 32 % F::kBlocks; }
  __device__ __forceinline__ int part() const {  // of K
    return F::kSplit == 1 ? 0 : thread_ / 32 / F::kBlocks;
  }
  __device__ __forceinline__ int unit() const { return block() * 8 + lane() / 4; }  // of the CTA's
  // Two warps that share a block finish alternate columns.
  __device__ __forceinline__ int sequence(int cell) const {
    return lane() % 4 * 2 + part() + further(cell);
  }
  // By how much that exceeds the first cell's.
  __device__ __forceinline__ static constexpr int further(int cell) {
    return cell * F::kSplit / 2 * 8 + cell * F::kSplit % 2;
  }

  // W_hh (4H, H), of which this thread's unit is `row`.
  __device__ __forceinline__ void load(const S* w_hh, int hidden_size, int row) {
    const bool aligned =
        hidden_size % F::kPiece == 0 && reinterpret_cast<uintptr_t>(w_hh) % 16 == 0;
    const int columns = row < hidden_size ? hidden_size : 0;
    const int64_t gate = int64_t(hidden_size) * hidden_size;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const S* from = w_hh + 2 * tile * gate + int64_t(row) * hidden_size;
#pragma unroll
      for (int j = 0; j < F::kWarpSlabs; ++j) {
        const int k = (part() * F::kWarpSlabs + j) * F::kSlab + lane() % 4 * F::kPiece;
        const uint4 top = row_piece(from, k, columns, aligned),
                    low = row_piece(from + gate, k, columns, aligned);
        const uint32_t halves[2][4] = {{top.x, low.x, top.y, low.y}, {top.z, low.z, top.w, low.w}};
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (j < F::kKeptSlabs) {
#pragma unroll
            for (int r = 0; r < 4; ++r) weights_[j][half][tile][r] = halves[half][r];
          } else {
            const uint32_t (&a)[4] = halves[half];
            *spare(j, half, tile) = make_uint4(a[0], a[1], a[2], a[3]);
          }
      }
    }
  }

  // Where this thread's fragments begin in a buffer of h.
  __device__ __forceinline__ uint32_t fragments_at() const {
    return part() * F::kWarpSlabs * F::kSlabBytes + lane() / 4 * 64 +
           (lane() % 4 ^ lane() / 8) * 16;
  }

  // W_hh h, whose fragments begin at `from`. Where two warps share a block, hands the partner its
  // part of the sums.
  __device__ __forceinline__ void multiply(const unsigned char* from) {
    // Where one tile of sequences makes few chains of sums, each is split in two.
    constexpr int kChains = F::kTiles == 1 ? 2 : 1;
    float acc[kChains][2][F::kTiles][4] = {};
#pragma unroll
    for (int j = 0; j < F::kWarpSlabs; ++j)
#pragma unroll
      for (int n = 0; n < F::kTiles; ++n) {
        const uint4 b = *reinterpret_cast<const uint4*>(from + j * F::kSlabBytes + n * 512);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t right[2] = {half ? b.z : b.x, half ? b.w : b.y};
#pragma unroll
          for (int tile = 0; tile < 2; ++tile) {
            if (j < F::kKeptSlabs) {
              mma(acc[half % kChains][tile][n], weights_[j][half][tile], right, MmaElement<S>());
            } else {
              const uint4 a = *spare(j, half, tile);
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
        for (int n = 0; n < F::kTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[0][tile][n][e] += acc[kChains - 1][tile][n][e];
    }
    // A fragment has the columns 2 * (lane % 4) + {0, 1} of two gates.
    auto gate = [&](int column, int q) {
      return acc[0][q / 2][column / 2][q % 2 * 2 + column % 2];
    };
    if constexpr (F::kSplit == 1) {
#pragma unroll
      for (int x = 0; x < F::kCells; ++x)
#pragma unroll
        for (int q = 0; q < 4; ++q) kept_[x][q] = gate(x, q);
    } else {
      const bool second = part() == 1;
#pragma unroll
      for (int x = 0; x < F::kCells; ++x) {
        float handed[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const float even = gate(2 * x, q), odd = gate(2 * x + 1, q);
          handed[q] = second ? even : odd;
          kept_[x][q] = second ? odd : even;
        }
        partial_of(1 - part())[x * 32] = make_float4(handed[0], handed[1], handed[2], handed[3]);
      }
    }
  }

  // Adds it to this thread's cells.
  __device__ __forceinline__ void add(Sums& sums) const {
    if constexpr (F::kSplit == 2) named_barrier(2 + block(), 64);
#pragma unroll
    for (int x = 0; x < F::kCells; ++x) {
#pragma unroll
      for (int q = 0; q < 4; ++q) sums[x][q] += kept_[x][q];
      if constexpr (F::kSplit == 2) {
        const float4 more = partial_of(part())[x * 32];
        sums[x][0] += more.x, sums[x][1] += more.y, sums[x][2] += more.z, sums[x][3] += more.w;
      }
    }
  }

 private:
  // Sums for the warp with that part of K.
  __device__ __forceinline__ float4* partial_of(int part) const {
    return reinterpret_cast<float4*>(shared_ + F::kSumsAt) + (block() * 2 + part) * F::kCells * 32 +
           lane();
  }

  // A fragment of a slab that the registers do not hold.
  __device__ __forceinline__ uint4* spare(int slab, int half, int tile) const {
    return reinterpret_cast<uint4*>(shared_ + F::kSpareAt) +
           (((slab - F::kKeptSlabs) * 2 + half) * 2 + tile) * 32 * F::kWarps + thread_;
  }

  unsigned char* shared_;
  const int thread_;
  uint32_t weights_[F::kKeptSlabs][2][2][4];
  float kept_[F::kCells][4];
};

#endif

}  // namespace cuda
}  // namespace fastlstm

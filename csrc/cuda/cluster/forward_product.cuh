// The product of the forward cluster kernel. The recurrent weights of a warp's units stay in its
// registers, as A fragments of mma.m16n8. h comes from shared memory: a piece of 16 bytes holds a
// lane's B fragments of two mma. The order of K within a slab is permuted, in A and B alike, so
// that a lane's share is contiguous.
//
// Where registers do not hold all weights, the rest is in shared memory, fragment by fragment: a
// lane's 16 bytes lie beside its neighbours', so that a read of a warp has no bank conflicts. These
// reads alternate with products of weights in registers, which need the tensor cores alone.
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

// A thread finishes kCells cells of one unit of its warp's block. Of the warps that split a block's
// K, each finishes other cells.
template <class Shape>
class ClusterForwardProduct {
  typedef typename Shape::S S;
  static constexpr int kSplit = Shape::kSplit, kCells = Shape::kCells;

 public:
  typedef float Sums[kCells][4];  // i, f, g, o of a cell

  // thread: its number in the CTA.
  __device__ __forceinline__ ClusterForwardProduct(unsigned char* shared, int thread)
      : shared_(shared), thread_(thread) {}

  // What is computed from the thread's number after this occupies no registers before it.
  __device__ __forceinline__ void renew() { pin(thread_); }

  __device__ __forceinline__ int thread() const { return int(thread_); }
  __device__ __forceinline__ int lane() const { return thread_ % 32; }
  __device__ __forceinline__ int block() const { return thread_ / 32 % Shape::kBlocks; }
  __device__ __forceinline__ int part() const {  // of K
    return kSplit == 1 ? 0 : thread_ / 32 / Shape::kBlocks;
  }
  __device__ __forceinline__ int unit() const {  // of the CTA's
    return block() * Shape::kBlockUnits + (Shape::kBlockUnits == 16 ? part() / 2 * 8 : 0) +
           lane() / 4;
  }
  // Warps that split a block finish alternate columns.
  __device__ __forceinline__ int sequence(int cell) const {
    return lane() % 4 * (2 / Shape::kColumns) + part() % 2 + sequence_offset(cell);
  }
  // sequence(cell) - sequence(0).
  __device__ __forceinline__ static constexpr int sequence_offset(int cell) {
    return cell * kSplit / 2 * 8 + cell * kSplit % 2;
  }

  // Where h of a cell stands, relative to the first cell's.
  __device__ __forceinline__ static constexpr int hidden_offset(int cell) {
    return sequence_offset(cell) * 64;
  }

  // Loads this thread's weights: `first` is the CTA's first row of each gate of W_hh (4H, H).
  __device__ __forceinline__ void load(const S* w_hh, int hidden_size, int first) {
    const bool aligned =
        hidden_size % Shape::kPiece == 0 && reinterpret_cast<uintptr_t>(w_hh) % 16 == 0;
    const int64_t gate = int64_t(hidden_size) * hidden_size;
#pragma unroll
    for (int tile = 0; tile < Shape::kWarpTiles; ++tile) {
      const int row = existing_unit(
          first + block() * Shape::kBlockUnits + tile / 2 * 8 + lane() / 4, hidden_size);
      const S* from = w_hh + tile % 2 * 2 * gate + int64_t(row) * hidden_size;
#pragma unroll
      for (int j = 0; j < Shape::kWarpSlabs; ++j) {
        const int k = (part() * Shape::kWarpSlabs + j) * Shape::kSlab + lane() % 4 * Shape::kPiece;
        const uint4 top = row_piece(from, k, hidden_size, aligned),
                    low = row_piece(from + gate, k, hidden_size, aligned);
        const uint32_t halves[2][4] = {{top.x, low.x, top.y, low.y}, {top.z, low.z, top.w, low.w}};
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (in_shared(j, half, tile)) {
            const uint32_t (&a)[4] = halves[half];
            *shared_fragment(j, tile) = make_uint4(a[0], a[1], a[2], a[3]);
          } else {
#pragma unroll
            for (int r = 0; r < 4; ++r) weights_[held(j, half, tile)][r] = halves[half][r];
          }
      }
    }
  }

  // Where this thread's fragments begin in a buffer of h.
  __device__ __forceinline__ uint32_t fragments_at() const {
    const int sequence = lane() / (4 * Shape::kColumns);
    return part() * Shape::kWarpSlabs * Shape::kSlabBytes + sequence * 64 +
           (lane() % 4 ^ sequence / 2) * 16;
  }

  // Computes W_hh h; this thread's fragments of h begin at `from`. Where several warps split a
  // block, stores the others' sums for them.
  __device__ __forceinline__ void multiply(const unsigned char* from) {
#pragma unroll
    for (int chain = 0; chain < kChains; ++chain)
#pragma unroll
      for (int tile = 0; tile < Shape::kWarpTiles; ++tile)
#pragma unroll
        for (int n = 0; n < Shape::kTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc_[chain][tile][n][e] = 0.0f;
    if constexpr (Shape::kStreams) {
      stream(from, acc_[0]);
    } else {
#pragma unroll
      for (int j = 0; j < Shape::kWarpSlabs; ++j)
#pragma unroll
        for (int n = 0; n < Shape::kTiles; ++n) {
          const uint4 b = *reinterpret_cast<const uint4*>(from + j * Shape::kSlabBytes + n * 512);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t right[2] = {half ? b.z : b.x, half ? b.w : b.y};
#pragma unroll
            for (int tile = 0; tile < Shape::kWarpTiles; ++tile) {
              float (&sum)[4] = acc_[half % kChains][tile][n];
              if (in_shared(j, half, tile))
                multiply_add(sum, *shared_fragment(j, tile), right);
              else
                mma(sum, weights_[held(j, half, tile)], right, MmaElement<S>());
            }
          }
        }
    }
    if constexpr (Shape::kStreams) renew();
    if constexpr (kSplit > 1) join_chains();
    if constexpr (kSplit == 2) {
      const bool second = part() == 1;
#pragma unroll
      for (int x = 0; x < kCells; ++x) {
        float handed[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const float even = gate(2 * x, q), odd = gate(2 * x + 1, q);
          handed[q] = second ? even : odd;
          sums_[x][q] = second ? odd : even;
        }
        partial(1 - part(), x)[block() * 32 + lane()] =
            make_float4(handed[0], handed[1], handed[2], handed[3]);
      }
    } else if constexpr (kSplit > 2) {  // its own sums as well: a choice would take registers
#pragma unroll
      for (int to = 0; to < kSplit; ++to)
        partial(to, 0)[thread_] = make_float4(gate(to, 0), gate(to, 1), gate(to, 2), gate(to, 3));
    }
  }

  // Adds the result to the sums of this thread's cells.
  __device__ __forceinline__ void add(Sums& sums) {
    if constexpr (kSplit > 1) named_barrier(2 + block(), 32 * kSplit);
    if constexpr (kSplit == 1) join_chains();  // here: the caller works while tensor cores do
#pragma unroll
    for (int x = 0; x < kCells; ++x) {
      if constexpr (kSplit <= 2) {
#pragma unroll
        for (int q = 0; q < 4; ++q) sums[x][q] += kSplit == 1 ? gate(x, q) : sums_[x][q];
      }
      if constexpr (kSplit > 1) {
#pragma unroll
        for (int from = 0; from < Shape::kSumsFrom; ++from) {
          const float4 more = partial(part(), x)[(from * Shape::kBlocks + block()) * 32 + lane()];
          sums[x][0] += more.x, sums[x][1] += more.y, sums[x][2] += more.z, sums[x][3] += more.w;
        }
      }
    }
  }

 private:
  // With few tiles there are few independent sums: each is split in two chains.
  static constexpr int kChains = Shape::kTiles * Shape::kWarpTiles == 2 ? 2 : 1;

  __device__ __forceinline__ void join_chains() {
    if constexpr (kChains == 2) {
#pragma unroll
      for (int tile = 0; tile < Shape::kWarpTiles; ++tile)
#pragma unroll
        for (int n = 0; n < Shape::kTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc_[0][tile][n][e] += acc_[1][tile][n][e];
    }
  }
  // A fragment has the columns 2 * (lane % 4) + {0, 1} of two gates. Gate q of a lane's sum j: all
  // columns of its unit of the first eight in turn, then of the next eight.
  __device__ __forceinline__ float gate(int j, int q) const {
    const int column = j % (2 * Shape::kTiles), eight = j / (2 * Shape::kTiles);
    return acc_[0][2 * eight + q / 2][column / 2][q % 2 * 2 + column % 2];
  }
  __device__ __forceinline__ static void multiply_add(float (&sum)[4], const uint4& a,
                                                      const uint32_t (&right)[2]) {
    const uint32_t left[4] = {a.x, a.y, a.z, a.w};
    mma(sum, left, right, MmaElement<S>());
  }
  // The product of one tile of sequences where weights are streamed. Two fragments are on their way
  // while others are multiplied.
  __device__ __forceinline__ void stream(const unsigned char* from,
                                         float (&acc)[Shape::kWarpTiles][Shape::kTiles][4]) const {
    auto fragment = [&](int j) {  // in the order of their use
      return *shared_fragment(j / Shape::kWarpTiles, j % Shape::kWarpTiles);
    };
    uint4 next[2] = {fragment(0), fragment(1)};
#pragma unroll
    for (int j = 0; j < Shape::kWarpSlabs; ++j) {
      const uint4 b = *reinterpret_cast<const uint4*>(from + j * Shape::kSlabBytes);
      const uint32_t first[2] = {b.x, b.y}, second[2] = {b.z, b.w};
#pragma unroll
      for (int pair = 0; pair < Shape::kWarpTiles; pair += 2) {
#pragma unroll
        for (int tile = pair; tile < pair + 2; ++tile)
          mma(acc[tile][0], weights_[held(j, 0, tile)], first, MmaElement<S>());
#pragma unroll
        for (int tile = pair; tile < pair + 2; ++tile) {
          if (in_shared(j, 1, tile)) {
            multiply_add(acc[tile][0], next[tile % 2], second);
            const int following = j * Shape::kWarpTiles + tile + 2;
            if (following < Shape::kSharedFragments) next[tile % 2] = fragment(following);
          } else {
            mma(acc[tile][0], weights_[held(j, 1, tile)], second, MmaElement<S>());
          }
        }
      }
    }
  }

  // What the warps with part `part` of K add up for their cell `cell`: 32 sums of every block, from
  // the other part or, of four, from each.
  __device__ __forceinline__ float4* partial(int part, int cell) const {
    return reinterpret_cast<float4*>(shared_ + Shape::kSumsAt) +
           (part * kCells + cell) * Shape::kSumsFrom * Shape::kBlocks * 32;
  }

  // Whether a fragment is in shared memory, and the number of one in registers.
  __device__ __forceinline__ static constexpr bool in_shared(int slab, int half, int tile) {
    return half == 1 && slab * Shape::kWarpTiles + tile < Shape::kSharedFragments;
  }
  __device__ __forceinline__ static constexpr int held(int slab, int half, int tile) {
    const int seconds = slab * Shape::kWarpTiles + (half == 1 ? tile : 0);  // before this one
    return (2 * slab + half) * Shape::kWarpTiles + tile - min_of(seconds, Shape::kSharedFragments);
  }
  // A weight fragment in shared memory.
  __device__ __forceinline__ uint4* shared_fragment(int slab, int tile) const {
    return reinterpret_cast<uint4*>(shared_ + Shape::kWeightsAt) +
           (slab * Shape::kWarpTiles + tile) * 32 * Shape::kWarps + thread_;
  }

  unsigned char* shared_;
  uint32_t thread_;
  uint32_t weights_[Shape::kFragments - Shape::kSharedFragments][4];
  float acc_[kChains][Shape::kWarpTiles][Shape::kTiles][4];
  float sums_[kCells][4];  // its own cells', where two warps split K
};

#endif

}  // namespace cuda
}  // namespace fastlstm

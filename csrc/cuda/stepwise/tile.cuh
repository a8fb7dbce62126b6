// The product of one step: a CTA's tile of A (rows x K) times B (columns x K) transposed.
//
// A CTA owns kRows rows by kColumns columns. K moves through shared memory in stages of kSlabs
// slabs; a slab is 64 bytes of K of every row of A and B. cp.async keeps kStages - 1 stages in
// flight, and one barrier a stage separates its arrival and its reuse. A warp owns 16 * kRowFrags
// rows by 32 columns, four fragments of eight; with kSplit > 1, several warps share a tile, each
// takes every kSplit-th slab, and their sums are added in a fixed order at the end. The sums end in
// shared memory, where the operands were: any thread can then read those of neighbouring columns.
//
// All types use the accumulator layout of mma.m16n8: in a fragment, a thread holds rows lane / 4
// and lane / 4 + 8, columns 2 * (lane % 4) and the next one. Where columns are gates, the four
// fragments are i, f, g, o of the same eight units, so that a thread has all gates of its cells.
//
// The order of a sum over K is free. mma.m16n8k16 wants the K elements {2c, 2c + 1} and {2c + 8,
// 2c + 9} in a thread; here the thread takes 16 contiguous bytes of a slab instead, of A and B
// alike, and feeds two products with them. One 16-byte load replaces four 4-byte loads.
#pragma once

#include "../shared/numeric.cuh"

namespace fastlstm {
namespace cuda {

constexpr int kSlabBytes = 64, kChunkBytes = 16, kChunks = kSlabBytes / kChunkBytes;
// Operands are padded with zeros to multiples of this many bytes of K, and of this many columns.
constexpr int kPadBytes = 256, kPadColumns = 128;

template <class S_, bool kTensor_, int kRowFrags_, int kRowWarps_, int kColumnWarps_, int kSplit_,
          int kSlabs_, int kStages_>
struct Tile {
  typedef S_ S;
  static constexpr bool kTensor = kTensor_;
  static constexpr int kRowFrags = kRowFrags_, kRowWarps = kRowWarps_, kColumnWarps = kColumnWarps_,
                       kSplit = kSplit_, kSlabs = kSlabs_, kStages = kStages_;
  static constexpr int kRows = 16 * kRowFrags * kRowWarps, kColumns = 32 * kColumnWarps;
  static constexpr int kTileWarps = kRowWarps * kColumnWarps;
  static constexpr int kThreads = 32 * kTileWarps * kSplit;
  static constexpr int kSlabSize = (kRows + kColumns) * kSlabBytes;
  static constexpr int kStageSize = kSlabs * kSlabSize;
  static constexpr int kLoads = kStageSize / kChunkBytes / kThreads;
  static constexpr int kSharedBytes = kStages * kStageSize;
  // Sums in shared memory: padded rows, in which a warp stores its fragments without bank
  // conflicts.
  static constexpr int kSumStride = kColumns + 8, kSplitSums = kRows * kSumStride;
  // CTAs on an SM that leave a thread at least 128 registers, which are few for doubles. Without
  // this bound, ptxas may spill to fit one CTA more.
  static constexpr int kCtas = kThreads >= 256                            ? 1
                               : kRows > 16 || std::is_same_v<S_, double> ? 3
                                                                          : 4;

  static_assert(kStages >= 2, "the copy of a stage overlaps with the use of another");
  static_assert(kLoads * kThreads * kChunkBytes == kStageSize, "threads copy equal parts");
  static_assert(kSlabs % kSplit == 0, "the warps of a split take equal parts of a stage");
  static_assert(kPadBytes % (kSlabs * kSlabBytes) == 0, "K is padded to whole stages");
  static_assert(kPadColumns % kColumns == 0, "columns are padded to whole tiles");
  static_assert(kSplit * kSplitSums * int(sizeof(Acc<S>)) <= kSharedBytes,
                "the sums fit where the operands were");
};

// Chunks of a row are swizzled (XOR with the row), so that copies and reads have no bank conflicts:
// 8 threads that read one chunk each of rows 2 apart touch all 32 banks once.
__device__ __forceinline__ int chunk_at(int row, int chunk) {
  return row * kSlabBytes + ((chunk ^ (row >> 1 & 3)) * kChunkBytes);
}

template <class S>
using Chunk = Neighbours<S, kChunkBytes / int(sizeof(S))>;

// A: rows in device memory; those from `rows` on count as zero. B: padded.
template <class S>
struct Operands {
  const S* a;
  const S* b;
  int64_t a_stride, b_stride;  // elements from row to row
  int rows;
  int depth_bytes;  // of K, a multiple of kPadBytes
};

// Columns are gates (kGates is 4) or not (1).
template <class Tile, int kGates>
class TileProduct {
 public:
  typedef typename Tile::S S;
  typedef Acc<S> T;
  typedef T Sums[Tile::kRowFrags][4][4];

  __device__ __forceinline__ TileProduct(unsigned char* shared, const Operands<S>& x, int row,
                                         int column)
      : shared_(shared), lane_(threadIdx.x % 32) {
    const int warp = threadIdx.x / 32;
    split_ = warp / Tile::kTileWarps;
    row_ = warp % Tile::kTileWarps / Tile::kColumnWarps * 16 * Tile::kRowFrags;
    column_warp = warp % Tile::kColumnWarps;
    stages_ = row < x.rows ? x.depth_bytes / (Tile::kSlabs * kSlabBytes) : 0;
#pragma unroll
    for (int j = 0; j < Tile::kLoads; ++j) {
      const int chunk = int(threadIdx.x) + j * Tile::kThreads;
      const int slab = chunk / (Tile::kSlabSize / kChunkBytes);
      const int line = chunk % (Tile::kSlabSize / kChunkBytes) / kChunks;
      const int offset = slab * kSlabBytes + chunk % kChunks * kChunkBytes;
      const bool left = line < Tile::kRows;
      valid_[j] = !left || row + line < x.rows ? kChunkBytes : 0;
      right_ |= unsigned(!left) << j;
      const S* from = left ? x.a + (valid_[j] ? row + line : 0) * x.a_stride
                           : x.b + (column + line - Tile::kRows) * x.b_stride;
      from_[j] = reinterpret_cast<const unsigned char*>(from) + offset;
      to_[j] = slab * Tile::kSlabSize + chunk_at(line, chunk % kChunks);
    }
  }

  // Starts the first copies, which overlap with what the caller does next: of B, then of A.
  __device__ __forceinline__ void begin_right() {
#pragma unroll
    for (int k = 0; k < Tile::kStages - 1; ++k) copy(k, [&](int j) { return right_ >> j & 1; });
  }
  __device__ __forceinline__ void begin_left() {
#pragma unroll
    for (int k = 0; k < Tile::kStages - 1; ++k) {
      copy(k, [&](int j) { return !(right_ >> j & 1); });
      commit_async();
    }
  }

  // Multiplies, and leaves the sums in shared memory. They start from `sums`: with kSplit > 1, from
  // those of all warps that share a tile together.
  __device__ __forceinline__ void finish(Sums& sums) {
    for (int k = 0; k < stages_; ++k) {
      wait_async<Tile::kStages - 2>();
      __syncthreads();
      copy(k + Tile::kStages - 1, [](int) { return true; });
      commit_async();
      const unsigned char* stage = shared_ + k % Tile::kStages * Tile::kStageSize;
#pragma unroll
      for (int j = 0; j < Tile::kSlabs / Tile::kSplit; ++j)
        multiply(sums, stage + (j * Tile::kSplit + split_) * Tile::kSlabSize);
    }
    wait_async<0>();
    share(sums);
  }
  // Whether this warp's sums start from what is added to the product, and not from zero.
  __device__ __forceinline__ bool begins_sums() const { return split_ == 0; }

  // After finish(): sums of neighbouring columns of the tile; where they are gates, of neighbouring
  // units.
  template <int kCount>
  __device__ __forceinline__ void read(int row, int column, T (&to)[kGates][kCount]) const {
#pragma unroll
    for (int q = 0; q < kGates; ++q) {
      const T* from = shared_sums() + row * Tile::kSumStride + q * (Tile::kColumns / 4) + column;
      load_neighbours(from, to[q]);
#pragma unroll
      for (int split = 1; split < Tile::kSplit; ++split) {
        T more[kCount];
        load_neighbours(from + split * Tile::kSplitSums, more);
#pragma unroll
        for (int j = 0; j < kCount; ++j) to[q][j] += more[j];
      }
    }
  }
  // The row of element e of a fragment, and its place among the fragment's eight columns.
  __device__ __forceinline__ int row_of(int frag, int e) const {
    return row_ + frag * 16 + lane_ / 4 + e / 2 * 8;
  }
  __device__ __forceinline__ int place_of(int e) const { return lane_ % 4 * 2 + e % 2; }

  int column_warp;

 private:
  // Those of this thread's copies for which `use` holds.
  template <class Use>
  __device__ __forceinline__ void copy(int stage, Use&& use) {
    if (stage >= stages_) return;
    unsigned char* to = shared_ + stage % Tile::kStages * Tile::kStageSize;
#pragma unroll
    for (int j = 0; j < Tile::kLoads; ++j)
      if (use(j))
        copy_async(to + to_[j], from_[j] + int64_t(stage) * Tile::kSlabs * kSlabBytes, valid_[j]);
  }

  __device__ __forceinline__ void multiply(Sums& sums, const unsigned char* slab) {
    const unsigned char* right = slab + Tile::kRows * kSlabBytes;
    if constexpr (Tile::kTensor && FASTLSTM_SM80) {
      multiply_tensor(sums, slab, right);
    } else {
#pragma unroll 2
      for (int chunk = 0; chunk < kChunks; ++chunk) multiply_chunk(sums, slab, right, chunk);
    }
  }

  __device__ __forceinline__ void multiply_tensor(Sums& sums, const unsigned char* left,
                                                  const unsigned char* right) {
    uint4 a[Tile::kRowFrags][2], b[4];
#pragma unroll
    for (int f = 0; f < Tile::kRowFrags; ++f)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        a[f][half] = load<uint4>(left, row_of(f, 2 * half), lane_ % 4);
#pragma unroll
    for (int q = 0; q < 4; ++q)
      b[q] = load<uint4>(right, column_warp * 32 + q * 8 + lane_ / 4, lane_ % 4);
#pragma unroll
    for (int f = 0; f < Tile::kRowFrags; ++f)
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const uint32_t a_low[4] = {a[f][0].x, a[f][1].x, a[f][0].y, a[f][1].y};
        const uint32_t b_low[2] = {b[q].x, b[q].y};
        mma(sums[f][q], a_low, b_low, S());
        const uint32_t a_high[4] = {a[f][0].z, a[f][1].z, a[f][0].w, a[f][1].w};
        const uint32_t b_high[2] = {b[q].z, b[q].w};
        mma(sums[f][q], a_high, b_high, S());
      }
  }

  __device__ __forceinline__ void multiply_chunk(Sums& sums, const unsigned char* left,
                                                 const unsigned char* right, int chunk) {
    Chunk<S> a[Tile::kRowFrags][2];
#pragma unroll
    for (int f = 0; f < Tile::kRowFrags; ++f)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        a[f][half] = load<Chunk<S>>(left, row_of(f, 2 * half), chunk);
#pragma unroll
    for (int q = 0; q < 4; ++q)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const Chunk<S> b = load<Chunk<S>>(right, column_warp * 32 + q * 8 + place_of(odd), chunk);
#pragma unroll
        for (int f = 0; f < Tile::kRowFrags; ++f)
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int k = 0; k < int(kChunkBytes / sizeof(S)); ++k)
              sums[f][q][2 * half + odd] += to_acc(a[f][half].at[k]) * to_acc(b.at[k]);
      }
  }

  template <class V>
  __device__ __forceinline__ V load(const unsigned char* slab, int row, int chunk) const {
    return *reinterpret_cast<const V*>(slab + chunk_at(row, chunk));
  }

  __device__ __forceinline__ T* shared_sums() const { return reinterpret_cast<T*>(shared_); }

  // Puts the sums where the operands were.
  __device__ __forceinline__ void share(const Sums& sums) {
    __syncthreads();
#pragma unroll
    for (int f = 0; f < Tile::kRowFrags; ++f)
#pragma unroll
      for (int q = 0; q < 4; ++q)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const int column = kGates == 4 ? q * (Tile::kColumns / 4) + column_warp * 8 + place_of(e)
                                         : column_warp * 32 + q * 8 + place_of(e);
          T* to =
              shared_sums() + split_ * Tile::kSplitSums + row_of(f, e) * Tile::kSumStride + column;
          store_neighbours<2>(to, [&](int j) { return sums[f][q][e + j]; });
        }
    __syncthreads();
  }

  unsigned char* shared_;
  const int lane_;
  int split_, row_, stages_;
  const unsigned char* from_[Tile::kLoads];
  int to_[Tile::kLoads], valid_[Tile::kLoads];
  unsigned right_ = 0;  // a bit for each copy: whether it is of B
};

}  // namespace cuda
}  // namespace fastlstm

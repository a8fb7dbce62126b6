// What the persistent kernels share: weights as fragments in shared memory, a product whose K is
// split over the warps, and flags between CTAs.
//
// A CTA holds 4u rows of a weight matrix for the whole sequence: u units with their four gates
// (forward), or u units of each of four CTAs (backward). Rows stand in blocks of 32, four times
// eight units. All warps compute all rows for all of the CTA's sequences, each from its own slice
// of K; so every element of the moving operand is read once by one thread, from the L2 cache to
// registers, and a warp need wait only for the CTAs that make its slice. The partial sums meet in
// shared memory, where a warp adds those of a block of 8 units x 8 sequences in a fixed order and
// finds a cell's four values in one thread, by the accumulator layout of mma.m16n8.
#pragma once

#include "numeric.cuh"
#include "persistent.h"

namespace fastlstm {
namespace cuda {

// Where a CTA's warp waits, and how long: the owner of slot j counts its finished steps in flag j.
struct Flags {
  const unsigned* flag;
  int slots, units;  // slot j makes `units` elements of K from j * units on
};

// Waits until all slots that make the elements [begin, end) have finished `count` steps.
__device__ __forceinline__ void wait_for(const Flags& f, int begin, int end, unsigned count,
                                         uint64_t limit) {
  const int slot = begin / f.units + int(threadIdx.x) % 32;
  if (slot * f.units < end && slot < f.slots) {
    const Patience patience(limit);
    while (poll_acquire(f.flag + slot) < count) patience.check();
  }
  __syncwarp();
}

// A CTA has stored what others wait for: all its threads, then one flag.
__device__ __forceinline__ void publish(unsigned* flag, unsigned count) {
  __syncthreads();
  if (threadIdx.x == 0) store_release(flag, count);
}

template <class S, int kUnits, int kTiles>
class SlicedProduct {
 public:
  static constexpr int kRowTiles = kUnits / 4;  // of 16 rows
  static constexpr int kBlocks = kUnits / 8 * kTiles;
  static constexpr int kRounds = (kBlocks + kPersistentWarps - 1) / kPersistentWarps;
  static constexpr int kSlab = 64 / int(sizeof(S));
  typedef float Sums[kRowTiles][kTiles][4];

  __device__ __forceinline__ SlicedProduct(unsigned char* weights, unsigned char* partial)
      : weights_(weights), partial_(reinterpret_cast<float4*>(partial)) {}

  __device__ __forceinline__ static int warp() { return threadIdx.x / 32; }
  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }

  // Copies fragments (fragment_kernel's order) to shared memory; barrier() ends it.
  __device__ __forceinline__ void load(const S* from, int bytes, int at) const {
    const unsigned char* source = reinterpret_cast<const unsigned char*>(from);
    for (int j = threadIdx.x * 16; j < bytes; j += kPersistentThreads * 16)
      copy_async(weights_ + at + j, source + j, 16);
    commit_async();
  }
  __device__ __forceinline__ static void barrier() {
    wait_async<0>();
    __syncthreads();
  }

  // Adds weights (from byte `at`) times x's slice of this warp. Row b of x begins at b * wide;
  // rows from `rows` on count as zero.
  __device__ __forceinline__ void add(Sums& sums, int at, const S* x, int64_t wide, int rows,
                                      int slabs) const {
    const uint4* a = reinterpret_cast<const uint4*>(weights_ + at) + lane();
    const S* from = x + lane() % 4 * (16 / int(sizeof(S)));
    // Where accumulators leave registers, the loads of two slabs are in flight.
#pragma unroll(kBlocks < 8 ? 2 : 1)
    for (int j = 0; j < slabs; ++j) {
      const int slab = warp() * slabs + j;
      uint4 b[kTiles];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int row = n * 8 + lane() / 4;
        b[n] = row < rows ? *reinterpret_cast<const uint4*>(from + row * wide + slab * kSlab)
                          : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const uint4* fragment = a + (m * slabs * kPersistentWarps + slab) * 64;
        const uint4 top = fragment[0], low = fragment[32];
        const uint32_t first[4] = {top.x, low.x, top.y, low.y};
        const uint32_t second[4] = {top.z, low.z, top.w, low.w};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const uint32_t b_first[2] = {b[n].x, b[n].y}, b_second[2] = {b[n].z, b[n].w};
          mma(sums[m][n], first, b_first, S());
          mma(sums[m][n], second, b_second, S());
        }
      }
    }
  }

  // use(q, unit, row, value) for each of this thread's sums, unit and row as unit_of and row_of.
  template <class Use>
  __device__ __forceinline__ static void each(Sums& sums, Use&& use) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          use(m % 2 * 2 + e / 2, m / 2 * 8 + lane() / 4, n * 8 + lane() % 4 * 2 + e % 2,
              sums[m][n][e]);
  }

  // Blocks of round r that this warp finishes. `use(block, values)` gets values[q][e] for the four
  // q, unit lane / 4 and sequences 2 * (lane % 4) + e of the block.
  template <class Use>
  __device__ __forceinline__ void finish(Sums& sums, Use&& use) const {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      if (r > 0) __syncthreads();
#pragma unroll
      for (int k = 0; k < kPersistentWarps; ++k) {
        constexpr int kLast = kBlocks - 1;
        const int block = r * kPersistentWarps + k, kept = block < kLast ? block : kLast;
        const int m = kept / kTiles * 2, n = kept % kTiles;
        if (block > kLast) continue;
        float4* to = partial_ + (warp() * kPersistentWarps + k) * 64 + lane();
        if (kBlocks < kPersistentWarps) to = partial_ + (warp() * kBlocks + k) * 64 + lane();
        to[0] = make_float4(sums[m][n][0], sums[m][n][1], sums[m][n][2], sums[m][n][3]);
        to[32] =
            make_float4(sums[m + 1][n][0], sums[m + 1][n][1], sums[m + 1][n][2], sums[m + 1][n][3]);
      }
      __syncthreads();
      const int block = r * kPersistentWarps + warp();
      if (block < kBlocks) {
        constexpr int kWide = kBlocks < kPersistentWarps ? kBlocks : kPersistentWarps;
        float total[8] = {};
#pragma unroll
        for (int w = 0; w < kPersistentWarps; ++w) {
          const float4* from = partial_ + (w * kWide + warp()) * 64 + lane();
          const float4 top = from[0], low = from[32];
          total[0] += top.x, total[1] += top.y, total[2] += top.z, total[3] += top.w;
          total[4] += low.x, total[5] += low.y, total[6] += low.z, total[7] += low.w;
        }
        const float values[4][2] = {
            {total[0], total[1]}, {total[2], total[3]}, {total[4], total[5]}, {total[6], total[7]}};
        use(r, block, values);
      }
    }
  }

  // Unit among the CTA's, and sequence among the group's, of a block's cell e.
  __device__ __forceinline__ static int unit_of(int block) {
    return block / kTiles * 8 + lane() / 4;
  }
  __device__ __forceinline__ static int row_of(int block, int e) {
    return block % kTiles * 8 + lane() % 4 * 2 + e;
  }

 private:
  unsigned char* weights_;
  float4* partial_;
};

// Weights in the order in which the threads of SlicedProduct read them: 16 bytes of K of the row
// lane / 4 of a tile of 16 rows, all lanes, then those of the row eight further; slab after slab,
// tile after tile, slot after slot.
template <class S>
struct FragmentArgs {
  const S* from;  // (4H, wide), gates in PyTorch's order
  S* to;
  int64_t wide, chunks;  // columns of `from`; 16-byte chunks to write
  int hidden_size, units, slabs;
  // Forward: a block's 32 rows are the gates of eight units, K the columns. Backward: the rows are
  // columns, eight of each quarter; K is (unit, gate) of the slot's own quarter.
  bool backward;
  int quarter, columns;  // units of a quarter, slots of one
};
template <class S>
__global__ void __launch_bounds__(256, 4)
    fragment_kernel(const __grid_constant__ FragmentArgs<S> args) {
  constexpr int kChunk = 16 / int(sizeof(S));
  for (int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x; j < args.chunks;
       j += int64_t(gridDim.x) * 256) {
    const int lane = int(j % 32), half = int(j / 32 % 2);
    const int64_t tile = j / 64 / args.slabs;  // over all slots
    const int k0 = int(j / 64 % args.slabs) * 4 * kChunk + lane % 4 * kChunk;
    const int slot = int(tile / (args.units / 4)),
              row = int(tile % (args.units / 4)) * 16 + half * 8 + lane / 4;
    const int q = row % 32 / 8, local = row / 32 * 8 + row % 8;
    for (int e = 0; e < kChunk; ++e) {
      int64_t from_row, column;
      bool inside;
      if (args.backward) {
        const int unit = slot / args.columns * args.quarter + (k0 + e) / 4;
        column = q * args.quarter + slot % args.columns * args.units + local;
        from_row = (k0 + e) % 4 * int64_t(args.hidden_size) + unit;
        inside = (k0 + e) / 4 < args.quarter && unit < args.hidden_size && column < args.wide;
      } else {
        const int unit = slot * args.units + local;
        column = k0 + e;
        from_row = int64_t(q) * args.hidden_size + unit;
        inside = unit < args.hidden_size && column < args.wide;
      }
      const float value = inside ? to_acc(args.from[from_row * args.wide + column]) : 0.0f;
      from_acc(value, args.to[j * kChunk + e]);
    }
  }
}

}  // namespace cuda
}  // namespace fastlstm

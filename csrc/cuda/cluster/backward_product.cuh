// The product of the backward pass in clusters: a CTA's rows of W_hh, in registers, times the
// dgates of a group, in shared memory. The sums go to the CTAs that own their units.
#pragma once

#include <type_traits>

#include "backward_shape.cuh"

namespace fastlstm {
namespace cuda {

#if FASTLSTM_SM90

template <class Shape>
class ClusterBackwardProduct {
  typedef typename Shape::S S;
  typedef typename Shape::Operand Operand;

 public:
  __device__ __forceinline__ ClusterBackwardProduct(const ClusterBackwardArgs<S>& args,
                                                    const S* w_hh, unsigned char* shared,
                                                    unsigned rank, uint32_t thread)
      : shared_(shared), rank_(rank), thread_(thread) {
    const int warp = thread / 32, lane = thread % 32;
    const int slice = warp * Shape::kSlices / Shape::kWarps;
    from_ = opaque(unsigned(slice * Shape::kWarpChunks * Shape::kChunkPitch +
                            lane % (4 * Shape::kSequences) * 16));
    stores_ = Shape::kSequences == 8 || lane % 4 < Shape::kSequences / 2;
    const int first_unit = int(rank) * Shape::kUnits;
    // Each CTA begins with the tiles of its own units: otherwise all would send to one CTA at a
    // time.
    const int first =
        int(rank) * (Shape::kUnits / 16) +
        (Shape::kStreams ? warp : warp % (Shape::kWarps / Shape::kSlices) * Shape::kWarpTiles);
    if constexpr (!Shape::kStreams) {
#pragma unroll
      for (int block = 0; block < Shape::kBlocks; ++block) {
        const int tile = tile_of(first, block * Shape::kBlockTiles);
        to_[block] = opaque(place_of(tile, int(rank) * Shape::kSlices + slice, lane));
        if constexpr (Shape::kCtas > 1) {
          peer_[block] = remote(shared, unsigned(tile * 16 / Shape::kUnits));
          peer_[block].address = opaque(peer_[block].address);
        }
      }
    }
    const int begin = first_unit + slice * Shape::kWarpChunks * Shape::kChunk + lane % 4;
    if (args.pairs)
      load_weights<true>(w_hh, args.units, begin, first);
    else
      load_weights<false>(w_hh, args.units, begin, first);
  }

  // This lane's first operand in the dgates at `dgates`; both are offsets in shared memory.
  __device__ __forceinline__ uint32_t operands(uint32_t dgates) const {
    return dgates + (Shape::kStreams ? thread_ % 32 * 16 : from_);
  }

  // One CTA, in which a warp has one tile: the product alone, and the stores of its sums. Callers
  // work in between, while tensor cores do.
  typedef float Sums[Shape::kChains][4];
  __device__ __forceinline__ void multiply(uint32_t at, Sums& sums) const {
    static_assert(Shape::kWarpTiles == 1 || Shape::kCtas > 1, "one tile");
    const unsigned char* const from = shared_ + at;
#pragma unroll
    for (int chain = 0; chain < Shape::kChains; ++chain)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[chain][e] = 0;
#pragma unroll
    for (int k = 0; k < Shape::kWarpChunks; ++k) {
      const uint4 chunk = *reinterpret_cast<const uint4*>(from + k * Shape::kChunkPitch);
      const uint32_t first[2] = {chunk.x, chunk.y}, second[2] = {chunk.z, chunk.w};
      mma(sums[2 * k % Shape::kChains], weights_[held(k, 0, 0)], first, Operand());
      mma(sums[(2 * k + 1) % Shape::kChains], weights_[held(k, 1, 0)], second, Operand());
    }
  }
  __device__ __forceinline__ void store(Sums& sums, int buffer) const {
#pragma unroll
    for (int chain = 1; chain < Shape::kChains; ++chain)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[0][e] += sums[chain][e];
    if (stores_)
      *reinterpret_cast<uint4*>(shared_ + to_[0] + buffer * Shape::kSumsBytes) = make_uint4(
          bits_of(sums[0][0]), bits_of(sums[0][1]), bits_of(sums[0][2]), bits_of(sums[0][3]));
  }

  // Multiplies the dgates (this lane's are at `at`) and sends the sums to buffer `buffer` of their
  // owners, whose mbarriers of that number count them.
  __device__ __forceinline__ void send(uint32_t at, int buffer) const {
    const unsigned char* const from = shared_ + at;
    auto load = [&](int k) {
      return *reinterpret_cast<const uint4*>(from + k * Shape::kChunkPitch);
    };
    uint4 chunks[Shape::kWarpChunks];
    if constexpr (!Shape::kStreams) {
#pragma unroll
      for (int k = 0; k < Shape::kWarpChunks; ++k) chunks[k] = load(k);
    }
    // Computed anew in every step, for the product leaves no registers: where all of a warp's sums
    // go in the CTAs that own them, and the first of those.
    uint32_t place = 0, owner = 0;
    if constexpr (Shape::kStreams) {
      uint32_t thread = thread_;
      pin(thread);
      const int tile = int(rank_ * (Shape::kUnits / 16) + thread / 32);
      place = place_of(tile, int(rank_), int(thread % 32));
      owner = tile * 16 / Shape::kUnits;
    }
    const unsigned barrier = unsigned(buffer) * sizeof(Mbarrier);
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block) {
      // Loads that the compiler cannot move above the stores of the previous block. Without them it
      // would send all sums after the last product. Streaming leaves no registers for chunks.
      if (!Shape::kStreams && block > 0) {
#pragma unroll
        for (int k = Shape::kWarpChunks / 2; k < Shape::kWarpChunks; ++k) chunks[k] = load(k);
      }
      float sums[Shape::kBlockTiles][Shape::kChains][4] = {};
#pragma unroll
      for (int k = 0; k < Shape::kWarpChunks; ++k) {
        uint4 streamed[Shape::kBlockTiles];
#pragma unroll
        for (int m = 0; m < Shape::kBlockTiles; ++m)
          if (in_shared(k, 1, block * Shape::kBlockTiles + m))
            streamed[m] = *shared_fragment(k, block * Shape::kBlockTiles + m);
        if constexpr (Shape::kStreams) chunks[k] = load(k);
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int m = 0; m < Shape::kBlockTiles; ++m) {
            const uint32_t b[2] = {half ? chunks[k].z : chunks[k].x,
                                   half ? chunks[k].w : chunks[k].y};
            const int tile = block * Shape::kBlockTiles + m;
            float (&sum)[4] = sums[m][(2 * k + half) % Shape::kChains];
            if (in_shared(k, half, tile)) {
              const uint4 a = streamed[m];
              const uint32_t left[4] = {a.x, a.y, a.z, a.w};
              mma(sum, left, b, Operand());
            } else {
              mma(sum, weights_[held(k, half, tile)], b, Operand());
            }
          }
      }
#pragma unroll
      for (int m = 0; m < Shape::kBlockTiles; ++m) {
#pragma unroll
        for (int chain = 1; chain < Shape::kChains; ++chain)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[m][0][e] += sums[m][chain][e];
        const float (&sum)[4] = sums[m][0];
        const uint4 value = make_uint4(__float_as_uint(sum[0]), __float_as_uint(sum[1]),
                                       __float_as_uint(sum[2]), __float_as_uint(sum[3]));
        if constexpr (Shape::kStreams) {
          const int next = (block * Shape::kBlockTiles + m) * Shape::kTileStride * 16;
          const Remote peer = remote(shared_, (owner + next / Shape::kUnits) % Shape::kCtas);
          send_async(peer + (place + buffer * Shape::kSumsBytes), value, peer + barrier);
          continue;
        }
        const uint32_t to = to_[block] + buffer * Shape::kSumsBytes + m * (16 * 8);
        send_async(peer_[block] + to, value, peer_[block] + barrier);
      }
    }
  }

 private:
  static constexpr int kRows = 4 / int(sizeof(S));  // of W_hh in a word of K

  // Where a lane's sums of a tile go in the CTA that owns them: units lane / 4 * 2 and the next, of
  // sequences lane % 4 * 2 and the next.
  __device__ __forceinline__ static uint32_t place_of(int tile, int source, int lane) {
    return uint32_t(Shape::kSumsAt + source * Shape::kSourceBytes + lane % 4 * (8 * Shape::kUnits) +
                    (tile * 16 % Shape::kUnits + lane / 4 * 2) * 8);
  }
  // Word w of chunk k, of which a step of an mma takes two: its unit, relative to this lane's
  // first, and its first gate. Words of a half type have two gates.
  __device__ __forceinline__ static constexpr int unit_at(int k, int w) {
    return k * Shape::kChunk + (sizeof(S) == 2 ? w / 2 * 4 : 0);
  }
  __device__ __forceinline__ static constexpr int gate_at(int w) {
    return sizeof(S) == 2 ? w % 2 * 2 : w;
  }
  __device__ __forceinline__ static int tile_of(int first, int j) {
    return (first + j * Shape::kTileStride) % Shape::kTiles;
  }
  __device__ __forceinline__ static int column_of(int first, int j) {
    return tile_of(first, j) * 16 + threadIdx.x % 32 / 4 * 2;
  }

  // Whether a fragment is in shared memory, and the number of one in registers.
  __device__ __forceinline__ static constexpr bool in_shared(int k, int half, int tile) {
    return half == 1 && k * Shape::kWarpTiles + tile < Shape::kSharedFragments;
  }
  __device__ __forceinline__ static constexpr int held(int k, int half, int tile) {
    const int seconds = k * Shape::kWarpTiles + (half == 1 ? tile : 0);  // before this one
    return (2 * k + half) * Shape::kWarpTiles + tile - min_of(seconds, Shape::kSharedFragments);
  }
  // A lane's 16 bytes of a fragment in shared memory, beside its neighbours'.
  __device__ __forceinline__ uint4* shared_fragment(int k, int tile) const {
    return reinterpret_cast<uint4*>(shared_ + Shape::kWeightsAt) +
           (k * Shape::kWarpTiles + tile) * 32 * Shape::kWarps + thread_;
  }
  // Puts a tile's weights in their place, those from chunk `chunk` on.
  template <int kCount>
  __device__ __forceinline__ void hold(int tile, int chunk, const uint32_t (&words)[kCount][2][4]) {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t (&a)[4] = words[j][half];
        if (in_shared(chunk + j, half, tile)) {
          *shared_fragment(chunk + j, tile) = make_uint4(a[0], a[1], a[2], a[3]);
        } else {
#pragma unroll
          for (int r = 0; r < 4; ++r) weights_[held(chunk + j, half, tile)][r] = a[r];
        }
      }
  }

  // Issues the loads of up to four chunks before it uses the first; where weights are streamed, of
  // two. kPairs: two neighbouring columns are aligned to their size.
  template <bool kPairs>
  __device__ __forceinline__ void load_weights(const S* w_hh, int units, int begin, int first) {
    constexpr int kTiles = Shape::kStreams || !kPairs ? 1 : Shape::kWarpTiles;
    constexpr int kCount = !kPairs ? 1 : min_of(Shape::kStreams ? 2 : 4, Shape::kWarpChunks);
    static_assert(Shape::kWarpChunks % kCount == 0, "whole parts");
#pragma unroll
    for (int from = 0; from < Shape::kWarpTiles; from += kTiles)
#pragma unroll
      for (int chunk = 0; chunk < Shape::kWarpChunks; chunk += kCount) {
        uint32_t words[kTiles][kCount][2][4];
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          load_words<kPairs>(w_hh, units, begin, column_of(first, from + j), chunk, words[j]);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          pair_words(units, begin, column_of(first, from + j), chunk, words[j]);
          hold(from + j, chunk, words[j]);
        }
        if constexpr (kCount < Shape::kWarpChunks) __syncwarp();  // the next loads stay behind it
      }
  }
  // Elements of a tile, in pairs of neighbouring columns.
  template <bool kPairs, int kCount>
  __device__ __forceinline__ static void load_words(const S* w_hh, int units, int begin, int column,
                                                    int chunk, uint32_t (&tile)[kCount][2][4]) {
    // Parts have no offsets in common, which would take registers.
    uint32_t size = uint32_t(units);
    pin(size);
    units = int(size);
    // Units of this CTA below H: no address of a padding row is formed.
    const int rows = column < units ? units - begin : 0;
    const S* const from = rows > 0 ? w_hh + int64_t(begin) * units + column : w_hh;
#pragma unroll
    for (int j = 0; j < kCount; ++j)
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        uint32_t (&words)[4] = tile[j][w / 2];
#pragma unroll
        for (int e = 0; e < kRows; ++e) {
          const int unit = unit_at(chunk + j, w);
          const S* const at = from + ((unit < rows ? unit : 0) + (gate_at(w) + e) * units) * units;
          uint32_t* const two = words + w % 2 * 2;  // of two columns
          if constexpr (!kPairs) {
            const uint32_t one = bits_of(at[0]);
            const uint32_t other = column + 1 < units ? bits_of(at[1]) : 0;
            if constexpr (sizeof(S) == 4)
              two[0] = one, two[1] = other;
            else
              two[e] = one | other << 16;
          } else if constexpr (sizeof(S) == 4) {
            const uint64_t both = *reinterpret_cast<const uint64_t*>(at);
            two[0] = uint32_t(both), two[1] = uint32_t(both >> 32);
          } else {
            two[e] = *reinterpret_cast<const uint32_t*>(at);
          }
        }
      }
  }
  // ... as pairs of gates of one column, or rounded to tf32; zero in padding.
  template <int kCount>
  __device__ __forceinline__ static void pair_words(int units, int begin, int column, int chunk,
                                                    uint32_t (&tile)[kCount][2][4]) {
    const int rows = column < units ? units - begin : 0;
#pragma unroll
    for (int j = 0; j < kCount; ++j)
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        uint32_t &x = tile[j][w / 2][w % 2 * 2], &y = tile[j][w / 2][w % 2 * 2 + 1];
        const bool inside = unit_at(chunk + j, w) < rows;
        if constexpr (sizeof(S) == 4) {
          x = inside ? round_tf32(x) : 0;
          y = inside ? round_tf32(y) : 0;
        } else {
          const uint32_t upper = inside ? x : 0, lower = inside ? y : 0;
          x = lower_halves(upper, lower);
          y = upper_halves(upper, lower);
        }
      }
  }

  unsigned char* shared_;
  uint32_t rank_, thread_, from_;  // from_: a lane's place in the dgates
  bool stores_;  // one CTA: whether this lane's columns are sequences of their own
  uint32_t weights_[Shape::kFragments - Shape::kSharedFragments][4];
  uint32_t to_[Shape::kBlocks];
  Remote peer_[Shape::kBlocks];
};

#endif  // FASTLSTM_SM90

}  // namespace cuda
}  // namespace fastlstm

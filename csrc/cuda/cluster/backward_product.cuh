// The product of the backward pass in clusters: a CTA's rows of W_hh, in registers, times the
// dgates of a group, in shared memory. The sums go to the CTAs that own their units.
#pragma once

#include <type_traits>

#include "backward_shape.cuh"

namespace fastlstm {
namespace cuda {

// A register's share of K for each of two neighbouring columns of a row-major matrix: rows unit and
// unit + 1 of a half type, or row unit rounded to tf32. Zero beyond its `units` rows and columns.
template <class S>
__device__ __forceinline__ void weight_words(const S* gate, int units, int unit, int column,
                                             uint32_t (&words)[2]) {
  words[0] = words[1] = 0;
  if (column >= units) return;
#pragma unroll
  for (int e = 0; e < 4 / int(sizeof(S)); ++e) {
    if (unit + e >= units) continue;
    const S* from = gate + int64_t(unit + e) * units + column;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (column + m >= units) continue;
      if constexpr (sizeof(S) == 4)
        words[m] = round_tf32(__float_as_uint(from[m]));
      else
        words[m] |= uint32_t(reinterpret_cast<const uint16_t*>(from)[m]) << 16 * e;
    }
  }
}

#if FASTLSTM_SM90

template <class Shape>
class ClusterBackwardProduct {
  typedef typename Shape::S S;
  typedef std::conditional_t<sizeof(S) == 4, RoundedFloat, S> Operand;

 public:
  __device__ __forceinline__ ClusterBackwardProduct(const ClusterBackwardArgs<S>& args,
                                                    const S* w_hh, unsigned char* shared,
                                                    unsigned rank)
      : shared_(shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int slice = warp * Shape::kSlices / kBackwardWarps;
    from_ = opaque(unsigned(slice * Shape::kWarpChunks * Shape::kChunkPitch + lane * 16));
    const int first_unit = int(rank) * Shape::kUnits;
    // Each CTA begins with the tiles of its own units: otherwise all would send to one CTA at a
    // time.
    const int first = int(rank) * (Shape::kUnits / 16) +
                      warp % (kBackwardWarps / Shape::kSlices) * Shape::kWarpTiles;
#pragma unroll
    for (int j = 0; j < Shape::kWarpTiles; j += Shape::kBlockTiles) {
      // A lane's sums of a block: units lane / 4 * 2 and the next, of sequences lane % 4 * 2 and
      // the next.
      const int tile = (first + j) % Shape::kTiles;
      const int source = int(rank) * Shape::kSlices + slice;
      to_[j / Shape::kBlockTiles] = opaque(
          unsigned(Shape::kSumsAt + source * Shape::kSourceBytes + lane % 4 * (8 * Shape::kUnits) +
                   (tile * 16 % Shape::kUnits + lane / 4 * 2) * 8));
      if constexpr (Shape::kCtas > 1) {
        Remote& peer = peer_[j / Shape::kBlockTiles];
        peer = remote(shared, unsigned(tile * 16 / Shape::kUnits));
        peer.address = opaque(peer.address);
      }
    }
    const S* const gate = w_hh + int64_t(lane % 4) * args.units * args.units;
    const int begin = first_unit + slice * Shape::kWarpChunks * Shape::kChunk;
    if (args.pairs)
      load_pairs(gate, args.units, begin, first);
    else
      load_elements(gate, args.units, begin, first);
  }

  // This lane's first operand in the dgates at `dgates`, as an offset in shared memory.
  __device__ __forceinline__ uint32_t operands(const unsigned char* dgates) const {
    return uint32_t(dgates - shared_) + from_;
  }

  // Multiplies the dgates (this lane's are at `at`) and sends the sums to buffer `buffer` of their
  // owners, whose mbarriers `arrived` count them.
  __device__ __forceinline__ void send(uint32_t at, int buffer, const Mbarrier* arrived) const {
    const unsigned char* const from = shared_ + at;
    auto load = [&](int k) {
      return *reinterpret_cast<const uint4*>(from + k * Shape::kChunkPitch);
    };
    uint4 chunks[Shape::kWarpChunks];
#pragma unroll
    for (int k = 0; k < Shape::kWarpChunks; ++k) chunks[k] = load(k);
    const unsigned barrier = unsigned(reinterpret_cast<const unsigned char*>(arrived) - shared_);
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block) {
      // Loads that the compiler cannot move above the stores of the previous block. Without them it
      // would send all sums after the last product.
      if (block > 0) {
#pragma unroll
        for (int k = Shape::kWarpChunks / 2; k < Shape::kWarpChunks; ++k) chunks[k] = load(k);
      }
      float sums[Shape::kBlockTiles][Shape::kChains][4] = {};
#pragma unroll
      for (int k = 0; k < Shape::kWarpChunks; ++k)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int m = 0; m < Shape::kBlockTiles; ++m) {
            const uint32_t b[2] = {half ? chunks[k].z : chunks[k].x,
                                   half ? chunks[k].w : chunks[k].y};
            mma(sums[m][(2 * k + half) % Shape::kChains],
                weights_[block * Shape::kBlockTiles + m][2 * k + half], b, Operand());
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
        const uint32_t to = to_[block] + buffer * Shape::kSumsBytes + m * (16 * 8);
        if constexpr (Shape::kCtas > 1)
          send_async(peer_[block] + to, value, peer_[block] + barrier);
        else
          *reinterpret_cast<uint4*>(shared_ + to) = value;
      }
    }
  }

 private:
  static constexpr int kRows = 4 / int(sizeof(S));  // of W_hh in a word of K

  // The first unit of word w of chunk k, relative to this warp's first unit.
  __device__ __forceinline__ static constexpr int unit_at(int k, int w) {
    return k * Shape::kChunk + w * Shape::kChunk / 4;
  }
  __device__ __forceinline__ static int column_of(int first, int j) {
    return (first + j) % Shape::kTiles * 16 + threadIdx.x % 32 / 4 * 2;
  }

  // Issues all loads before it uses the first.
  __device__ __forceinline__ void load_pairs(const S* gate, int units, int begin, int first) {
#pragma unroll
    for (int j = 0; j < Shape::kWarpTiles; ++j) {
      const int column = column_of(first, j);
      // Rows of this CTA below H: no address of a padding row is formed.
      const int rows = column < units ? units - begin : 0;
      const S* const from = rows > 0 ? gate + int64_t(begin) * units + column : gate;
#pragma unroll
      for (int k = 0; k < Shape::kWarpChunks; ++k)
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          uint32_t (&words)[4] = weights_[j][2 * k + w / 2];
#pragma unroll
          for (int e = 0; e < kRows; ++e) {
            const int unit = unit_at(k, w) + e;
            const S* const at = from + (unit < rows ? unit * units : 0);
            if constexpr (sizeof(S) == 4) {
              const uint64_t both = *reinterpret_cast<const uint64_t*>(at);
              words[w % 2 * 2] = uint32_t(both);
              words[w % 2 * 2 + 1] = uint32_t(both >> 32);
            } else {
              words[w % 2 * 2 + e] = *reinterpret_cast<const uint32_t*>(at);
            }
          }
        }
    }
#pragma unroll
    for (int j = 0; j < Shape::kWarpTiles; ++j) {
      const int rows = column_of(first, j) < units ? units - begin : 0;
#pragma unroll
      for (int k = 0; k < Shape::kWarpChunks; ++k)
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          uint32_t &x = weights_[j][2 * k + w / 2][w % 2 * 2],
                   &y = weights_[j][2 * k + w / 2][w % 2 * 2 + 1];
          if constexpr (sizeof(S) == 4) {
            const bool inside = unit_at(k, w) < rows;
            x = inside ? round_tf32(x) : 0;
            y = inside ? round_tf32(y) : 0;
          } else {
            const uint32_t upper = unit_at(k, w) < rows ? x : 0;
            const uint32_t lower = unit_at(k, w) + 1 < rows ? y : 0;
            x = (upper & 0xffff) | lower << 16;
            y = upper >> 16 | (lower & 0xffff0000);
          }
        }
    }
  }

  __device__ __forceinline__ void load_elements(const S* gate, int units, int begin, int first) {
#pragma unroll
    for (int j = 0; j < Shape::kWarpTiles; ++j)
#pragma unroll
      for (int k = 0; k < Shape::kWarpChunks; ++k)
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          uint32_t words[2];
          weight_words(gate, units, begin + unit_at(k, w), column_of(first, j), words);
          weights_[j][2 * k + w / 2][w % 2 * 2] = words[0];
          weights_[j][2 * k + w / 2][w % 2 * 2 + 1] = words[1];
        }
  }

  unsigned char* shared_;
  uint32_t from_;  // a lane's place in the dgates
  uint32_t weights_[Shape::kWarpTiles][2 * Shape::kWarpChunks][4];
  uint32_t to_[Shape::kBlocks];
  Remote peer_[Shape::kBlocks];
};

#endif  // FASTLSTM_SM90

}  // namespace cuda
}  // namespace fastlstm

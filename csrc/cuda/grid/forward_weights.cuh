// What the products of a forward CTA have in common, by tensor cores (forward_product.cuh) or by
// multiply-adds (forward_fp32.cuh): the weights on chip, and the h that they poll.
//
// K is split over the warps: slab k (64 bytes of every sequence's h) belongs to warp k % 8. So each
// element of h is read by one thread of a CTA. Weights are in blocks of 32 rows: the gates of eight
// units.
#pragma once

#include "phase.cuh"
#include "shapes.h"
#include "threads.cuh"

namespace fastlstm {
namespace cuda {

// The h that a product multiplies. It waits until the bits `check` of every word are those of
// `phase`; a product waits for nothing where `check` is 0.
struct HiddenOperand {
  const unsigned char* packets;  // this thread's first; null: zeros
  uint32_t phase, check;
};
// Sequences of a group, from `begin` to `end` - 1.
struct SequenceRange {
  int begin, end;
};

// A kernel's shape as a type.
template <int kShape>
struct TensorGrid {
  static constexpr GridShape kGrid = kGridForward[kShape];
};
template <int kShape>
struct Fp32Grid {
  static constexpr GridShape kGrid = kGridForwardFp32[kShape];
};

template <class Grid>
class GridForwardWeights {
 public:
  static constexpr GridShape kGrid = Grid::kGrid;
  static constexpr int kBlocks = kGrid.blocks(), kSequences = kGrid.sequences();

  // Fragments of this CTA: [slab][block][part][lane], 16 bytes each.
  __device__ __forceinline__ GridForwardWeights(const uint4* fragments, unsigned char* shared,
                                                int slabs)
      : warp_(warp_of_thread()), slabs_((slabs - warp_ + kGridWarps - 1) / kGridWarps) {
    const int warp = warp_, lane = lane_of_thread();
    auto from = [&](int block) {
      const int slab = block / kBlocks * kGridWarps + warp;
      return slab < slabs
                 ? fragments + (slab * kBlocks + block % kBlocks) * kGridBlockFragments + lane
                 : nullptr;
    };
#pragma unroll
    for (int block = 0; block < kGrid.register_blocks; ++block) {
      const uint4* source = from(block);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        register_weights_[block][j] = source ? source[j * 32] : make_uint4(0, 0, 0, 0);
    }
    const int shared_blocks = blocks_shared(kGrid, slabs);
    uint4* to =
        reinterpret_cast<uint4*>(shared) + warp * shared_blocks * kGridBlockFragments + lane;
    shared_weights_ = to;
    for (int block = 0; block < shared_blocks; ++block) {
      const uint4* source = from(kGrid.register_blocks + block);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (source) copy_async(to + block * kGridBlockFragments + j * 32, source + j * 32, 16);
    }
    commit_async();
  }

  // The offset of this thread's first packet in a place for h: [16 bytes of units][sequence].
  __device__ __forceinline__ int offset() const {
    const int lane = lane_of_thread();
    return ((warp_ * 4 + lane % 4) * kSequences + lane / 4) * 16;
  }

 protected:
  // That of the packet of the warp's slab k, from the first one's.
  __device__ __forceinline__ static int place(int k, int tile) {
    return (k * kGridWarps * 4 * kSequences + tile * 8) * 16;
  }
  // Part j of one of the warp's blocks of weights.
  __device__ __forceinline__ uint4 fragment(int block, int j) const {
    return block < kGrid.register_blocks
               ? register_weights_[block < kGrid.register_blocks ? block : 0][j]
               : shared_weights_[(block - kGrid.register_blocks) * kGridBlockFragments + j * 32];
  }

  uint4 register_weights_[kGrid.register_blocks][4];
  const uint4* shared_weights_;
  const int warp_, slabs_;  // slabs_: of this warp
};

}  // namespace cuda
}  // namespace fastlstm

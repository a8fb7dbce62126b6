// The products of the cluster kernels in fp32: multiply-adds with weights that stay in registers
// and, where those do not suffice, in shared memory.
//
// A thread owns eight rows of the left matrix and every kLanes-th column: neighbouring lanes share
// the rows and split K. It multiplies them by four columns of the right matrix (a plane: for each k
// four neighbouring floats, the values of four sequences). So each float that it loads feeds eight
// multiply-adds, while an SM makes four in the time of one such load. The lanes add up their sums
// by exchanging halves: of 32 sums each lane ends up with its share, always added in the same
// order. Where lanes divide rows, each has the rows that it keeps in front, by the order in which
// it loads their weights.
//
// Floor: 128 multiply-adds a cycle and SM. A CTA with 32 units and a group of 8 sequences needs
// 0.52 us a step at H = 128, 1.03 us at 256 and 2.07 us at 512 (at 1.98 GHz), besides the exchange.
#pragma once

#include "../shared/lane_sums.cuh"

namespace fastlstm {
namespace cuda {

constexpr int kFmaRows = 8, kFmaThreads = 256;  // rows of a thread, threads that compute
constexpr int kPlaneSums = 4 * kFmaRows;        // of a thread in a plane

// How kRows rows, with K of kDepth, are divided among threads: kLanes neighbours split K.
template <int kRows, int kDepth>
struct FmaSplit {
  static constexpr int kLanes = kFmaThreads * kFmaRows / kRows;
  static constexpr int kThreadDepth = kDepth / kLanes;
  static_assert(kLanes >= 4 && kLanes <= 32 && kDepth % kLanes == 0, "lanes split K");
};

#if FASTLSTM_SM90

// Layout has kRegisterDepth and kSharedDepth, a thread's columns by where their weights are; where
// column j stands in a plane, offset(j); kPlaneBytes from one plane to the next; and the order of a
// plane's sums, sum_of(row, sequence).
template <class Layout>
class FmaTile {
 public:
  // in_shared: for the weights that are not in registers.
  __device__ __forceinline__ FmaTile(unsigned char* in_shared, int thread)
      : shared_(reinterpret_cast<float4*>(in_shared) + thread) {}

  // Loads the weights: load(j, row) is that of a row in this thread's column j.
  template <class Load>
  __device__ __forceinline__ void load(Load&& load) {
#pragma unroll
    for (int j = 0; j < Layout::kRegisterDepth; ++j)
#pragma unroll
      for (int row = 0; row < kFmaRows; ++row) weights_[j][row] = load(j, row);
#pragma unroll 1
    for (int j = 0; j < Layout::kSharedDepth; ++j)
#pragma unroll
      for (int row = 0; row < kFmaRows; row += 4) {
        const int k = Layout::kRegisterDepth + j;
        *in_shared(j, row / 4) =
            make_float4(load(k, row), load(k, row + 1), load(k, row + 2), load(k, row + 3));
      }
  }

  // Multiplies kPlanes planes, of which this thread's first column begins at `from`.
  template <int kPlanes>
  __device__ __forceinline__ void multiply(const unsigned char* from,
                                           float (&sums)[kPlanes][kPlaneSums]) const {
#pragma unroll
    for (int j = 0; j < Layout::kRegisterDepth; ++j) multiply_column(from, j, weights_[j], sums);
#pragma unroll 2
    for (int j = 0; j < Layout::kSharedDepth; ++j) {
      const float4 a = *in_shared(j, 0), b = *in_shared(j, 1);
      const float weights[kFmaRows] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
      multiply_column(from, Layout::kRegisterDepth + j, weights, sums);
    }
  }

 private:
  __device__ __forceinline__ float4* in_shared(int j, int half) const {
    return shared_ + (2 * j + half) * kFmaThreads;
  }

  template <int kPlanes>
  __device__ __forceinline__ static void multiply_column(const unsigned char* from, int j,
                                                         const float (&weights)[kFmaRows],
                                                         float (&sums)[kPlanes][kPlaneSums]) {
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      const float4 four =
          *reinterpret_cast<const float4*>(from + Layout::offset(j) + p * Layout::kPlaneBytes);
      const float values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int row = 0; row < kFmaRows; ++row)
#pragma unroll
        for (int n = 0; n < 4; ++n) sums[p][Layout::sum_of(row, n)] += weights[row] * values[n];
    }
  }

  float4* shared_;
  float weights_[Layout::kRegisterDepth][kFmaRows];
};

#endif

}  // namespace cuda
}  // namespace fastlstm

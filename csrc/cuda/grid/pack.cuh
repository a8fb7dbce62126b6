// Packs what grid teams read before their first step: weights as fragments, h0 as packets.
#pragma once

#include "phase.cuh"
#include "shapes.h"

namespace fastlstm {
namespace cuda {

// A register of an operand: element(e) is its e-th element, rounded for tf32.
template <class Operand, class Element>
__device__ __forceinline__ uint32_t operand_word(Element&& element) {
  if constexpr (std::is_same_v<Operand, float>) {
    return bits_of(element(0));
  } else if constexpr (std::is_same_v<Operand, RoundedFloat>) {
    return round_tf32(bits_of(element(0)));
  } else {
    return bits_of(element(0)) | bits_of(element(1)) << 16;
  }
}

template <class S>
struct GridPackArgs {
  struct Direction {
    const S *w_hh, *h0;  // (4H, H), gates in PyTorch's order; (B, H) or null
    uint4 *fragments, *packets;
  } direction[2];
  GridShape shape;
  GridTeam team;
  int units, batch;                      // units: H
  int64_t fragment_count, packet_count;  // of a direction
};
// A thread packs 16 bytes; blockIdx.y is the direction.
template <class S, class Operand>
__global__ void __launch_bounds__(256, 4)
    team_pack_kernel(const __grid_constant__ GridPackArgs<S> args) {
  if constexpr (FASTLSTM_SM80) {
    constexpr int kPerWord = 4 / int(sizeof(S));
    constexpr bool kFp32 = std::is_same_v<Operand, float>;
    const auto& direction = args.direction[blockIdx.y];
    const int64_t packets = direction.h0 ? args.packet_count : 0;
    S zero;
    from_acc(0.0f, zero);
    for (int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x; j < args.fragment_count + packets;
         j += int64_t(gridDim.x) * 256) {
      uint32_t words[4];
      if (j < args.fragment_count) {
        const int lane = int(j % 32), part = int(j / 32 % 4),
                  block = int(j / kGridBlockFragments % args.shape.blocks());
        const int64_t rest = j / kGridBlockFragments / args.shape.blocks();
        const int slab = int(rest % args.team.slabs), slot = int(rest / args.team.slabs);
        const int unit = existing_unit(slot * args.shape.units + block * 8 + lane / 4, args.units);
        for (int w = 0; w < 4; ++w) {
          const int gate = kFp32 ? w : part % 2 * 2 + w % 2;
          const int in_piece = kFp32 ? part : part / 2 * 2 + w / 2;
          const int column = (slab * 16 + lane % 4 * 4 + in_piece) * kPerWord;
          const S* row = direction.w_hh + (int64_t(gate) * args.units + unit) * args.units;
          words[w] = operand_word<Operand>(
              [&](int e) { return column + e < args.units ? row[column + e] : zero; });
        }
        direction.fragments[j] = make_uint4(words[0], words[1], words[2], words[3]);
      } else {
        const int64_t packet = j - args.fragment_count, place = args.team.slot_bytes / 16;
        const int sequences = args.shape.sequences();
        const int64_t b = packet / place * sequences + packet % sequences;
        const S* row = direction.h0 + b * args.units;
        for (int w = 0; w < 4; ++w) {
          const int column = (int(packet % place / sequences) * 4 + w) * kPerWord;
          words[w] = operand_word<Operand>([&](int e) {
            return b < args.batch && column + e < args.units ? row[column + e] : zero;
          });
        }
        direction.packets[packet] = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

// W_hh transposed, as fragments of GridBackwardProduct or GridBackwardFp32Product.
template <class S>
struct GridTransposeArgs {
  const S* w_hh[2];  // of each direction (blockIdx.y)
  uint4* fragments[2];
  GridBackwardShape shape;
  GridBackwardTeam team;
  int units;
  int64_t count;  // of a direction
};
template <class S, class Operand>
__global__ void __launch_bounds__(256, 4)
    team_transpose_kernel(const __grid_constant__ GridTransposeArgs<S> args) {
  if constexpr (FASTLSTM_SM80) {
    const int slabs = args.shape.slabs(sizeof(S));
    S zero;
    from_acc(0.0f, zero);
    for (int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x; j < args.count;
         j += int64_t(gridDim.x) * 256) {
      const int lane = int(j % 32), step = int(j / 64 % 2), tile = int(j / 32 % 2);
      const int slab = int(j / kGridBlockFragments % slabs);
      const int64_t rest = j / kGridBlockFragments / slabs;
      const int block = int(rest % args.team.blocks), slot = int(rest / args.team.blocks);
      uint32_t words[4];
      for (int w = 0; w < 4; ++w) {
        constexpr bool half = sizeof(S) == 2, fp32 = std::is_same_v<Operand, float>;
        const int column = block * 32 + lane / 4 * 4 + (fp32 ? w : tile * 2 + w % 2);
        words[w] = operand_word<Operand>([&](int e) {
          const int gate = fp32 ? step * 2 + tile : half ? w / 2 * 2 + e : step * 2 + w / 2;
          const int unit = slot * args.shape.units +
                           (half ? slab * 8 + step * 4 + lane % 4 : slab * 4 + lane % 4);
          return unit < args.units && column < args.units
                     ? args.w_hh[blockIdx.y]
                                [(int64_t(gate) * args.units + unit) * args.units + column]
                     : zero;
        });
      }
      args.fragments[blockIdx.y][j] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

}  // namespace cuda
}  // namespace fastlstm

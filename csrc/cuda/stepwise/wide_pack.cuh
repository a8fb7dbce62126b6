// Packs the operands of wide steps (wide_step.cuh) in the order of mma's registers: W_hh, and h_0
// to both buffers between which h alternates. Units and sequences beyond the last are zero.
//
// W: [slot of 16 units][block of 16 columns][gate][lane][16 bytes]; lane 4 * g + c has units 2 g
// and 2 g + 1, columns 2 c, 2 c + 1 and those eight further on. h: see wide_place().
#pragma once

#include "wide_step.cuh"

namespace fastlstm {
namespace cuda {

template <class S>
struct WidePackArgs {
  const S *w_hh[2], *h0[2];  // by direction (blockIdx.y): (4H, H), (B, H) or null
  uint4 *weights[2], *h[2][2];
  int units, batch, blocks, sequences;
  int64_t weight_count, hidden_count;  // of 16 bytes
};

template <class S>
__global__ void __launch_bounds__(256, 4)
    wide_pack_kernel(const __grid_constant__ WidePackArgs<S> args) {
  const int d = blockIdx.y, units = args.units;
  // Elements (row, column) and (row, column + 1) of a matrix whose rows have H elements.
  const auto pair = [&](const S* from, int64_t row, int column, bool exists) {
    const auto element = [&](int k) {
      return exists && k < units ? bits_of(from[row * units + k]) : 0;
    };
    return lower_halves(element(column), element(column + 1));
  };
  for (int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
       j < args.weight_count + args.hidden_count; j += int64_t(gridDim.x) * 256) {
    const bool of_weights = j < args.weight_count;
    const int64_t at = of_weights ? j : j - args.weight_count;
    const int lane = int(at % 32), group = lane / 4, place = lane % 4;
    uint32_t words[4];
    if (of_weights) {
      const int gate = int(at / 32 % 4), block = int(at / 128 % args.blocks);
      const int first = int(at / 128 / args.blocks) * kWideUnits + 2 * group;
      for (int w = 0; w < 4; ++w) {
        const int unit = first + w % 2;
        words[w] = pair(args.w_hh[d], int64_t(gate) * units + unit,
                        block * 16 + 2 * place + w / 2 * 8, unit < units);
      }
      args.weights[d][at] = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
      const int64_t tile = at / 32, tiles = args.sequences / 16;
      const int first = int(tile / tiles / args.blocks) * args.sequences + int(tile % tiles) * 16;
      const int block = int(tile / tiles % args.blocks);
      for (int w = 0; w < 4; ++w) {
        const int sequence = first + w / 2 * 8 + group;
        words[w] = pair(args.h0[d], sequence, block * 16 + 2 * place + w % 2 * 8,
                        args.h0[d] && sequence < args.batch);
      }
      for (int buffer = 0; buffer < 2; ++buffer)
        args.h[d][buffer][at] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

}  // namespace cuda
}  // namespace fastlstm

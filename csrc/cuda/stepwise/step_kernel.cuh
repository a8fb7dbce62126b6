// The kernel of one time step: a product, with the step's own work fused before and behind it.
//
// What it computes: for each sum of the product of the step's operands (tile.cuh), initial() of the
// step before it and finish() behind it (forward_steps.cuh, backward_steps.cuh). Forward, that is
// h_{t-1} W_hh^T plus the input part, and the cell. Backward, it is the gradient of h_t, from
// dgates_{t+1} W_hh and from the layer above, and the gradient of the cell. With a projection, each
// is two launches: the product with W_hr is the second one forward and the first one backward.
//
// Who owns what: a CTA owns a tile of (rows of the batch) x (units or columns) for one direction
// (blockIdx.z). A thread owns whole cells, whose states no other thread touches.
//
// What moves per step: every CTA reads its rows of h and its columns of W from the L2 cache.
//
// When it begins: early (step_launcher.cuh). Before it waits for the kernel that computes h, it
// starts the copies of W's first stages and reads what initial() needs: no step writes either. Then
// the next step's kernel may begin, to do the same. GPUs without early kernels read h at once.
//
// Where cuBLAS is estimated to multiply faster (kLibraryTile), a step is a product by cuBLAS, kept
// in the accumulation type, and finish_kernel as a second launch. Floor: docs/kernels.md.
#pragma once

#include "tile.cuh"
#include "tiles.h"

namespace fastlstm {
namespace cuda {

template <class Step>
struct StepArgs;
template <template <class> class Step, class S>
struct StepArgs<Step<S>> {
  Operands<S> operands[2];  // by direction
  Step<S> step[2];
  int active[2];  // sequences in the step
};

template <class Tile, class Step>
__device__ __forceinline__ void step_of_tile(const StepArgs<Step>& args) {
  FASTLSTM_SHARED_BUFFER(shared);
  typedef typename Step::T T;
  const int d = blockIdx.z, first = blockIdx.y * Tile::kRows, active = args.active[d];
  if (first >= active) return;
  const Step& step = args.step[d];
  TileProduct<Tile> product(shared, args.operands[d], first, blockIdx.x * Tile::kColumns);
  product.begin_right();
  if constexpr (!FASTLSTM_SM90) product.begin_left();

  // A block is 32 columns: the gates of eight units, or any.
  const int block = blockIdx.x * Tile::kColumnWarps + product.column_warp;
  typename TileProduct<Tile>::Sums sums;
#pragma unroll
  for (int f = 0; f < Tile::kRowFrags; ++f)
#pragma unroll
    for (int q = 0; q < 4; ++q)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = first + product.row_of(f, e), place = product.place_of(e);
        const bool holds = product.holds_sums() && row < active;
        if constexpr (Step::kGates) {
          sums[f][q][e] = holds ? step.initial(row, block, q, place) : T(0);
        } else {
          const int column = block * 32 + q * 8 + place;
          sums[f][q][e] = holds && column < step.width ? step.initial(row, column) : T(0);
        }
      }
  wait_for_primary();
  start_dependents();
  if constexpr (FASTLSTM_SM90) product.begin_left();
  product.finish(sums);
  if (!product.holds_sums()) return;

#pragma unroll
  for (int f = 0; f < Tile::kRowFrags; ++f)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = first + product.row_of(f, e), place = product.place_of(e);
      if (row >= active) continue;
      if constexpr (Step::kGates) {
        const T pre[4] = {sums[f][0][e], sums[f][1][e], sums[f][2][e], sums[f][3][e]};
        step.finish(row, block, place, pre);
      } else {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const int column = block * 32 + q * 8 + place;
          if (column < step.width) step.finish(row, column, sums[f][q][e]);
        }
      }
    }
}

template <class Tile, class Step>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtas)
    step_kernel(const __grid_constant__ StepArgs<Step> args) {
  // A tile that no GPU of this architecture can hold is never launched there.
  if constexpr (FASTLSTM_SM80 || Tile::kSharedBytes <= kOldSharedBytes) step_of_tile<Tile>(args);
}

// What follows a product by cuBLAS. A thread owns a unit with its gates, or a column, of one
// sequence.
constexpr int kFinishThreads = 256;

template <class Step>
struct FinishArgs {
  typedef typename Step::T T;
  Step step[2];  // by direction
  int active[2];
  // Products, (rows, stride), gates in blocks of 32 as in tile.cuh; zero from row `rows` on.
  const T* product[2];
  int rows[2];
  int64_t stride;
};

template <class Step>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const __grid_constant__ FinishArgs<Step> args) {
  typedef typename Step::T T;
  wait_for_primary();
  start_dependents();
  const int d = blockIdx.z, row = blockIdx.x, j = blockIdx.y * kFinishThreads + threadIdx.x;
  if (row >= args.active[d]) return;
  const Step& step = args.step[d];
  const T* product = row < args.rows[d] ? args.product[d] + row * args.stride : nullptr;
  if constexpr (Step::kGates) {
    if (j >= step.units) return;
    const int block = j / 8, place = j % 8;
    T pre[4];
#pragma unroll
    for (int q = 0; q < 4; ++q)
      pre[q] =
          step.initial(row, block, q, place) + (product ? product[block * 32 + q * 8 + place] : 0);
    step.finish(row, block, place, pre);
  } else {
    if (j >= step.width) return;
    step.finish(row, j, step.initial(row, j) + (product ? product[j] : 0));
  }
}

}  // namespace cuda
}  // namespace fastlstm

// The kernel of one time step: a product, with the step's own work fused before and behind it.
//
// What it computes: for each sum of the product of the step's operands (tile.cuh), initial() of the
// step before it and finish() behind it (forward_steps.cuh, backward_steps.cuh). Forward, that is
// h_{t-1} W_hh^T plus the input part, and the cell. Backward, it is the gradient of h_t, from
// dgates_{t+1} W_hh and from the layer above, and the gradient of the cell. With a projection, each
// is two launches: the product with W_hr is the second one forward and the first one backward.
//
// Who owns what: a CTA owns a tile of (rows of the batch) x (units or columns) for one direction
// (blockIdx.z). Its sums pass through shared memory, so that a thread gets neighbouring cells,
// whose states no other thread touches: accesses of 16 bytes, and a short loop in place of a copy
// of the cell's code for each sum.
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

// What the step does with the sums of a tile: consecutive threads take consecutive columns.
template <int kCount, class Tile, class Step>
__device__ __forceinline__ void finish_tile(const TileProduct<Tile, Step::kGates>& product,
                                            const Step& step, int first, int active) {
  constexpr int kColumns = Tile::kColumns / Step::kGates, kPlaces = kColumns / kCount;
  const int rows = active - first < Tile::kRows ? active - first : Tile::kRows;
#pragma unroll 1
  for (int at = threadIdx.x; at < rows * kPlaces; at += Tile::kThreads) {
    const int row = at / kPlaces, place = at % kPlaces * kCount;
    const int column = blockIdx.x * kColumns + place;
    if (column >= step.width) continue;
    typename Step::T sums[Step::kGates][kCount];
    product.read(row, place, sums);
    step.finish(first + row, column, sums);
  }
}

template <class Tile, class Step>
__device__ __forceinline__ void step_of_tile(const StepArgs<Step>& args) {
  FASTLSTM_SHARED_BUFFER(shared);
  typedef typename Step::T T;
  typedef TileProduct<Tile, Step::kGates> Product;
  const int d = blockIdx.z, first = blockIdx.y * Tile::kRows, active = args.active[d];
  if (first >= active) return;
  const Step& step = args.step[d];
  Product product(shared, args.operands[d], first, blockIdx.x * Tile::kColumns);
  product.begin_right();
  if constexpr (!FASTLSTM_SM90) product.begin_left();

  // A block is 32 columns: the gates of eight units, or any.
  const int block = blockIdx.x * Tile::kColumnWarps + product.column_warp;
  typename Product::Sums sums;
#pragma unroll
  for (int f = 0; f < Tile::kRowFrags; ++f)
#pragma unroll
    for (int q = 0; q < 4; ++q)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = first + product.row_of(f, e), place = product.place_of(e);
        const bool begins = product.begins_sums() && row < active;
        if constexpr (Step::kGates == 4) {
          sums[f][q][e] = begins ? step.initial(row, block, q, place) : T(0);
        } else {
          const int column = block * 32 + q * 8 + place;
          sums[f][q][e] = begins && column < step.width ? step.initial(row, column) : T(0);
        }
      }
  wait_for_primary();
  start_dependents();
  if constexpr (FASTLSTM_SM90) product.begin_left();
  product.finish(sums);
  if (step.together())
    finish_tile<Step::kNeighbours>(product, step, first, active);
  else
    finish_tile<1>(product, step, first, active);
}

template <class Tile, class Step>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtas)
    step_kernel(const __grid_constant__ StepArgs<Step> args) {
  // A tile that no GPU of this architecture can hold is never launched there.
  if constexpr (FASTLSTM_SM80 || Tile::kSharedBytes <= kOldSharedBytes) step_of_tile<Tile>(args);
}

// What follows a product by cuBLAS. A thread owns kCount neighbouring units with their gates, or
// columns, of one sequence.
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

template <int kCount, class Step>
__global__ void __launch_bounds__(kFinishThreads, 1)
    finish_kernel(const __grid_constant__ FinishArgs<Step> args) {
  typedef typename Step::T T;
  wait_for_primary();
  start_dependents();
  const int d = blockIdx.z, row = blockIdx.x;
  const int column = (blockIdx.y * kFinishThreads + threadIdx.x) * kCount;
  const Step& step = args.step[d];
  if (row >= args.active[d] || column >= step.width) return;
  T sums[Step::kGates][kCount] = {};
  if (row < args.rows[d]) {
    const T* product = args.product[d] + row * args.stride;
#pragma unroll
    for (int q = 0; q < Step::kGates; ++q)
      load_neighbours(product + (Step::kGates == 4 ? column / 8 * 32 + q * 8 + column % 8 : column),
                      sums[q]);
  }
#pragma unroll
  for (int q = 0; q < Step::kGates; ++q)
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      if constexpr (Step::kGates == 4)
        sums[q][j] += step.initial(row, (column + j) / 8, q, (column + j) % 8);
      else
        sums[q][j] += step.initial(row, column + j);
  step.finish(row, column, sums);
}

}  // namespace cuda
}  // namespace fastlstm

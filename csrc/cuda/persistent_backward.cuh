// Persistent backward pass: one cooperative launch for all steps of one or several layers.
//
// What it computes: what the step kernel's CellStep computes (stepwise.cuh), for every step.
// Who owns what: as forward, but gathering dgates would move four times the bytes of h. So the
// units are divided into four quarters and the CTAs of a group into four rows of `columns` CTAs.
// CTA (k, j) owns `units` units of quarter k, and multiplies the dgates of quarter k (K) by the
// columns of W_hh that the four CTAs (0..3, j) own: a quarter of each one's sum. They exchange
// these quarters. The gradient of c stays in registers. Where several layers run at once (a
// wavefront), a lower layer's CTA (k, j) also multiplies quarter k of the upper layer's dgates of
// the same time by those columns of the upper layer's W_ih that the CTAs (0..3, j) own: the same
// exchange carries both. What moves per step: dgates of one quarter (as many bytes as h; in a
// wavefront, also those of the layer above) and three partial sums, each followed by a signal. How
// many places they need:
// - dgates that a lower layer reads: a fresh place for every step, for that layer may be any number
//   of steps behind and signals nothing upwards.
// - other dgates: two that take turns. A CTA that stores those of step s has seen `ready` >= s of
//   its whole row, and every CTA of the row raised it after it had multiplied those of step s - 2.
// - partial sums: two that take turns. A CTA that sends those of step s has received its partners'
//   of step s - 1, and each partner sent them after it had read those of step s - 2. (In step 0 a
//   layer without one above sends nothing, and step 2 has nothing to overwrite.)
// Floor: docs/kernels.md. No figure measured yet.
#pragma once

#include "dropout.h"
#include "persistent.cuh"
#include "rows.cuh"

namespace fastlstm {
namespace cuda {

// One layer and direction of a launch.
template <class S>
struct PersistentGradient {
  typedef Acc<S> T;
  const S* weights[kMaxSources];  // fragments: W_hh, and W_ih of the layer above
  S* exchange;                    // dgates: (places, 4, B, wide)
  int places;
  // A wavefront's layer above, whose exchange has a place for every step; or null.
  const S* above;
  const unsigned* above_ready;
  DropoutArgs dropout;     // between the two
  float2* partial;         // (2, groups, slots, 4, blocks, 32)
  unsigned *ready, *sent;  // (groups, slots): steps whose dgates, and whose partial sums, are there
  const S* grad_output;    // this direction's columns, or null
  const T* upper_input;    // likewise
  const S *grad_h_n, *grad_c_n, *c0;
  const S* gates;
  const T *cells, *grad_cells;  // grad_cells may be null
  S *dgates, *grad_c0;
  int direction;
};

template <class S>
struct PersistentGradientArgs {
  PersistentGradient<S> cell[kMaxCells];  // of a wavefront: the uppermost layer first
  // CTAs: cells * active * 4 * columns, for the groups of sequences from first_group on.
  int cells, groups, active, first_group, columns;
  int steps, batch, units, quarter;  // units: H
  int64_t wide, output_wide, dgates_wide;
  uint64_t limit;
};

template <class S>
struct alignas(4 * sizeof(S)) FourGates {
  S value[4];
};

// Waits until the other three CTAs of a column have sent `count` times.
__device__ __forceinline__ void wait_for_partners(const unsigned* sent, int columns, int part,
                                                  unsigned count, uint64_t limit) {
  const int k = threadIdx.x % 32;
  if (k < 4 && k != part) {
    const Patience patience(limit);
    while (poll_acquire(sent + k * columns) < count) patience.check();
  }
  __syncwarp();
}

template <class S, int kUnits, int kTiles>
__device__ __forceinline__ void persistent_backward(const PersistentGradientArgs<S>& args) {
  typedef Acc<S> T;
  typedef SlicedProduct<S, kUnits, kTiles> Product;
  FASTLSTM_SHARED_BUFFER(shared);
  constexpr PersistentShape kShape = {kUnits, kTiles};
  constexpr int kRounds = Product::kRounds;
  const int slots = 4 * args.columns, slot = blockIdx.x % slots;
  const int group = args.first_group + blockIdx.x / slots % args.active;
  const PersistentGradient<S>& cell = args.cell[blockIdx.x / slots / args.active];
  const int part = slot / args.columns, column = slot % args.columns;
  const int share = (args.batch + args.groups - 1) / args.groups, first = group * share;
  const int rows = min_of(args.batch - first, share), units = args.units;
  const int slabs = int(args.wide / Product::kSlab) / kPersistentWarps;
  const int slice = int(args.wide) / kPersistentWarps, begin = Product::warp() * slice;
  const int weights = int(weight_bytes(kShape, args.wide * int(sizeof(S))));

  const Product product(shared + partial_bytes(kShape), shared);
  for (int j = 0; j < (cell.above ? 2 : 1); ++j)
    product.load(cell.weights[j] + int64_t(slot) * (weights / int(sizeof(S))), weights,
                 j * weights);
  unsigned* const ready = cell.ready + group * slots;
  unsigned* const sent = cell.sent + group * slots;
  // The partial sums for CTA (q, column) from CTA (k, column).
  auto partial = [&](int s, int q, int k) {
    const int64_t to = (int64_t(s % 2) * args.groups + group) * slots + q * args.columns + column;
    return cell.partial + (to * 4 + k) * Product::kBlocks * 32 + Product::lane();
  };
  // Where this part's dgates of step s begin, in an exchange of so many places.
  auto place = [&](int s, int places) {
    return ((int64_t(s % places) * 4 + part) * args.batch + first) * args.wide;
  };
  T dc[kRounds][2];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) dc[r][0] = dc[r][1] = 0;
  Product::barrier();

  const bool drops = cell.dropout.threshold != 0;
  const uint32_t key = drops ? dropout_key(*cell.dropout.seed, cell.dropout.layer, 0) : 0;
  for (int s = 0; s < args.steps; ++s) {
    const int t = cell.direction == 0 ? args.steps - 1 - s : s;
    const int before = cell.direction == 0 ? t - 1 : t + 1;
    // What does not depend on other CTAs comes first, so that the waits hide its latency.
    T act[kRounds][2][4], c[kRounds][2], c_prev[kRounds][2], dh[kRounds][2];
#pragma unroll
    for (int r = 0; r < kRounds; ++r)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int block = r * kPersistentWarps + Product::warp();
        const int unit = part * args.quarter + column * kUnits + Product::unit_of(block);
        const int row = Product::row_of(block, e);
        const bool inside = block < Product::kBlocks && unit < units && row < rows;
        const int64_t at = int64_t(t) * args.batch + first + row;
        const int64_t own = int64_t(first + row) * units + unit;
#pragma unroll
        for (int q = 0; q < 4; ++q)
          act[r][e][q] = inside ? to_acc(cell.gates[(at * 4 + q) * units + unit]) : T(0);
        c[r][e] = inside ? cell.cells[at * units + unit] : T(0);
        c_prev[r][e] = dh[r][e] = 0;
        if (!inside) continue;
        c_prev[r][e] = s + 1 < args.steps
                           ? cell.cells[(int64_t(before) * args.batch + first + row) * units + unit]
                           : value_or_zero(cell.c0, own);
        if (cell.grad_output) dh[r][e] = to_acc(cell.grad_output[at * args.output_wide + unit]);
        if (cell.upper_input) dh[r][e] = cell.upper_input[at * args.output_wide + unit];
        if (s == 0) {
          dh[r][e] += value_or_zero(cell.grad_h_n, own);
          dc[r][e] = value_or_zero(cell.grad_c_n, own);
        }
        if (cell.grad_cells) dc[r][e] += cell.grad_cells[at * units + unit];
      }

    if (s > 0 || cell.above) {
      typename Product::Sums sums = {};
      // The layer above is ahead: its product comes before the wait for this layer's own dgates.
      if (cell.above) {
        const int row_of_group = group * slots + part * args.columns;
        wait_for({cell.above_ready + row_of_group, args.columns, 4 * kUnits}, begin, begin + slice,
                 s + 1, args.limit);
        product.add(sums, weights, cell.above + place(s, args.steps), args.wide, rows, slabs);
        // Dropout acts on each element, and the sum is linear: on this part of it as on the whole.
        if (drops)
          Product::each(sums, [&](int q, int unit, int row, float& value) {
            const bool keep =
                dropout_keeps(dropout_row(key, t, first + row),
                              q * args.quarter + column * kUnits + unit, cell.dropout.threshold);
            value = keep ? value * float(cell.dropout.scale) : 0.0f;
          });
      }
      if (s > 0) {
        wait_for({ready + part * args.columns, args.columns, 4 * kUnits}, begin, begin + slice, s,
                 args.limit);
        product.add(sums, 0, cell.exchange + place(s - 1, cell.places), args.wide, rows, slabs);
      }
      float mine[kRounds][2];
      product.finish(sums, [&](int r, int block, const float (&values)[4][2]) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          if (q == part) {
            mine[r][0] = values[q][0], mine[r][1] = values[q][1];
          } else {
            partial(s, q, part)[block * 32] = make_float2(values[q][0], values[q][1]);
          }
        }
      });
      publish(sent + slot, s + 1);
      wait_for_partners(sent + column, args.columns, part, s + 1, args.limit);
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        const int block = r * kPersistentWarps + Product::warp();
        if (block >= Product::kBlocks) continue;
        float sum[2] = {0, 0};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          float2 from = make_float2(mine[r][0], mine[r][1]);
          if (k != part) from = partial(s, part, k)[block * 32];
          sum[0] += from.x, sum[1] += from.y;
        }
        dh[r][0] += sum[0], dh[r][1] += sum[1];
      }
    }

    CellBackward<T> d[kRounds][2];
#pragma unroll
    for (int r = 0; r < kRounds; ++r)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int block = r * kPersistentWarps + Product::warp();
        const int local = column * kUnits + Product::unit_of(block);
        const int row = Product::row_of(block, e);
        d[r][e] = cell_backward<Math<T>>(act[r][e][0], act[r][e][1], act[r][e][2], act[r][e][3],
                                         c_prev[r][e], c[r][e], dh[r][e], dc[r][e]);
        dc[r][e] = d[r][e].c_prev;
        if (block >= Product::kBlocks || row >= rows) continue;
        FourGates<S> four;  // of a unit beyond H: zeros, for its gates are
        from_acc(d[r][e].a_i, four.value[0]);
        from_acc(d[r][e].a_f, four.value[1]);
        from_acc(d[r][e].a_g, four.value[2]);
        from_acc(d[r][e].a_o, four.value[3]);
        S* to = cell.exchange + place(s, cell.places) + row * args.wide + 4 * local;
        *reinterpret_cast<FourGates<S>*>(to) = four;
      }
    publish(ready + slot, s + 1);

#pragma unroll
    for (int r = 0; r < kRounds; ++r)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int block = r * kPersistentWarps + Product::warp();
        const int unit = part * args.quarter + column * kUnits + Product::unit_of(block);
        const int row = Product::row_of(block, e);
        if (block >= Product::kBlocks || unit >= units || row >= rows) continue;
        S* to = cell.dgates + (int64_t(t) * args.batch + first + row) * args.dgates_wide + unit;
        from_acc(d[r][e].a_i, to[0]);
        from_acc(d[r][e].a_f, to[units]);
        from_acc(d[r][e].a_g, to[2 * units]);
        from_acc(d[r][e].a_o, to[3 * units]);
        if (s + 1 == args.steps && cell.grad_c0)
          from_acc(d[r][e].c_prev, cell.grad_c0[int64_t(first + row) * units + unit]);
      }
  }
}

template <class S, int kUnits, int kTiles>
__global__ void __launch_bounds__(kPersistentThreads, 1)
    persistent_backward_kernel(const __grid_constant__ PersistentGradientArgs<S> args) {
  if constexpr (FASTLSTM_SM80) persistent_backward<S, kUnits, kTiles>(args);
}

}  // namespace cuda
}  // namespace fastlstm

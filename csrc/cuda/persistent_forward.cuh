// Persistent forward pass: one cooperative launch for all steps of one or several layers.
//
// What it computes: what the step kernel computes (stepwise.cuh), for every step.
// Who owns what: the batch is split into groups that never meet. In a group, a CTA owns `units`
// units of one layer and direction: their weights stay in shared memory, their cell states in
// registers. Where several layers run at once (a wavefront), an upper layer's CTAs multiply two
// sources, the layer below at step t and their own h of step t - 1.
// What moves per step: h, through a buffer with a fresh place for every step, so that nobody
// overwrites what another CTA still reads and one one-way wait a step is enough.
// Floor: docs/kernels.md. No figure measured yet.
#pragma once

#include "dropout.h"
#include "persistent.cuh"
#include "rows.cuh"

namespace fastlstm {
namespace cuda {

// One layer and direction of a launch.
template <class S>
struct PersistentCell {
  typedef Acc<S> T;
  // Source 0 is this cell's own h, source 1 the layer below's: (steps + 1, B, wide), h0 first.
  const S* source[kMaxSources];
  const S* weights[kMaxSources];  // fragments
  const unsigned* flags[kMaxSources];
  int sources;
  S* h;           // source 0, and what the layer above reads: the same, or dropped out
  S* dropped;     // or null
  unsigned* own;  // flags
  DropoutArgs dropout;
  int direction;

  const T* start;    // as in GatesStep; null for a layer whose input is a source
  const int* index;  // or null
  const T* bias;     // or null
  const S* c0;
  S *y, *gates, *h_n, *c_n;  // gates: (rows, 4H) or null
  T* cells;
};

template <class S>
struct PersistentArgs {
  PersistentCell<S> cell[kMaxCells];
  // CTAs: cells * active * slots, for the groups of sequences from first_group on.
  int cells, groups, active, first_group, slots;
  int steps, batch, units;  // units: H
  int64_t wide, y_wide;     // of a source's row and of y's
  uint64_t limit;           // nanoseconds that a wait may take; 0: any
};

template <class S, int kUnits, int kTiles>
__device__ __forceinline__ void persistent_forward(const PersistentArgs<S>& args) {
  typedef Acc<S> T;
  typedef SlicedProduct<S, kUnits, kTiles> Product;
  FASTLSTM_SHARED_BUFFER(shared);
  constexpr PersistentShape kShape = {kUnits, kTiles};
  const int slot = blockIdx.x % args.slots;
  const int group = args.first_group + blockIdx.x / args.slots % args.active;
  const PersistentCell<S>& cell = args.cell[blockIdx.x / args.slots / args.active];
  const int share = (args.batch + args.groups - 1) / args.groups, first = group * share;
  const int rows = min_of(args.batch - first, share), units = args.units;
  const int slabs = int(args.wide / Product::kSlab) / kPersistentWarps;
  const int slice = int(args.wide) / kPersistentWarps, begin = Product::warp() * slice;
  const int source_bytes = int(weight_bytes(kShape, args.wide * int(sizeof(S))));

  const Product product(shared + partial_bytes(kShape), shared);
  for (int j = 0; j < cell.sources; ++j)
    product.load(cell.weights[j] + int64_t(slot) * (source_bytes / int(sizeof(S))), source_bytes,
                 j * source_bytes);
  T c[Product::kRounds][2];
#pragma unroll
  for (int r = 0; r < Product::kRounds; ++r)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int block = r * kPersistentWarps + Product::warp();
      const int unit = slot * kUnits + Product::unit_of(block), row = Product::row_of(block, e);
      const bool inside = block < Product::kBlocks && unit < units && row < rows;
      c[r][e] = inside ? value_or_zero(cell.c0, int64_t(first + row) * units + unit) : T(0);
    }
  Product::barrier();

  const unsigned* own = cell.flags[0] + group * args.slots;
  const uint32_t key = cell.dropped ? dropout_key(*cell.dropout.seed, cell.dropout.layer, 0) : 0;
  for (int s = 0; s < args.steps; ++s) {
    const int t = cell.direction == 0 ? s : args.steps - 1 - s;
    // What does not depend on other CTAs comes first, so that the wait hides its latency.
    T pre[Product::kRounds][4][2];
#pragma unroll
    for (int r = 0; r < Product::kRounds; ++r)
#pragma unroll
      for (int q = 0; q < 4; ++q)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int block = r * kPersistentWarps + Product::warp();
          const int unit = slot * kUnits + Product::unit_of(block), row = Product::row_of(block, e);
          pre[r][q][e] = 0;
          if (block >= Product::kBlocks || unit >= units || row >= rows) continue;
          if (cell.bias) pre[r][q][e] = cell.bias[q * units + unit];
          if (cell.start == nullptr) continue;
          const int64_t at = int64_t(t) * args.batch + first + row;
          pre[r][q][e] += cell.start[((cell.index ? cell.index[at] : at) * 4 + q) * units + unit];
        }

    typename Product::Sums sums = {};
    // The layer below is ahead: its product comes before the wait for this layer's own h.
    if (cell.sources > 1) {
      wait_for({cell.flags[1] + group * args.slots, args.slots, kUnits}, begin, begin + slice,
               s + 1, args.limit);
      product.add(sums, source_bytes,
                  cell.source[1] + (int64_t(s + 1) * args.batch + first) * args.wide, args.wide,
                  rows, slabs);
    }
    if (s > 0) wait_for({own, args.slots, kUnits}, begin, begin + slice, s, args.limit);
    product.add(sums, 0, cell.source[0] + (int64_t(s) * args.batch + first) * args.wide, args.wide,
                rows, slabs);

    CellForward<T> out[Product::kRounds][2];
    product.finish(sums, [&](int r, int block, const float (&values)[4][2]) {
      const int unit = slot * kUnits + Product::unit_of(block);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        out[r][e] = cell_forward<Math<T>>(pre[r][0][e] + values[0][e], pre[r][1][e] + values[1][e],
                                          pre[r][2][e] + values[2][e], pre[r][3][e] + values[3][e],
                                          c[r][e]);
        c[r][e] = out[r][e].c;
        const int row = Product::row_of(block, e);
        if (unit >= units || row >= rows) continue;
        const int64_t at = (int64_t(s + 1) * args.batch + first + row) * args.wide + unit;
        from_acc(out[r][e].h, cell.h[at]);
        if (cell.dropped == nullptr) continue;
        const bool keep =
            dropout_keeps(dropout_row(key, t, first + row), unit, cell.dropout.threshold);
        // What upper layers see is the stored h, dropped and rounded again, as everywhere.
        S stored;
        from_acc(out[r][e].h, stored);
        from_acc(keep ? to_acc(stored) * T(cell.dropout.scale) : T(0), cell.dropped[at]);
      }
    });
    // First of all the signal: a release waits for every write before it.
    publish(cell.own + group * args.slots + slot, s + 1);

#pragma unroll
    for (int r = 0; r < Product::kRounds; ++r)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int block = r * kPersistentWarps + Product::warp();
        const int unit = slot * kUnits + Product::unit_of(block), row = Product::row_of(block, e);
        if (block >= Product::kBlocks || unit >= units || row >= rows) continue;
        const int64_t at = int64_t(t) * args.batch + first + row;
        from_acc(out[r][e].h, cell.y[at * args.y_wide + unit]);
        if (cell.gates) {
          S* to = cell.gates + at * 4 * units + unit;
          from_acc(out[r][e].i, to[0]);
          from_acc(out[r][e].f, to[units]);
          from_acc(out[r][e].g, to[2 * units]);
          from_acc(out[r][e].o, to[3 * units]);
          cell.cells[at * units + unit] = out[r][e].c;
        }
        if (s == args.steps - 1) {
          const int64_t last = int64_t(first + row) * units + unit;
          from_acc(out[r][e].h, cell.h_n[last]);
          from_acc(out[r][e].c, cell.c_n[last]);
        }
      }
  }
}

template <class S, int kUnits, int kTiles>
__global__ void __launch_bounds__(kPersistentThreads, 1)
    persistent_forward_kernel(const __grid_constant__ PersistentArgs<S> args) {
  if constexpr (FASTLSTM_SM80) persistent_forward<S, kUnits, kTiles>(args);
}

}  // namespace cuda
}  // namespace fastlstm

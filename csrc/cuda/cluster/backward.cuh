// The backward pass in thread-block clusters: one launch runs all steps of a layer, both directions
// side by side.
//
// What it computes: what CellBackwardStep computes (stepwise/backward_steps.cuh), for every step.
//
// Who owns what: a cluster of kCtas CTAs takes one or two groups of eight sequences through all
// their steps; a CTA that is alone has a loop of its own, and may take a group of four
// (backward_alone.cuh). A CTA owns kUnits units: their cells, and their 4 * kUnits rows of W_hh,
// every column, as mma fragments in registers (in fp32 without tf32: backward_fp32.cuh). A
// computing thread owns one or two cells of a group of eight; their dc stays in its registers.
//
// What moves per step of a group: four further warps, the movers, copy the gates, c and the
// incoming gradients into a stage, kStages steps ahead, and store dgates to global memory one step
// behind. A CTA's dgates stay in the CTA: it multiplies its rows of W_hh, transposed, by them, and
// sends each CTA the partial sums of the units that this one owns (16 bytes from each lane, right
// after each block of the product). The owner adds the partial sums of all CTAs in a fixed order.
// So a CTA receives 32 * kUnits bytes from each CTA, itself included. What a cell needs besides the
// sums is computed before they arrive. A single CTA exchanges nothing. Where the product has fewer
// tiles than there are warps, several warps split the K of a tile, and each is a source of sums of
// its own.
//
// The dgates of a step are in shared memory cell by cell, the four gates of a cell side by side:
// one store of the cell, and what lane (sequence, unit) of an mma needs for a k-step of it. 16
// bytes serve two k-steps: two cells of a half type, or one whose four gates are floats. The movers
// turn them into rows of gates. fp32 has planes of four sequences instead.
//
// Exchange s follows step s. Exchange -1, before the first step, has ended when the kernel begins:
// its sums are zero, or what an earlier launch handed on. So every step is like the others.
//
// Why no buffer is overwritten too early. Barrier s is the barrier of all warps (cta_barrier)
// between the cells and the product of step s of a group.
// - Sums, two buffers in turn: a peer sends exchange s + 2 after it received exchange s + 1, hence
//   after every warp of this CTA sent its part of that, hence after barrier s + 1. All threads
//   arrived there after they had added the sums of exchange s.
// - `arrived`, two mbarriers in turn: thread 0 re-arms that of exchange s before barrier s + 1,
//   hence before a byte of exchange s + 2 can arrive. Every thread that will wait for exchange s +
//   2 has seen the end of exchange s by then.
// - dgates, two buffers in turn: products and movers read those of step s before they arrive at
//   barrier s + 1; cells overwrite them in step s + 2.
// - Stages: cells of step s read the stage of step s, and c of that of step s + 1. Movers arrive at
//   barrier s - 1 after their copies into both have arrived, and refill the stage of step s after
//   barrier s.
// - The last step sends nothing, or what it sends is received as well: no CTA exits while bytes are
//   in flight to it.
//
// Steps of which others of the same sequences come before (layers.cuh): the last step here sends as
// any other, and the owners keep the sums and dc, for the launch of the steps before to begin with.
// Floor: the exchange. What arrives at an SM takes about 0.22 us and 26 ns for each KB (measured on
// an H200 with a prototype): 0.43 us a step at H = 256, 0.65 us at H = 512.
#pragma once

#include "backward_alone.cuh"

namespace fastlstm {
namespace cuda {

#if FASTLSTM_SM90

template <class Shape>
__device__ __forceinline__ void compute_gradients(const ClusterBackwardCta<Shape>& cta) {
  typedef typename Shape::S S;
  constexpr int kGroups = Shape::kGroups, kCells = Shape::kCells;
  const ClusterBackwardArgs<S>& args = cta.args;
  const ClusterBackwardDirection<S>& layer = cta.layer;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, units = args.units;

  const uint32_t thread = opaque(threadIdx.x);
  const BackwardProduct<Shape> product(args, layer.w_hh, cta.shared, unsigned(cta.rank), thread);

  // A warp has the cells of two sequences and 16 units: it reads 128 contiguous bytes of sums.
  uint32_t row = warp / Shape::kSpread * 2 + lane % 2;
  uint32_t first_local = warp % Shape::kSpread * 16 + lane / 2;
  auto local_of = [&](int e) { return int(first_local) + Shape::kCellStride * e; };
  auto inside = [&](int e) { return cta.first_unit() + local_of(e) < units; };
  // Where weights are streamed the product leaves no registers for places: they are computed anew
  // before it and after it.
  uint32_t thread_cell = opaque(row * 256 + first_local);
  auto locate = [&] {
    if constexpr (Shape::kStreams) {
      pin(thread_cell);
      row = thread_cell / 256, first_local = thread_cell % 256;
    }
  };
  if constexpr (Shape::kStreams)
    locate();
  else
    row = opaque(row), first_local = opaque(first_local);
  CellPlaces<Shape> places(row, first_local);
  if constexpr (!Shape::kStreams) places.keep();

  auto sequence_of = [&](int g) { return cta.first_sequence + Shape::kSequences * g + int(row); };
  auto goes_on = [&](int g) { return sequence_of(g) < args.going_on; };
  GradientSpan spans[kGroups];
  int exchanges[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    spans[g] = gradient_span(cta, g, sequence_of(g));
    exchanges[g] = Shape::kStreams ? cta.exchanges(g) : int(opaque(cta.exchanges(g)));
  }
  const bool plain = layer.rules.plain, upper = layer.upper_input != nullptr;

  float dc[kGroups][kCells] = {}, dh_zoneout[kGroups][kCells] = {};
  auto place_of = [&](int g, int e) {
    return int64_t(sequence_of(g)) * units + cta.first_unit() + local_of(e);
  };
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
#pragma unroll
    for (int e = 0; e < kCells; ++e)
      if (goes_on(g) && inside(e)) {
        dc[g][e] = layer.dc[place_of(g, e)];
        dh_zoneout[g][e] = value_or_zero(layer.dh_zoneout, place_of(g, e));
      }
  // The sums of the exchange before the first, all of them the first source's.
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
#pragma unroll
    for (int e = 0; e < kCells; ++e)
      if (goes_on(g) && inside(e)) {
        unsigned char* const to = cta.shared + cta.sums_at(g, -1) + places.sum;
        reinterpret_cast<float*>(to)[2 * Shape::kCellStride * e] = layer.sums[place_of(g, e)];
      }
  cta_barrier(cta);  // the first stages are there
  for (int s = 0; s < cta.length[0]; ++s) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (s >= cta.length[g]) continue;
      locate();
      if constexpr (Shape::kStreams) places = CellPlaces<Shape>(row, first_local);

      // What does not depend on other CTAs.
      PreparedCells<Shape> cells;
      prepare_cells(
          cta, places, g, s, spans[g], plain, upper, sequence_of(g), cta.first_unit() + local_of(0),
          dc[g], dh_zoneout[g], [&](int e) { return place_of(g, e); }, inside, cells);

      uint32_t sums_at = cta.sums_at(g, s - 1) + places.sum;
      uint32_t to_at = cta.dgates_at(g, s) + places.dgates;
      uint32_t operands_at = product.operands(cta.dgates_at(g, s));
      pin(sums_at), pin(to_at), pin(operands_at);
      // A sequence that enters adds no sums: they would hand it a NaN of the weights.
      uint32_t taken[kCells];
#pragma unroll
      for (int e = 0; e < kCells; ++e) {
        taken[e] = s > spans[g].enter && inside(e) ? ~0u : 0;
        pin(taken[e]);
      }

      wait(cta.arrived(g, s - 1), unsigned(s) / 2 % 2, args.limit);
      float sums[kCells];
#pragma unroll
      for (int e = 0; e < kCells; ++e) sums[e] = sum_at_owner<Shape>(cta.shared + sums_at, e);
      if (thread == 0 && s + 1 < exchanges[g])
        arrive_expecting(cta.arrived(g, s + 1), Shape::kSumsBytes);

      finish_cells(cells, sums, taken, dc[g], dh_zoneout[g], cta.shared + to_at);
      cta_barrier(cta);
      if (s < exchanges[g]) product.send(operands_at, 2 * g + s % 2);

      if (s == spans[g].leave) {
        locate();
#pragma unroll
        for (int e = 0; e < kCells; ++e) {
          if (!inside(e)) continue;
          const int64_t at = place_of(g, e);
          if (args.hands_on)
            layer.dc[at] = dc[g][e];
          else if (layer.grad_c0)
            from_acc(dc[g][e], layer.grad_c0[at]);
          if (layer.dh_zoneout) layer.dh_zoneout[at] = dh_zoneout[g][e];
        }
      }
    }
  }
  if (!args.hands_on) return;
  locate();
  if constexpr (Shape::kStreams) places = CellPlaces<Shape>(row, first_local);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int last = cta.length[g] - 1;
    if (last < 0) continue;
    wait(cta.arrived(g, last), unsigned(last + 1) / 2 % 2, args.limit);
#pragma unroll
    for (int e = 0; e < kCells; ++e) {
      const float sum = sum_at_owner<Shape>(cta.shared + cta.sums_at(g, last) + places.sum, e);
      if (spans[g].enter != kNever && inside(e)) layer.sums[place_of(g, e)] = sum;
    }
  }
}

template <class Shape>
__device__ __forceinline__ void cluster_backward(
    const ClusterBackwardArgs<typename Shape::S>& args) {
  constexpr int kGroups = Shape::kGroups, kCtas = Shape::kCtas;
  FASTLSTM_SHARED_BUFFER(shared);
  int rank = 0;
  if constexpr (kCtas > 1) rank = int(cluster_rank());
  const int cluster = blockIdx.x / kCtas;
  ClusterBackwardCta<Shape> cta{args,
                                args.direction[cluster / args.clusters],
                                shared,
                                rank,
                                cluster % args.clusters * Shape::kSequences * kGroups,
                                {}};
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
    cta.length[g] = args.steps.length_of(cta.first_sequence + Shape::kSequences * g);

  if (threadIdx.x == 0) {
    for (int g = 0; g < kGroups; ++g)
      for (int j = 0; j < 2; ++j) init(cta.arrived(g, j), 1);
    publish_mbarriers();
    // Exchange s follows every step but the last. That before the first step has ended.
    for (int g = 0; kCtas > 1 && g < kGroups; ++g) {
      if (cta.exchanges(g) > 0) arrive_expecting(cta.arrived(g, 0), Shape::kSumsBytes);
      arrive(cta.arrived(g, 1));
    }
  }
  auto clear = [&](uint32_t from, int bytes) {
    uint4* const words = reinterpret_cast<uint4*>(shared + from);
    for (int j = threadIdx.x; j < bytes / 16; j += Shape::kThreads)
      words[j] = make_uint4(0, 0, 0, 0);
  };
  clear(Shape::kStagesAt, Shape::kSharedBytes - Shape::kStagesAt);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) clear(cta.sums_at(g, -1), Shape::kSumsBytes);
  __syncthreads();
  if constexpr (kCtas > 1) cluster_barrier();

  if (threadIdx.x < 32 * Shape::kWarps) {
    if constexpr (Shape::kMovesRegisters) raise_registers<Shape::kComputingRegisters>();
    if constexpr (kCtas == 1)
      compute_gradients_alone(cta);
    else
      compute_gradients(cta);
  } else {
    if constexpr (Shape::kMovesRegisters) lower_registers<Shape::kMoverRegisters>();
    move_gradients(cta);
  }
}
#endif  // FASTLSTM_SM90

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    cluster_backward_kernel(const __grid_constant__ ClusterBackwardArgs<typename Shape::S> args) {
#if FASTLSTM_SM90
  cluster_backward<Shape>(args);
#endif
}

}  // namespace cuda
}  // namespace fastlstm

// The backward pass in thread-block clusters: one launch runs all steps of a layer, both directions
// side by side.
//
// What it computes: what CellBackwardStep computes (stepwise/backward_steps.cuh), for every step.
//
// Who owns what: a cluster of kCtas CTAs takes one or two groups of eight sequences through all
// their steps. A CTA owns kUnits units: their cells, and their 4 * kUnits rows of W_hh, every
// column, as mma fragments in registers. A computing thread owns kUnits / 32 cells of a group;
// their dc stays in its registers.
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
// The dgates of a step are in shared memory in chunks of 16 bytes: one gate of one sequence, kChunk
// neighbouring units. Lane (sequence, gate) of an mma needs exactly such a chunk for two of its
// k-steps, and a 16-byte store takes one to global memory.
//
// Why no buffer is overwritten too early. Exchange s follows step s. Barrier s is the barrier of
// all warps (cta_barrier) between the cells and the product of step s of a group.
// - Sums, two buffers in turn: a peer sends exchange s + 2 after it received exchange s + 1, hence
//   after every warp of this CTA sent its part of that, hence after barrier s + 1. All threads
//   arrived there after they had added the sums of exchange s.
// - `arrived`, two mbarriers in turn: thread 0 re-arms that of exchange s before barrier s + 1,
// hence
//   before a byte of exchange s + 2 can arrive. Every thread that will wait for exchange s + 2 has
//   seen the end of exchange s by then.
// - dgates, two buffers in turn: products and movers read those of step s before they arrive at
//   barrier s + 1; cells overwrite them in step s + 2.
// - Stages: cells of step s read the stage of step s, and c of that of step s + 1. Movers arrive at
//   barrier s - 1 after their copies into both have arrived, and refill the stage of step s after
//   barrier s.
// - The last step sends nothing, and a CTA receives all that was sent to it before its last step:
// no
//   CTA exits while bytes are in flight to it.
// Floor: the exchange. What arrives at an SM takes about 0.22 us and 26 ns for each KB (measured on
// an H200 with a prototype): 0.43 us a step at H = 256, 0.65 us at H = 512.
#pragma once

#include "backward_movers.cuh"
#include "backward_product.cuh"

namespace fastlstm {
namespace cuda {

// Stores what the product reads: for tf32 rounded.
template <class S>
__device__ __forceinline__ void store_operand(float x, S& to) {
  if constexpr (sizeof(S) == 4)
    to = __uint_as_float(round_tf32(__float_as_uint(x)));
  else
    from_acc(x, to);
}

template <int kCount>
__device__ __forceinline__ float sum_of(const float* values) {
  if constexpr (kCount == 1)
    return values[0];
  else
    return sum_of<kCount / 2>(values) + sum_of<kCount - kCount / 2>(values + kCount / 2);
}

#if FASTLSTM_SM90

template <class Shape>
__device__ __forceinline__ void compute_gradients(const ClusterBackwardCta<Shape>& cta) {
  typedef typename Shape::S S;
  constexpr int kGroups = Shape::kGroups, kCells = Shape::kCells, kCtas = Shape::kCtas;
  const ClusterBackwardArgs<S>& args = cta.args;
  const ClusterBackwardDirection<S>& layer = cta.layer;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, units = args.units;

  const ClusterBackwardProduct<Shape> product(args, layer.w_hh, cta.shared, unsigned(cta.rank));

  // A warp has the cells of two sequences and 16 units: it reads 128 contiguous bytes of sums.
  const int row = warp / 2 * 2 + lane % 2, first_local = warp % 2 * 16 + lane / 2;
  auto local_of = [&](int e) { return first_local + 32 * e; };
  auto inside = [&](int e) { return cta.first_unit() + local_of(e) < units; };
  const unsigned gate_at = opaque(row * Shape::kGateStride + first_local * int(sizeof(S)));
  const unsigned state_at = opaque(row * Shape::kStateStride + first_local * 4);
  const unsigned above_at =
      opaque(Shape::kGradOutputAt + row * Shape::kStateStride + first_local * int(sizeof(S)));
  const unsigned sum_at = opaque(row / 2 * (8 * Shape::kUnits) + first_local * 8 + row % 2 * 4);
  const unsigned dgates_at = opaque(first_local / Shape::kChunk * Shape::kChunkPitch + row * 64 +
                                    first_local % Shape::kChunk * int(sizeof(S)));
  constexpr int kNextDgates = 32 / Shape::kChunk * Shape::kChunkPitch;  // to the unit 32 further

  // The first and the last step of this thread's sequence of a group.
  int enters[kGroups], leaves[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int steps = args.steps.length_of(cta.first_sequence + 8 * g + row);
    enters[g] = steps == 0 ? cta.length[g] : layer.direction == 0 ? cta.length[g] - steps : 0;
    leaves[g] = steps == 0 ? -1 : layer.direction == 0 ? cta.length[g] - 1 : steps - 1;
  }
  const bool plain = layer.rules.plain, upper = layer.upper_input != nullptr;

  float dc[kGroups][kCells] = {}, dh_zoneout[kGroups][kCells] = {};
  cta_barrier(cta);  // the first stages are there
  for (int s = 0; s < cta.length[0]; ++s) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (s >= cta.length[g]) continue;
      const bool entering = s == enters[g], leaving = s == leaves[g];
      const int b = cta.first_sequence + 8 * g + row;

      // What does not depend on other CTAs. Stages are zero where a sequence has not entered, in
      // padding and where there is no gradient. Results of a sequence that has left are not used.
      float dh[kCells], dc_state[kCells], dc_kept[kCells];
      CellFactors<float> factors[kCells];
      const unsigned char* const stage = cta.stage(g, s);
      const unsigned char* const next = cta.stage(g, s + 1);
#pragma unroll
      for (int e = 0; e < kCells; ++e) {
        float act[4];
#pragma unroll
        for (int q = 0; q < 4; ++q)
          act[q] = to_acc(
              reinterpret_cast<const S*>(stage + gate_at + q * (8 * Shape::kGateStride))[32 * e]);
        auto state = [&](const unsigned char* of, int at) {
          return reinterpret_cast<const float*>(of + state_at + at)[32 * e];
        };
        const float c = state(stage, Shape::kStatesAt);
        float c_prev = state(next, Shape::kStatesAt);
        dh[e] = dh_zoneout[g][e] +
                (upper ? state(stage, Shape::kGradOutputAt)
                       : to_acc(reinterpret_cast<const S*>(stage + above_at)[32 * e]));
        float d = dc[g][e];
        const int unit = cta.first_unit() + local_of(e);
        const int64_t at = int64_t(b) * units + unit;
        if (leaving) c_prev = inside(e) ? value_or_zero(layer.c0, at) : 0;
        if (entering && inside(e)) {
          d = value_or_zero(layer.grad_c_n, at);
          dh[e] += value_or_zero(layer.grad_h_n, at);
        }
        d += state(stage, Shape::kGradStatesAt);
        CellFactors<float>& x = factors[e];
        if (plain)
          x = cell_factors<FastMath>(act[0], act[1], act[2], act[3], c_prev, c);
        else
          x = cell_factors<FastMath>(act[0], act[1], act[2], act[3], c_prev, c,
                                     layer.rules.at(layer.rules.row(cta.time(g, s), b), unit));
        dc_state[e] = d * x.state_c;
        dc_kept[e] = d * x.c_kept;
        pin(x.state_h), pin(x.a_i), pin(x.a_f), pin(x.a_g), pin(x.a_o), pin(x.c_prev);
        pin(x.h_prev), pin(dc_state[e]), pin(dc_kept[e]), pin(dh[e]);
      }

      uint32_t sums_at = uint32_t(cta.sums(g, s - 1) - cta.shared) + sum_at;
      uint32_t to_at = uint32_t(cta.dgates(g, s) - cta.shared) + dgates_at;
      uint32_t operands_at = product.operands(cta.dgates(g, s));
      pin(sums_at), pin(to_at), pin(operands_at);
      // A sequence that enters adds no sums: they would hand it a NaN of the weights.
      const bool takes = s > enters[g];

      if (s > 0) {
        if constexpr (kCtas > 1) {
          wait(cta.arrived(g, s - 1), (s - 1) / 2 % 2, args.limit);
        } else {
          named_barrier(2, 32 * kBackwardWarps);
        }
        const unsigned char* const from = cta.shared + sums_at;
#pragma unroll
        for (int e = 0; e < kCells; ++e) {
          float parts[Shape::kSources];
#pragma unroll
          for (int k = 0; k < Shape::kSources; ++k)
            parts[k] = reinterpret_cast<const float*>(from + k * Shape::kSourceBytes)[64 * e];
          const float sum = sum_of<Shape::kSources>(parts);
          dh[e] += takes && inside(e) ? sum : 0.0f;
        }
        if (kCtas > 1 && threadIdx.x == 0 && s + 2 < cta.length[g])
          arrive_expecting(cta.arrived(g, s + 1), Shape::kSumsBytes);
      }

      unsigned char* const to = cta.shared + to_at;
#pragma unroll
      for (int e = 0; e < kCells; ++e) {
        const CellFactors<float>& x = factors[e];
        const float d_state = dh[e] * x.state_h + dc_state[e];
        const float d[4] = {d_state * x.a_i, d_state * x.a_f, d_state * x.a_g, dh[e] * x.a_o};
        dc[g][e] = d_state * x.c_prev + dc_kept[e];
        dh_zoneout[g][e] = dh[e] * x.h_prev;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          unsigned char* const place = to + e * kNextDgates + q * 16;
          store_operand(d[q], *reinterpret_cast<S*>(place));
          if constexpr (sizeof(S) == 4) *reinterpret_cast<S*>(place + Shape::kStoredAt) = d[q];
        }
      }
      cta_barrier(cta);
      if (s + 1 < cta.length[g]) product.send(operands_at, 2 * g + s % 2, cta.arrived(g, s));

      if (leaving) {
#pragma unroll
        for (int e = 0; e < kCells; ++e) {
          if (!inside(e)) continue;
          const int64_t at = int64_t(b) * units + cta.first_unit() + local_of(e);
          if (layer.grad_c0) from_acc(dc[g][e], layer.grad_c0[at]);
          if (layer.dh_zoneout) layer.dh_zoneout[at] = dh_zoneout[g][e];
        }
      }
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
  ClusterBackwardCta<Shape> cta{args, args.direction[cluster / args.clusters], shared,
                                rank, cluster % args.clusters * 8 * kGroups,   {}};
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
    cta.length[g] = args.steps.length_of(cta.first_sequence + 8 * g);

  if (threadIdx.x == 0) {
    for (int g = 0; g < kGroups; ++g)
      for (int j = 0; j < 2; ++j) init(cta.arrived(g, j), 1);
    publish_mbarriers();
    // Exchange s follows every step but the last.
    for (int g = 0; g < kGroups; ++g)
      for (int j = 0; j < 2; ++j)
        if (kCtas > 1 && j + 1 < cta.length[g])
          arrive_expecting(cta.arrived(g, j), Shape::kSumsBytes);
  }
  uint4* const stages = reinterpret_cast<uint4*>(shared + Shape::kStagesAt);
  for (int j = threadIdx.x; j < (Shape::kSharedBytes - Shape::kStagesAt) / 16;
       j += kBackwardThreads)
    stages[j] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  if constexpr (kCtas > 1) cluster_barrier();

  if (threadIdx.x < 32 * kBackwardWarps) {
    if constexpr (Shape::kMovesRegisters) raise_registers<Shape::kComputingRegisters>();
    compute_gradients(cta);
  } else {
    if constexpr (Shape::kMovesRegisters) lower_registers<Shape::kMoverRegisters>();
    move_gradients(cta);
  }
}
#endif  // FASTLSTM_SM90

template <class Shape>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    cluster_backward_kernel(const __grid_constant__ ClusterBackwardArgs<typename Shape::S> args) {
#if FASTLSTM_SM90
  cluster_backward<Shape>(args);
#endif
}

}  // namespace cuda
}  // namespace fastlstm

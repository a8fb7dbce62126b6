// The backward kernel in clusters where one CTA holds all of a layer's recurrent weights: it
// exchanges nothing, so a step waits for its sums, its dgates and its product alone. What the cells
// of the next step need besides the sums is computed while tensor cores multiply.
//
// Step s of a computing warp: barrier: the sums of exchange s - 1 are there | cells, dgates |
// barrier s, with the movers | product | prepare the cells of step s + 1 | store the sums.
//
// Why no buffer is overwritten too early: as backward.cuh says, and
// - Sums of exchange s: stored behind barrier s, when all had added those of exchange s - 2 and, in
//   the other buffer, s - 1. They are read behind the first barrier of step s + 1.
// - Stages: cells of step s + 1 are prepared behind barrier s, at which movers arrived after their
//   copies into the stages of steps s + 1 and s + 2 had; and ahead of barrier s + 1, behind which
//   they refill that of step s + 1.
#pragma once

#include "backward_cells.cuh"

namespace fastlstm {
namespace cuda {

#if FASTLSTM_SM90

template <class Shape>
__device__ __forceinline__ void compute_gradients_alone(const ClusterBackwardCta<Shape>& cta) {
  typedef typename Shape::S S;
  constexpr int kCells = Shape::kCells, kStride = Shape::kCellStride;
  static_assert(Shape::kCtas == 1 && Shape::kGroups == 1 && !Shape::kStreams, "one CTA");
  const ClusterBackwardArgs<S>& args = cta.args;
  const ClusterBackwardDirection<S>& layer = cta.layer;
  const int units = args.units, length = cta.length[0];

  const uint32_t thread = opaque(threadIdx.x);
  const BackwardProduct<Shape> product(args, layer.w_hh, cta.shared, 0, thread);

  // A warp has the cells of two sequences and 16 units: it reads 128 contiguous bytes of sums.
  const int row = opaque(thread / 32 / Shape::kSpread * 2 + thread % 2);
  const int unit = opaque(thread / 32 % Shape::kSpread * 16 + thread % 32 / 2);
  const int sequence = cta.first_sequence + row;
  auto inside = [&](int e) { return unit + kStride * e < units; };
  auto place_of = [&](int e) { return int64_t(sequence) * units + unit + kStride * e; };
  CellPlaces<Shape> places{uint32_t(row), uint32_t(unit)};
  places.keep();

  const GradientSpan span = gradient_span(cta, 0, sequence);
  const int exchanges = opaque(cta.exchanges(0));
  const bool goes_on = sequence < args.going_on;
  const bool plain = opaque(layer.rules.plain), upper = opaque(layer.upper_input != nullptr);

  float dc[kCells] = {}, dh_zoneout[kCells] = {};
#pragma unroll
  for (int e = 0; e < kCells; ++e)
    if (goes_on && inside(e)) {
      dc[e] = layer.dc[place_of(e)];
      dh_zoneout[e] = value_or_zero(layer.dh_zoneout, place_of(e));
      // The sums of the exchange before the first, all of them the first source's.
      unsigned char* const to = cta.shared + cta.sums_at(0, -1) + places.sum;
      reinterpret_cast<float*>(to)[2 * kStride * e] = layer.sums[place_of(e)];
    }
  auto all_sums_there = [] { named_barrier(2, 32 * Shape::kWarps); };

  PreparedCells<Shape> cells;
  auto prepare = [&](int s) {
    prepare_cells(cta, places, 0, s, span, plain, upper, sequence, unit, dc, dh_zoneout, place_of,
                  inside, cells);
  };
  // Four cells leave no registers for sums that wait: they are prepared behind the product.
  constexpr bool kOverlaps = kCells <= 2;
  cta_barrier(cta);  // the first stages are there
  if (kOverlaps && length > 0) prepare(0);
  for (int s = 0; s < length; ++s) {
    if (!kOverlaps) prepare(s);
    const uint32_t sums_at = cta.sums_at(0, s - 1) + places.sum,
                   to_at = cta.dgates_at(0, s) + places.dgates;
    uint32_t operands_at = product.operands(cta.dgates_at(0, s));
    pin(operands_at);
    // A sequence that enters adds no sums: they would hand it a NaN of the weights.
    uint32_t taken[kCells];
#pragma unroll
    for (int e = 0; e < kCells; ++e) taken[e] = s > span.enter && inside(e) ? ~0u : 0;

    all_sums_there();
    float sums[kCells];
#pragma unroll
    for (int e = 0; e < kCells; ++e) sums[e] = sum_at_owner<Shape>(cta.shared + sums_at, e);
    finish_cells(cells, sums, taken, dc, dh_zoneout, cta.shared + to_at);
    cta_barrier(cta);

    // Behind the last step there may be no exchange: its sums are then not stored.
    typename BackwardProduct<Shape>::Sums products;
    product.multiply(operands_at, products);
    if (s == span.leave) {
#pragma unroll
      for (int e = 0; e < kCells; ++e) {
        if (!inside(e)) continue;
        const int64_t at = place_of(e);
        if (args.hands_on)
          layer.dc[at] = dc[e];
        else if (layer.grad_c0)
          from_acc(dc[e], layer.grad_c0[at]);
        if (layer.dh_zoneout) layer.dh_zoneout[at] = dh_zoneout[e];
      }
    }
    if (kOverlaps && s + 1 < length) prepare(s + 1);
    if (s < exchanges) product.store(products, s % 2);
  }
  if (!args.hands_on || length == 0) return;
  all_sums_there();
#pragma unroll
  for (int e = 0; e < kCells; ++e) {
    const float sum = sum_at_owner<Shape>(cta.shared + cta.sums_at(0, length - 1) + places.sum, e);
    if (span.enter != kNever && inside(e)) layer.sums[place_of(e)] = sum;
  }
}

#endif

}  // namespace cuda
}  // namespace fastlstm

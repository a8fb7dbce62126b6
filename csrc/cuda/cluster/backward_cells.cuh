// The cells of the backward kernel in clusters: where a thread's cells have their values, what is
// computed of a step before the sums are there, and what with them.
#pragma once

#include "backward_fp32.cuh"
#include "backward_movers.cuh"
#include "backward_product.cuh"

namespace fastlstm {
namespace cuda {

template <int kCount>
__device__ __forceinline__ float sum_of(const float* values) {
  if constexpr (kCount == 1)
    return values[0];
  else
    return sum_of<kCount / 2>(values) + sum_of<kCount - kCount / 2>(values + kCount / 2);
}

#if FASTLSTM_SM90

// By tensor cores or, in full fp32, by multiply-adds.
template <class Shape>
using BackwardProduct =
    std::conditional_t<std::is_same_v<typename Shape::Operand, float>,
                       ClusterBackwardFp32Product<Shape>, ClusterBackwardProduct<Shape>>;

// Where a thread's first cell has its values, in bytes: in a stage its gates, c and the gradient
// from above; its sums, and its dgates.
template <class Shape>
struct CellPlaces {
  uint32_t gate, state, above, sum, dgates;

  __device__ __forceinline__ CellPlaces(uint32_t row, uint32_t local) {
    constexpr uint32_t kBytes = sizeof(typename Shape::S);
    gate = row * Shape::kGateStride + local * kBytes;
    state = row * Shape::kStateStride + local * 4;
    above = Shape::kGradOutputAt + row * Shape::kStateStride + local * kBytes;
    sum = row / 2 * (8 * Shape::kUnits) + local * 8 + row % 2 * 4;
    dgates = Shape::operand_at(int(local), int(row));
  }
  // In registers from here on.
  __device__ __forceinline__ void keep() {
    gate = opaque(gate), state = opaque(state), above = opaque(above);
    sum = opaque(sum), dgates = opaque(dgates);
  }
};

// A sequence's steps in this launch: the one that it enters in, or -1 where it has had steps in an
// earlier launch, or kNever; and the last, or -1.
constexpr int kNever = 0x7fffffff;
struct GradientSpan {
  int enter, leave;
};

template <class Shape>
__device__ __forceinline__ GradientSpan gradient_span(const ClusterBackwardCta<Shape>& cta, int g,
                                                      int sequence) {
  const int steps = cta.args.steps.length_of(sequence);
  const int first = cta.layer.direction == 0 ? cta.length[g] - steps : 0;
  return {steps == 0                     ? kNever
          : sequence < cta.args.going_on ? -1
                                         : first,
          steps == 0 ? -1 : first + steps - 1};
}

// What a thread's cells of a step need besides the sums.
template <class Shape>
struct PreparedCells {
  float dh[Shape::kCells], dc_state[Shape::kCells], dc_kept[Shape::kCells];
  CellFactors<float> factors[Shape::kCells];
};

// Prepares step s of group g. place_of(e) is that of a cell in (B, H), inside(e) whether there is
// one. Stages are zero where a sequence has not entered, in padding and where there is no gradient.
// Results of a sequence that has left are not used.
template <class Shape, class Place, class Inside>
__device__ __forceinline__ void prepare_cells(
    const ClusterBackwardCta<Shape>& cta, const CellPlaces<Shape>& places, int g, int s,
    const GradientSpan& span, bool plain, bool upper, int sequence, int unit,
    const float (&dc)[Shape::kCells], const float (&dh_zoneout)[Shape::kCells], Place&& place_of,
    Inside&& inside, PreparedCells<Shape>& cells) {
  typedef typename Shape::S S;
  typedef CellMath<typename Shape::Operand> Cell;
  constexpr int kCells = Shape::kCells, kStride = Shape::kCellStride;
  const ClusterBackwardDirection<S>& layer = cta.layer;
  const bool entering = s == span.enter, leaving = s == span.leave;
  float act[kCells][4], c[kCells], c_prev[kCells], d[kCells];
  float (&dh)[kCells] = cells.dh;
  const unsigned char* const stage = cta.stage(g, s);
  const unsigned char* const next = cta.stage(g, s + 1);
#pragma unroll
  for (int e = 0; e < kCells; ++e) {
#pragma unroll
    for (int q = 0; q < 4; ++q)
      act[e][q] = to_acc(reinterpret_cast<const S*>(stage + places.gate +
                                                    q * (8 * Shape::kGateStride))[kStride * e]);
    auto state = [&](const unsigned char* of, int at) {
      return reinterpret_cast<const float*>(of + places.state + at)[kStride * e];
    };
    c[e] = state(stage, Shape::kStatesAt);
    c_prev[e] = state(next, Shape::kStatesAt);
    dh[e] = dh_zoneout[e] +
            (upper ? state(stage, Shape::kGradOutputAt)
                   : to_acc(reinterpret_cast<const S*>(stage + places.above)[kStride * e]));
    d[e] = dc[e] + state(stage, Shape::kGradStatesAt);
  }
  if (entering || leaving) {
#pragma unroll
    for (int e = 0; e < kCells; ++e) {
      const int64_t at = place_of(e);
      if (leaving)
        c_prev[e] = !inside(e)       ? 0
                    : layer.c_before ? layer.c_before[at]
                                     : value_or_zero(layer.c0, at);
      if (entering && inside(e)) {
        d[e] += value_or_zero(layer.grad_c_n, at);
        dh[e] += value_or_zero(layer.grad_h_n, at);
      }
    }
  }
  auto factors_of = [&](auto&& rules_of) {
#pragma unroll
    for (int e = 0; e < kCells; ++e)
      cells.factors[e] = cell_factors<Cell>(act[e][0], act[e][1], act[e][2], act[e][3], c_prev[e],
                                            c[e], rules_of(e));
  };
  if (plain) {
    factors_of([](int) { return PlainCell(); });
  } else {
    const RuleRow drawn = layer.rules.row(cta.time_of_call(g, s), sequence);
    factors_of([&](int e) { return layer.rules.at(drawn, unit + kStride * e); });
  }
#pragma unroll
  for (int e = 0; e < kCells; ++e) {
    CellFactors<float>& x = cells.factors[e];
    cells.dc_state[e] = d[e] * x.state_c;
    cells.dc_kept[e] = d[e] * x.c_kept;
    pin(x.state_h), pin(x.a_i), pin(x.a_f), pin(x.a_g), pin(x.a_o), pin(x.c_prev);
    pin(x.h_prev), pin(cells.dc_state[e]), pin(cells.dc_kept[e]), pin(dh[e]);
  }
}

// Finishes a step's cells: sums are those of the exchange before it, `taken` all ones or, where
// they do not count, zero. Stores dgates from `to` on.
template <class Shape>
__device__ __forceinline__ void finish_cells(PreparedCells<Shape>& cells,
                                             const float (&sums)[Shape::kCells],
                                             const uint32_t (&taken)[Shape::kCells],
                                             float (&dc)[Shape::kCells],
                                             float (&dh_zoneout)[Shape::kCells],
                                             unsigned char* to) {
#pragma unroll
  for (int e = 0; e < Shape::kCells; ++e) {
    const CellFactors<float>& x = cells.factors[e];
    const float dh = cells.dh[e] + float_of(bits_of(sums[e]) & taken[e]);
    const float d_state = dh * x.state_h + cells.dc_state[e];
    const float dgates[4] = {d_state * x.a_i, d_state * x.a_f, d_state * x.a_g, dh * x.a_o};
    dc[e] = d_state * x.c_prev + cells.dc_kept[e];
    dh_zoneout[e] = dh * x.h_prev;
    Shape::store_cell(dgates, to + e * Shape::kOperandNext);
  }
}

// The sum of a cell's partial sums, of which those of its thread's first begin at `from`.
template <class Shape>
__device__ __forceinline__ float sum_at_owner(const unsigned char* from, int e) {
  float parts[Shape::kSources];
#pragma unroll
  for (int k = 0; k < Shape::kSources; ++k)
    parts[k] =
        reinterpret_cast<const float*>(from + k * Shape::kSourceBytes)[2 * Shape::kCellStride * e];
  return sum_of<Shape::kSources>(parts);
}

#endif

}  // namespace cuda
}  // namespace fastlstm

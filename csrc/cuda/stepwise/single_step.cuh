// Calls of a single time step and few sequences: streaming inference, which keeps the state from
// call to call. Each layer is one launch, without a workspace.
//
// What it computes: a layer's whole step, x W_ih^T + h_0 W_hh^T, the biases and the cells.
//
// Who owns what: a warp owns one gate of one unit, that is a row of W_ih and a row of W_hh, for all
// sequences; its lanes share the columns. A CTA's eight warps are the four gates of two units. When
// the sums are in shared memory, a thread owns the cell of a unit and a sequence.
//
// What moves: every weight is read once, from the L2 cache where the stack fits it. All warps read
// x and h_0, which the L1 cache holds. A launch waits for that, and for nothing else.
//
// When it begins: the kernel of an upper layer begins early, multiplies h_0, and moves its W_ih to
// the L2 cache, before it waits for x, the output of the layer below. No layer writes what another
// reads before its wait: so each lets the next one begin at once, and several may be under way.
#pragma once

#include "../shared/stack.cuh"
#include "rules.h"
#include "tiles.h"

namespace fastlstm {
namespace cuda {

constexpr int kSingleStepUnits = 2, kSingleStepWarps = 4 * kSingleStepUnits;

// A layer in one direction.
template <class S>
struct SingleStepLayer {
  const S *w_ih, *w_hh, *b_ih, *b_hh;  // the biases may be null
  const S *h0, *c0;                    // (B, H) or null
  S* y;                                // rows of y_stride
  S *h_n, *c_n;                        // (B, H)
  S* gates;                            // (B, 4H) or null
  Acc<S>* cell_states;                 // (B, H) or null
  DrawnRules<Acc<S>> rules;
};

template <class S>
struct SingleStepArgs {
  SingleStepLayer<S> layer[2];  // by direction
  const void* x;                // rows of x_stride elements, or an index for each row
  InputKind kind;
  int64_t x_stride, y_stride;
  int rows, units, input_size;
  bool x_aligned, h_aligned;  // the rows of both operands are whole pieces of 16 bytes
};

// Adds a row of weights times each row of x, as far as this lane has their columns.
template <class S>
__device__ __forceinline__ void add_products(Acc<S> (&sums)[kSingleStepRows], const S* weights,
                                             const S* x, int64_t x_stride, int depth, int rows,
                                             bool aligned) {
  const int lane = threadIdx.x % 32;
  if (aligned) {
    constexpr int kPiece = int(kPieceBytes / sizeof(S));
#pragma unroll 2
    for (int k = lane * kPiece; k < depth; k += 32 * kPiece) {
      const uint4 w = *reinterpret_cast<const uint4*>(weights + k);
#pragma unroll
      for (int b = 0; b < kSingleStepRows; ++b) {
        if (b >= rows) continue;
        const uint4 v = *reinterpret_cast<const uint4*>(x + b * x_stride + k);
#pragma unroll
        for (int j = 0; j < kPiece; ++j)
          sums[b] +=
              to_acc(reinterpret_cast<const S*>(&w)[j]) * to_acc(reinterpret_cast<const S*>(&v)[j]);
      }
    }
    return;
  }
  for (int k = lane; k < depth; k += 32) {
    const Acc<S> w = to_acc(weights[k]);
#pragma unroll
    for (int b = 0; b < kSingleStepRows; ++b)
      if (b < rows) sums[b] += w * to_acc(x[b * x_stride + k]);
  }
}

// Moves a row of weights to the L2 cache.
template <class S>
__device__ __forceinline__ void prefetch_row(const S* weights, int depth) {
  constexpr int kSector = 32 / int(sizeof(S));
  for (int k = threadIdx.x % 32 * kSector; k < depth; k += 32 * kSector) prefetch(weights + k);
}

template <class S>
__global__ void __launch_bounds__(32 * kSingleStepWarps, 1)
    single_step_kernel(const __grid_constant__ SingleStepArgs<S> args) {
  typedef Acc<S> T;
  FASTLSTM_SHARED_BUFFER(shared);
  start_dependents();
  T(*pre)[kSingleStepRows] = reinterpret_cast<T(*)[kSingleStepRows]>(shared);  // by warp
  const SingleStepLayer<S>& layer = args.layer[blockIdx.z];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, units = args.units;
  const int first = blockIdx.x * kSingleStepUnits, unit = first + warp / 4, gate = warp % 4;

  if (unit < units) {
    const int64_t row = int64_t(gate) * units + unit;  // of the weights
    T sums[kSingleStepRows] = {};
    if (args.kind == InputKind::dense)
      prefetch_row(layer.w_ih + row * args.input_size, args.input_size);
    if (layer.h0)
      add_products(sums, layer.w_hh + row * units, layer.h0, units, units, args.rows,
                   args.h_aligned);
    wait_for_primary();  // the threads that have cells below, too
    if (args.kind == InputKind::dense) {
      add_products(sums, layer.w_ih + row * args.input_size, static_cast<const S*>(args.x),
                   args.x_stride, args.input_size, args.rows, args.x_aligned);
    }
    T sum = 0;  // of sequence `lane`
#pragma unroll
    for (int b = 0; b < kSingleStepRows; ++b) {
      if (b < args.rows)
#pragma unroll
        for (int with = 16; with > 0; with /= 2)
          sums[b] += __shfl_xor_sync(0xffffffff, sums[b], with);
      sum = lane == b ? sums[b] : sum;
    }
    if (lane < args.rows) {
      if (layer.b_ih) sum += to_acc(layer.b_ih[row]) + to_acc(layer.b_hh[row]);
      if (args.kind != InputKind::dense) {
        const int64_t at = lane * args.x_stride;
        const int64_t x = args.kind == InputKind::index64
                              ? static_cast<const int64_t*>(args.x)[at]
                              : int64_t(static_cast<const int32_t*>(args.x)[at]);
        if (x < 0 || x >= args.input_size) trap("index out of range");
        sum += to_acc(layer.w_ih[row * args.input_size + x]);
      }
      pre[warp][lane] = sum;
    }
  }
  __syncthreads();

  const int of_cta = threadIdx.x / kSingleStepRows, b = threadIdx.x % kSingleStepRows;
  const int cell_unit = first + of_cta;
  if (of_cta >= kSingleStepUnits || cell_unit >= units || b >= args.rows) return;
  const T(*sums)[kSingleStepRows] = pre + 4 * of_cta;
  const int64_t state = int64_t(b) * units + cell_unit;
  const T before = value_or_zero(layer.c0, state);
  CellForward<T> out;
  if (layer.rules.plain)
    out = cell_forward<Math<T>>(sums[0][b], sums[1][b], sums[2][b], sums[3][b], before);
  else
    out = cell_forward<Math<T>>(sums[0][b], sums[1][b], sums[2][b], sums[3][b], before,
                                value_or_zero(layer.h0, state),
                                layer.rules.at(layer.rules.row(0, b), cell_unit));
  from_acc(out.h, layer.y[b * args.y_stride + cell_unit]);
  from_acc(out.h, layer.h_n[state]);
  from_acc(out.c, layer.c_n[state]);
  if (layer.gates == nullptr) return;
  store_gates(out, layer.gates + int64_t(b) * kSavedGates * units + cell_unit, units);
  layer.cell_states[state] = out.c;
}

template <class S>
class SingleStepPass {
  typedef Acc<S> T;

 public:
  SingleStepPass(const Forward& f, const Plan& plan, const Context* context)
      : f_(f), stack_(f.problem, f.saved, plan, context), p_(stack_.problem) {}

  int64_t workspace() const { return stack_.arena.used(); }

  void run() {
    for (int layer = 0; layer < p_.layers; ++layer) run_layer(layer);
  }

 private:
  void run_layer(int layer) {
    const int64_t units = p_.hidden_size, width = stack_.input_width(layer);
    SingleStepArgs<S> args{};
    args.x = layer == 0 ? p_.input : stack_.layer_output(layer - 1);
    args.kind = layer == 0 ? p_.input_kind : InputKind::dense;
    args.x_stride = layer == 0 ? p_.stride_b : width;
    args.y_stride = stack_.output_width;
    args.rows = int(p_.batch);
    args.units = int(units);
    args.input_size = int(width);
    args.x_aligned = in_pieces<S>(args.x, args.x_stride, width);
    args.h_aligned = true;
    for (int d = 0; d < p_.directions; ++d) {
      const int64_t pseudo_layer = layer * p_.directions + d;
      const LayerWeights& w = p_.weights[pseudo_layer];
      SingleStepLayer<S>& to = args.layer[d];
      to.w_ih = static_cast<const S*>(w.w_ih);
      to.w_hh = static_cast<const S*>(w.w_hh);
      to.b_ih = static_cast<const S*>(w.b_ih);
      to.b_hh = static_cast<const S*>(w.b_hh);
      to.h0 = stack_.states(p_.h0, pseudo_layer, units);
      to.c0 = stack_.states(p_.c0, pseudo_layer, units);
      to.y = stack_.layer_output(layer) + d * units;
      to.h_n = stack_.states(f_.h_n, pseudo_layer, units);
      to.c_n = stack_.states(f_.c_n, pseudo_layer, units);
      to.gates = stack_.gates(pseudo_layer);
      to.cell_states = stack_.cell_states(pseudo_layer);
      to.rules = drawn_rules<T>(p_, layer, d);
      args.x_aligned = args.x_aligned && in_pieces<S>(to.w_ih, width, width);
      args.h_aligned = args.h_aligned && in_pieces<S>(to.w_hh, units, units) &&
                       in_pieces<S>(to.h0, units, units);
    }
    const dim3 grid(blocks_of(units, kSingleStepUnits), 1, unsigned(p_.directions));
    stack_.run_kernel(single_step_kernel<S>, grid, 32 * kSingleStepWarps,
                      kSingleStepWarps * kSingleStepRows * sizeof(T), args,
                      layer > 0 ? Begin::early : Begin::late);
  }

  const Forward& f_;
  Stack<S> stack_;
  const Problem& p_;
};

}  // namespace cuda
}  // namespace fastlstm

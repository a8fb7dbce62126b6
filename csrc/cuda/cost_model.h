// The planner's cost model: how many microseconds a step takes, by algorithm and shape.
#pragma once

#include <algorithm>

#include "cluster/shapes.h"
#include "grid/shapes.h"
#include "planner.h"
#include "stepwise/tiles.h"

namespace fastlstm {
namespace cuda {

inline int64_t bytes_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

// ---- stepwise ----

// What bounds a step's product: the rate at which an SM reads from the L2 cache and multiplies, and
// the rate of the L2 cache for all SMs together. From data sheets and published measurements on
// Hopper, to be replaced by measurements of these kernels.
constexpr double kBytesPerCycle = 64, kL2BytesPerCycle = 3100;
constexpr double kCyclesPerMicrosecond = 1755;
// Microseconds from launch to launch in a CUDA graph and on a stream, measured on an H200.
constexpr double kGraphLaunch = 0.55, kStreamLaunch = 4.2;
// From one step's kernel to the next: between a stream's and a graph's. What steps gain
// that begin early (sm_90 and newer) is not counted before it is measured.
constexpr double kLaunchMicroseconds = 2;
// A stage of the step kernel's operands takes at least this: 0.5 to 1.6 us on an H200.
constexpr double kStageMicroseconds = 0.9;
// cuBLAS: 60 % of what large products reached on an H200 (778 TFLOP/s in half types, 50 in fp32,
// which torch by default does not round to tf32; fewer rows cost as much as kLibraryRows), a kernel
// that passes over memory, and the launch of either. Estimates: no step is measured yet.
constexpr double kLibraryFlops = 467e6, kLibraryFp32Flops = 30e6;
constexpr double kMemoryBytes = 3e6;    // per microsecond, as the others
constexpr double kLibraryLaunch = 2.5;  // microseconds
constexpr int64_t kLibraryRows = 64;
constexpr double kFmaPerCycle = 128, kDoubleFmaPerCycle = 64, kTf32PerCycle = 512,
                 kHalfPerCycle = 1024;

inline double products_per_cycle(DType type, bool tensor_cores) {
  if (type == DType::f64) return kDoubleFmaPerCycle;
  if (!tensor_cores) return kFmaPerCycle;
  return type == DType::f32 ? kTf32PerCycle : kHalfPerCycle;
}

// Half types have the tensor-core kernels' tiles on every GPU.
inline bool tensor_type(DType type, bool tensor_cores) {
  return tensor_cores || type == DType::bf16 || type == DType::f16;
}

struct Product {
  int64_t rows, columns, depth;
  int directions;
};

// Of a tile's index; 0 microseconds: no tile runs the product.
struct Choice {
  int index;
  double microseconds;
};

constexpr int64_t kMostRowTiles = 65535;  // along the grid's y

// The tile with the fastest product. While the L2 cache delivers the operands of all CTAs, the
// busiest SM reads those of its CTAs and multiplies them. Of equal tiles, the larger one.
inline Choice best_tile(const Product& x, DType type, bool tensor_cores, const Device& device) {
  int best = 0;
  double least = 0;
  for (int j = 0; j < kTileCount; ++j) {
    const TileShape tile = tile_shape(j, tensor_type(type, tensor_cores));
    const int64_t row_tiles = (x.rows + tile.rows() - 1) / tile.rows();
    if (tile.shared() > device.shared_per_block || row_tiles > kMostRowTiles) continue;
    const int64_t ctas =
        row_tiles * ((x.columns + tile.columns() - 1) / tile.columns()) * x.directions;
    const int64_t waves = (ctas + device.sms - 1) / device.sms;
    const double bytes = double(tile.rows() + tile.columns()) * x.depth * bytes_of(type);
    const double products = double(tile.rows()) * tile.columns() * x.depth;
    const double busiest =
        waves * std::max(bytes / kBytesPerCycle, products / products_per_cycle(type, tensor_cores));
    const double cycles = std::max(busiest, ctas * bytes / kL2BytesPerCycle);
    if (least == 0 || cycles <= least) {
      best = j;
      least = cycles;
    }
  }
  if (least == 0) return {kLibraryTile, 0};
  const int64_t stages =
      tile_shape(best, tensor_type(type, tensor_cores)).stages_of(bytes_of(type) * x.depth);
  return {best, std::max(least / kCyclesPerMicrosecond, stages * kStageMicroseconds) +
                    kLaunchMicroseconds};
}

// A product by cuBLAS, and a kernel for the cells behind it, which moves `moved` bytes for every
// sum besides the sum itself.
inline double library_microseconds(const Product& x, DType type, double moved) {
  const double flops = type == DType::f32 ? kLibraryFp32Flops : kLibraryFlops;
  const double rows = double(std::max(x.rows, kLibraryRows)), sums = double(x.rows) * x.columns;
  const double bytes = double(x.columns) * x.depth * bytes_of(type);
  const double product = std::max(2 * rows * x.columns * x.depth / flops,
                                  bytes / kL2BytesPerCycle / kCyclesPerMicrosecond);
  return x.directions * (product + kLibraryLaunch + sums * (moved + 8) / kMemoryBytes) +
         kLibraryLaunch;
}

// A wide step (stepwise/wide_step.cuh): what the L2 cache delivers or what one SM moves through
// shared memory and multiplies, in rounds of the clusters that the GPU runs at once; then the first
// stage of h, the sums of the warps, and the cells; and a launch as in a graph, where a step takes
// longer than a stream's host. Estimates, none measured: on an H200 bulk copies took 5.6 ns a KB
// and SM from L2 where plain loads took 13.
constexpr double kWideRest = 2.5;        // microseconds
constexpr double kSharedPerCycle = 128;  // bytes

inline Choice best_wide(const Product& x, const Device& device) {
  Choice best{kWideTile, 0};
  for (int j = 0; j < kWideCount; ++j) {
    const WideTile tile = wide_tile(j);
    if (tile.shared() > device.shared_per_block || x.rows > kMostRowTiles * tile.sequences)
      continue;
    const int64_t slots = (x.columns + 4 * kWideUnits - 1) / (4 * kWideUnits),
                  parts = (x.rows + tile.sequences - 1) / tile.sequences * x.directions;
    const double blocks = double(tile.blocks_of(x.depth));
    // Of a block of K: what comes to a CTA, and what its warps read of that and multiply.
    const double weights = 4 * kWideUnits * 32, hidden = tile.sequences * 32,
                 warps = tile.sequences / tile.warp_sequences,
                 read = warps * (weights + tile.warp_sequences * 32),
                 products = 4 * kWideUnits * tile.sequences * 16;
    const double of_cta =
        blocks * std::max((weights + hidden + read) / kSharedPerCycle, products / kHalfPerCycle);
    for (int cluster : {4, 3, 2}) {
      const int64_t clusters = (slots + cluster - 1) / cluster * parts,
                    resident = std::max(1, resident_clusters(cluster, device.sms)),
                    at_once = std::min<int64_t>(tile.ctas, (clusters + resident - 1) / resident),
                    rounds = (clusters + resident * at_once - 1) / (resident * at_once);
      const double l2 = slots * parts * blocks * (weights + hidden / cluster) / kL2BytesPerCycle;
      const double step =
          std::max(l2, rounds * at_once * of_cta) / kCyclesPerMicrosecond + kWideRest;
      const double time = step + (step > kStreamLaunch ? kGraphLaunch : kLaunchMicroseconds);
      if (best.microseconds == 0 || time < best.microseconds) best = {kWideTile + j, time};
    }
  }
  return best;
}

// A layer of a call of one step: all of its weights once, from the L2 cache. An estimate.
inline double single_step_microseconds(const Problem& p) {
  const double weights = 4.0 * p.hidden_size * (p.input_size + p.hidden_size) * p.directions;
  return kLaunchMicroseconds +
         weights * bytes_of(p.dtype) / (kL2BytesPerCycle * kCyclesPerMicrosecond);
}

// ---- cluster ----

// The kernels' layouts fill up to so much of a block's shared memory. GPUs of compute capability 12
// have clusters, too, but 99 KiB.
constexpr int64_t kClusterSharedBytes = 227 << 10;

// A step in a cluster, for 8, 16 and 4 sequences, with what backward needs saved, in bf16 on an
// H200; tf32 takes kFloatFactor times as long. Both kernels have changed since they were measured
// (benchmarks/results/steps; the comments have what was measured), so these are estimates from what
// their prototypes took there, and from the machine code (benchmarks/NOTES.md, 2026-11-28). Forward
// counts no less than two thirds of what was measured. Four sequences run in one CTA alone.
// Forward, the schedule in the machine code gives 490 to 550 cycles, and a prototype took 1.2 times
// what its own gives: 0.30 to 0.33 us. Backward the machine code has 480 cycles (128 units:
// 740); the table has 1.5 times that, at kCyclesPerMicrosecond.
struct ClusterMicroseconds {
  int ctas, units;
  double eight, sixteen, four = 0;
};
constexpr ClusterMicroseconds kForwardMicroseconds[] = {
    {1, 64, 0.45 /* 0.65 */, 0.8, 0.32},
    {2, 64, 0.75, 1.15},
    {4, 32, 0.66 /* 0.80 in 50 steps, launch included */, 0.95},
    {8, 32, 0.68 /* 0.68 */, 0.95 /* 1.23 */},
    {16, 32, 0.95 /* 1.19 */, 1.45 /* 2.13 */}};
// With 8 and 16 CTAs a prototype with as many instructions between a wait and the send took 0.62,
// 1.08, 1.09 and 1.57 to 1.69 us. One CTA of 64 units counts two thirds of what was measured: it no
// longer prepares cells ahead of its product. The others are what the kernel took before, and
// guesses for 16.
constexpr ClusterMicroseconds kBackwardMicroseconds[] = {{1, 32, 0.59, 1.15},
                                                         {1, 64, 0.64 /* 0.96 */, 1.3, 0.4},
                                                         {1, 128, 1.67, 3.3, 0.6},
                                                         {2, 32, 0.62, 1.2},
                                                         {4, 32, 0.67, 1.27},
                                                         {8, 32, 0.65 /* 0.75 */, 1.15 /* 1.44 */},
                                                         {16, 32, 1.1 /* 1.18 */, 1.7 /* 1.95 */}};
constexpr double kFloatFactor = 1.3;
// Where weights are streamed: a half type with 48 units a CTA, and tf32 with 32. Estimates, for
// none is measured: the exchange, what shared memory moves at 128 bytes a cycle, and the cells,
// times 1.3, which H = 512 took beyond such a sum; backward in a half type as long as a prototype
// of that shape took (1.97). docs/kernels.md, benchmarks/NOTES.md
struct StreamedMicroseconds {
  double half, tf32;
};
constexpr StreamedMicroseconds kForwardStreamed = {1.75, 1.9}, kBackwardStreamed = {2.0, 2.1};
// Rows of H elements that 16-byte copies cannot take are moved one element at a time.
constexpr double kForwardUnalignedFactor = 1.4, kBackwardUnalignedFactor = 1.8;

inline double cluster_microseconds(ClusterShape shape, Pass pass, const Problem& p) {
  const bool forward = pass == Pass::forward;
  const int64_t bytes = bytes_of(p.dtype);
  const bool streams = streams_weights(shape.ctas, shape.units, bytes);
  double step = 0;
  auto look_up = [&](const auto& table) {
    for (const ClusterMicroseconds& x : table)
      if (x.ctas == shape.ctas && x.units == shape.units)
        step = shape.sequences <= 4 ? x.four : shape.sequences <= 8 ? x.eight : x.sixteen;
  };
  if (streams) {
    const StreamedMicroseconds& x = forward ? kForwardStreamed : kBackwardStreamed;
    step = bytes == 4 ? x.tf32 : x.half;
  } else if (forward) {
    look_up(kForwardMicroseconds);
  } else {
    look_up(kBackwardMicroseconds);
  }
  if (p.hidden_size * bytes % 16 != 0)
    step *= forward ? kForwardUnalignedFactor : kBackwardUnalignedFactor;
  return bytes == 4 && !streams ? step * kFloatFactor : step;
}

// fp32 without tf32: the multiply-adds of a CTA, at this share of its SM's rate, and what the cells
// and the exchange add. A second group of sequences, forward, shares the exchange of the first; in
// backward its exchange hides behind the other's product. Estimates: none is measured yet.
constexpr double kFmaShare = 0.75, kFp32ExchangeMicroseconds = 0.7;
inline double fma_microseconds(double multiply_adds) {
  return multiply_adds / kFmaPerCycle / kFmaShare / kCyclesPerMicrosecond;
}
// One CTA alone, counted in the machine code. For each four sequences 545 cycles of multiply-adds
// and their reads, and 294 of the exchanges between lanes, which the multiply-adds of both warps of
// a scheduler wait for. Besides, forward: barrier, reads, cells and stores; backward two barriers.
constexpr double kFp32PlaneCycles = 840, kFp32ForwardCycles = 340, kFp32BackwardCycles = 420;

inline double fp32_cluster_microseconds(ClusterShape shape, Pass pass, const Problem& p) {
  const bool forward = pass == Pass::forward, aligned = p.hidden_size % 4 == 0;
  const double depth = double(shape.ctas) * shape.units, rows = 4.0 * shape.units;
  double product = fma_microseconds(rows * depth * shape.sequences);
  double rest = kFp32ExchangeMicroseconds;
  if (shape.ctas == 1) {
    product = kFp32PlaneCycles * (shape.sequences / 4.0) / kCyclesPerMicrosecond;
    rest = (forward ? kFp32ForwardCycles : kFp32BackwardCycles) / kCyclesPerMicrosecond;
  }
  if (forward && shape.sequences > 8) rest *= 1.3;
  return (product + rest) * (aligned   ? 1
                             : forward ? kForwardUnalignedFactor
                                       : kBackwardUnalignedFactor);
}

// ---- layers at once (shared/layers.cuh) ----

// Microseconds on an H200. Measured: what a cluster's launch takes besides its steps, mostly
// loading weights. Estimated: the least that a product of a chunk takes.
constexpr double kClusterStart = 5, kLeastProduct = 5;
// What a layer issues for a chunk: a product, the steps, a copy of its input where it is dropped;
// an event and a wait for it count as one more. Only the former run on the GPU.
constexpr int kChunkLaunches = 3, kChunkCalls = kChunkLaunches + 1;
constexpr double kLeastGain = 1.15;   // of an estimate by which layers work at once
constexpr int kMostLayersAtOnce = 8;  // each has a stream of its own
constexpr int64_t kMostChunks = 64;   // of a call
constexpr double kLeastFreeSms =
    0.15;  // of all, which products run on while clusters hold the rest

struct ChunkChoice {
  int64_t steps;        // of a chunk; 0: none is worth it
  double microseconds;  // for one step of all layers
};

// Layers that work at once, each with `clusters` clusters of `ctas` CTAs, of which `resident` fit
// the GPU. flops: of a product, per microsecond. step: the microseconds of one layer's step.
inline ChunkChoice best_chunks(const Problem& p, const Device& device, int ctas, int64_t clusters,
                               int64_t resident, double flops, double step) {
  ChunkChoice best{0, p.layers * step};
  const double free = 1 - double(p.layers * clusters * ctas) / device.sms;
  if (p.layers < 2 || p.layers > kMostLayersAtOnce || p.directions != 1 ||
      p.layers * clusters > resident || free < kLeastFreeSms)
    return best;
  // A layer, for so many steps, where products have a share of the SMs.
  auto layer = [&](int64_t steps, double share) {
    const double product = 8.0 * steps * p.batch * p.hidden_size * p.hidden_size;
    return steps * step + kChunkLaunches * kGraphLaunch + kClusterStart +
           std::max(kLeastProduct, product / (flops * share));
  };
  const double in_turn = p.layers * layer(p.steps, 1);
  double least = in_turn / kLeastGain;
  for (int64_t chunks = 2; chunks <= std::min(p.steps, kMostChunks); ++chunks) {
    const int64_t steps = (p.steps + chunks - 1) / chunks;
    // By the GPU's time in a graph and by the host's without one: it has to be worth it in both.
    const double at_once = std::max((chunks + p.layers - 1) * layer(steps, free),
                                    p.layers * chunks * kChunkCalls * kStreamLaunch);
    if (at_once >= least) continue;
    least = at_once;
    best = {steps, p.layers * step * at_once / in_turn};
  }
  return best;
}

// ---- grid ----

// A step of a grid team, with what backward needs saved: a constant, and an amount for each part of
// 256 units of a half type (128 of float). Estimates. Forward was measured on an H200 at H = 512 to
// 2048 before its step was rearranged: {1.1, 0.3}, {1.5, 0.44}, {3.0, 0.35} and {2.0, 0.78} fit it
// (benchmarks/results/steps). A prototype whose step it has now took 1.17 us at H768 B16, 1.33 and
// 3.13 at H1024 B16 and B64, and 5.27 at H2048 B32; these are between the two, near the prototype.
// Backward was never timed: what its prototype took there with fp32 sums (H512, H768 and H1024 B16
// 1.70, 2.01 and 2.55 us; H512 B128 and H1024 B64 2.83 and 4.49; none of 16 units and 16
// sequences), and 0.2 us for what a step of ours executes beyond the prototype's.
// benchmarks/NOTES.md
// fp32 without tf32 counts its multiply-adds besides: forward as long as tf32, which exchanges as
// many bytes, backward as long as a half type, whose sums are fp32, too. An estimate.
struct GridMicroseconds {
  double constant, part;
  constexpr double of(int parts) const { return constant + parts * part; }
};
constexpr GridMicroseconds kGridForwardMicroseconds[kGridForwardCount] = {
    {0.85, 0.19}, {1.0, 0.31}, {2.0, 0.25}, {1.9, 0.47}};
constexpr GridMicroseconds kGridBackwardMicroseconds[kGridBackwardCount] = {
    {1.05, 0.42}, {1.1, 0.65}, {1.3, 0.85}};

}  // namespace cuda
}  // namespace fastlstm

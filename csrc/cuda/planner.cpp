#include "planner.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cluster/shapes.h"
#include "grid/shapes.h"
#include "rules.h"
#include "tiles.h"

namespace fastlstm {
namespace cuda {
namespace {

// What bounds a step's product: on one SM, and in the L2 cache for all SMs together. Leads from
// data sheets and from others' measurements on Hopper, to be replaced by our own.
constexpr double kBytesPerCycle = 64, kL2BytesPerCycle = 3100;
constexpr double kCyclesPerMicrosecond = 1755;
constexpr double kLaunchMicroseconds = 2;  // from one step's kernel to the next
// A stage of the step kernel's operands, however few its bytes: 0.5 to 1.6 us on an H200.
constexpr double kStageMicroseconds = 0.9;
// A product by cuBLAS in half types (60 % of 800 TFLOP/s; fewer rows cost as much as kLibraryRows),
// a kernel that passes over memory, and the launch of either. Estimates: none is measured yet.
constexpr double kLibraryFlops = 480e6, kMemoryBytes = 3e6;  // in a microsecond
constexpr double kLibraryLaunch = 2.5;                       // microseconds
constexpr int64_t kLibraryRows = 64;
constexpr double kFmaPerCycle = 128, kDoubleFmaPerCycle = 64, kTf32PerCycle = 512,
                 kHalfPerCycle = 1024;

int64_t bytes_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

double products_per_cycle(DType type, bool tensor_cores) {
  if (type == DType::f64) return kDoubleFmaPerCycle;
  if (!tensor_cores) return kFmaPerCycle;
  return type == DType::f32 ? kTf32PerCycle : kHalfPerCycle;
}

// Half types have the tensor-core kernels' tiles on every GPU.
bool tensor_type(DType type, bool tensor_cores) {
  return tensor_cores || type == DType::bf16 || type == DType::f16;
}

struct Product {
  int64_t rows, columns, depth;
  int directions;
};

struct Choice {
  int index;
  double microseconds;
};

// The tile whose product is done first: while the L2 cache delivers the operands of all CTAs, the
// busiest SM takes in those of its own and multiplies them. Of equals, the larger tile.
Choice best_tile(const Product& x, DType type, bool tensor_cores, const Device& device) {
  int best = 0;
  double least = 0;
  for (int j = 0; j < kTileCount; ++j) {
    const TileShape tile = tile_shape(j, tensor_type(type, tensor_cores));
    if (tile.shared() > device.shared_per_block) continue;
    const int64_t ctas = ((x.rows + tile.rows() - 1) / tile.rows()) *
                         ((x.columns + tile.columns() - 1) / tile.columns()) * x.directions;
    const int64_t turns = (ctas + device.sms - 1) / device.sms;
    const double bytes = double(tile.rows() + tile.columns()) * x.depth * bytes_of(type);
    const double products = double(tile.rows()) * tile.columns() * x.depth;
    const double busiest =
        turns * std::max(bytes / kBytesPerCycle, products / products_per_cycle(type, tensor_cores));
    const double cycles = std::max(busiest, ctas * bytes / kL2BytesPerCycle);
    if (j == 0 || cycles <= least) {
      best = j;
      least = cycles;
    }
  }
  const int64_t stages =
      tile_shape(best, tensor_type(type, tensor_cores)).stages_of(bytes_of(type) * x.depth);
  return {best, std::max(least / kCyclesPerMicrosecond, stages * kStageMicroseconds) +
                    kLaunchMicroseconds};
}

// The library's product, and a kernel for the cells behind it, which moves `moved` bytes for every
// sum besides the sum itself.
double library_microseconds(const Product& x, DType type, double moved) {
  const double rows = double(std::max(x.rows, kLibraryRows)), sums = double(x.rows) * x.columns;
  const double bytes = double(x.columns) * x.depth * bytes_of(type);
  const double product = std::max(2 * rows * x.columns * x.depth / kLibraryFlops,
                                  bytes / kL2BytesPerCycle / kCyclesPerMicrosecond);
  return x.directions * (product + kLibraryLaunch + sums * (moved + 8) / kMemoryBytes) +
         kLibraryLaunch;
}

Plan stepwise(const Problem& p, Pass pass, const Device& device, const Settings& settings) {
  Plan found{};
  found.algorithm = Algorithm::stepwise;
  const bool half = p.dtype == DType::bf16 || p.dtype == DType::f16;
  found.tensor_cores =
      device.capability >= 80 && (half || (p.dtype == DType::f32 && settings.allow_tf32));
  auto choose = [&](int64_t columns, int64_t depth, double moved) {
    const Product x{p.batch, columns, depth, p.directions};
    Choice best = best_tile(x, p.dtype, found.tensor_cores, device);
    if (!half || !found.tensor_cores) return best;
    const double library = library_microseconds(x, p.dtype, moved);
    return library < best.microseconds ? Choice{kLibraryTile, library} : best;
  };
  // Forward: the input's part and, for every four gates, h twice, c thrice and the saved gates.
  // Backward: for every unit, gates and dgates, and six numbers of c, h and their gradients.
  const Choice gates = choose(4 * p.hidden_size, p.out_size, 10),
               project = choose(p.out_size, p.hidden_size, 4),
               hidden = choose(p.out_size, 4 * p.hidden_size, 4),
               cell = choose(p.hidden_size, p.projected ? p.out_size : 4 * p.hidden_size, 36);
  found.gates = gates.index;
  found.project = project.index;
  found.hidden = hidden.index;
  found.cell = cell.index;
  double step = pass == Pass::forward ? gates.microseconds : cell.microseconds;
  if (p.projected) step += (pass == Pass::forward ? project : hidden).microseconds;
  if (p.layer_norm) step += kLaunchMicroseconds;
  found.microseconds = p.layers * step;
  return found;
}

// Microseconds of a step in a cluster that saves what backward needs, for 8 and for 16 sequences;
// measured on an H200 in bf16 (benchmarks/results/steps), but for those marked as estimates. tf32
// takes longer by kFloatFactor.
struct ClusterMicroseconds {
  int ctas, units;
  double eight, sixteen;
};
constexpr ClusterMicroseconds kForwardMicroseconds[] = {
    {1, 64, 0.65, 1.0 /* estimate */},
    {2, 64, 0.8 /* estimate */, 1.3 /* estimate */},
    {4, 32, 0.66 /* 0.80 in 50 steps, launch included */, 1.2 /* estimate */},
    {8, 32, 0.68, 1.23},
    {16, 32, 1.19, 2.13}};
constexpr ClusterMicroseconds kBackwardMicroseconds[] = {{1, 32, 0.59, 1.15 /* estimate */},
                                                         {1, 64, 0.96, 1.9 /* estimate */},
                                                         {1, 128, 1.67, 3.3 /* estimate */},
                                                         {2, 32, 0.62, 1.2 /* estimate */},
                                                         {4, 32, 0.67, 1.27},
                                                         {8, 32, 0.75, 1.44},
                                                         {16, 32, 1.18, 1.95}};
constexpr double kFloatFactor = 1.3;
// Rows of H elements that 16-byte copies cannot take are moved one element at a time.
constexpr double kForwardUnalignedFactor = 1.4, kBackwardUnalignedFactor = 1.8;

double cluster_microseconds(ClusterShape shape, Pass pass, const Problem& p) {
  const bool forward = pass == Pass::forward;
  const int64_t bytes = bytes_of(p.dtype);
  double step = 0;
  auto look = [&](const auto& table) {
    for (const ClusterMicroseconds& x : table)
      if (x.ctas == shape.ctas && x.units == shape.units)
        step = shape.sequences <= 8 ? x.eight : x.sixteen;
  };
  if (forward)
    look(kForwardMicroseconds);
  else
    look(kBackwardMicroseconds);
  if (p.hidden_size * bytes % 16 != 0)
    step *= forward ? kForwardUnalignedFactor : kBackwardUnalignedFactor;
  return bytes == 4 ? step * kFloatFactor : step;
}

// Why no cluster runs this problem, whatever its size; null where one does.
const char* cannot_cluster(const Problem& p, const Plan& stepwise, const Device& device) {
  if (device.capability < 90) return "clusters need a GPU of compute capability 9.0";
  if (!stepwise.tensor_cores)
    return p.dtype == DType::f64 ? "clusters have no float64"
                                 : "float32 runs in clusters only where tf32 is allowed";
  if (p.projected) return "clusters have no projection";
  if (p.layer_norm) return "clusters have no layer normalisation";
  if (p.hidden_size > largest_clustered(bytes_of(p.dtype)))
    return "the recurrent weights do not fit a cluster";
  return nullptr;
}

// The cluster whose steps take least for the whole batch.
Plan cluster(const Problem& p, Pass pass, const Device& device, const Plan& stepwise) {
  Plan best = stepwise;
  best.algorithm = Algorithm::cluster;
  best.microseconds = 0;
  const int64_t bytes = bytes_of(p.dtype);
  auto consider = [&](ClusterShape shape) {
    const int64_t clusters = p.directions * ((p.batch + shape.sequences - 1) / shape.sequences);
    const int64_t resident = std::max(1, resident_clusters(shape.ctas, device.sms));
    const double step = p.layers * double((clusters + resident - 1) / resident) *
                        cluster_microseconds(shape, pass, p);
    if (best.microseconds > 0 && step >= best.microseconds) return;
    best.ctas = shape.ctas;
    best.units = shape.units;
    best.sequences = shape.sequences;
    best.microseconds = step;
  };
  const int alone = alone_units(p.hidden_size, bytes);
  for (int sequences = 8; sequences <= kMostSequences; sequences += 8) {
    if (pass == Pass::forward) {
      for (const ForwardCluster& x : kForwardClusters)
        if (x.ctas * x.units >= p.hidden_size && runs_forward(x, bytes))
          consider({x.ctas, x.units, sequences});
    } else {
      if (alone > 0) consider(backward_shape({1, alone, sequences}));
      consider(backward_shape({cluster_ctas(p.hidden_size), kClusterUnits, sequences}));
    }
  }
  return best;
}

// Microseconds of a step of a grid team that saves what backward needs: so many for any H, and so
// many for each part of 256 units of a half type (128 floats). Forward: fitted to what was measured
// on an H200, H = 512 to 2048. Backward: an estimate, prototypes and what forward took beyond its.
struct GridMicroseconds {
  double any, part;
};
constexpr GridMicroseconds kGridForwardMicroseconds[kGridForwardCount] = {
    {1.1, 0.3}, {1.5, 0.44}, {3.0, 0.35}, {2.0, 0.78}};
constexpr GridMicroseconds kGridBackwardMicroseconds[kGridBackwardCount] = {
    {1.65, 0.42}, {1.7, 0.65}, {1.7, 0.9}};

// Why the grid does not run this problem, whatever its size; null where it does.
const char* cannot_use_grid(const Problem& p, Pass pass, const Plan& stepwise,
                            const Device& device) {
  if (device.capability < 80) return "the grid's kernels need a GPU of compute capability 8.0";
  if (!stepwise.tensor_cores)
    return p.dtype == DType::f64 ? "the grid's kernels have no float64"
                                 : "float32 runs over the grid only where tf32 is allowed";
  if (p.projected) return "the grid's kernels have no projection";
  if (p.layer_norm) return "the grid's kernels have no layer normalisation";
  if (pass == Pass::forward && p.dtype != DType::f32 && p.cell.zoneout_h > 0 && p.h0)
    return "zoneout may keep an h0 beyond 1, which the grid's kernels cannot send in a half type";
  return nullptr;
}

// The teams whose steps take least for the whole batch; groups is 0 where nothing fits.
Plan grid(const Problem& p, Pass pass, const Device& device, const Plan& stepwise) {
  Plan best = stepwise;
  best.algorithm = Algorithm::grid;
  best.groups = 0;
  const int bytes = int(bytes_of(p.dtype));
  // A shape of the pass's kernels, the parts of a warp, those that a warp may have.
  auto consider = [&](int shape, int units, int sequences, int ctas, int parts, int most_parts,
                      int64_t shared, GridMicroseconds time) {
    const int at_once = device.sms / ctas;
    if (parts > most_parts || at_once == 0 || shared > device.shared_per_block) return;
    const int groups = parts_of(p.batch, sequences);
    const int launches = parts_of(p.directions * groups, at_once);
    const double step = p.layers * double(launches) * (time.any + parts * time.part);
    if (best.groups > 0 && step >= best.microseconds) return;
    best.shape = shape;
    best.ctas = ctas;
    best.units = units;
    best.sequences = sequences;
    best.groups = groups;
    best.active = parts_of(p.directions * groups, launches);
    best.microseconds = step;
  };
  if (pass == Pass::forward) {
    for (int j = 0; j < kGridForwardCount; ++j) {
      const GridShape x = kGridForward[j];
      const GridTeam team = forward_team(x, p.hidden_size, bytes);
      consider(j, x.units, x.sequences(), team.ctas, parts_of(team.slabs, kGridWarps), x.slabs,
               forward_shared(x, team.slabs), kGridForwardMicroseconds[j]);
    }
  } else {
    for (int j = 0; j < kGridBackwardCount; ++j) {
      const GridBackwardShape x = kGridBackward[j];
      const GridBackwardTeam team = backward_team(x, p.hidden_size);
      consider(j, x.units, x.sequences(), team.ctas, parts_of(team.blocks, kGridWarps) * bytes / 2,
               x.blocks, backward_shared(x, team.blocks, bytes), kGridBackwardMicroseconds[j]);
    }
  }
  return best;
}

}  // namespace

const char* name(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::automatic: return "auto";
    case Algorithm::stepwise: return "stepwise";
    case Algorithm::cluster: return "cluster";
    case Algorithm::grid: return "grid";
  }
  return "?";
}

Plan plan(const Problem& p, Pass pass, const Device& device, const Settings& settings) {
  const Plan fallback = stepwise(p, pass, device, settings);
  Plan best = fallback;
  best.reason = "its steps are estimated to be the fastest";
  const char* refusal = nullptr;  // of the last algorithm that cannot run the problem
  bool choice = false;            // whether another can
  auto consider = [&](Algorithm algorithm, const char* why_not, auto&& make) {
    const bool forced = settings.algorithm == algorithm;
    if (!forced && settings.algorithm != Algorithm::automatic) return;
    if (forced && why_not)
      throw std::invalid_argument(std::string("fastlstm: the algorithm \"") + name(algorithm) +
                                  "\" cannot run: " + why_not);
    if (why_not) refusal = why_not;
    if (why_not) return;
    choice = true;
    const Plan other = make();
    if (!forced && other.microseconds >= best.microseconds) return;
    best = other;
    best.reason = "weights stay on chip for the whole sequence";
  };
  const char* no_cluster = cannot_cluster(p, fallback, device);
  const char* no_grid = cannot_use_grid(p, pass, fallback, device);
  const Plan teams = no_grid ? fallback : grid(p, pass, device, fallback);
  if (!no_grid && teams.groups == 0) no_grid = "the recurrent weights do not fit the GPU";
  consider(Algorithm::cluster, no_cluster, [&] { return cluster(p, pass, device, fallback); });
  consider(Algorithm::grid, no_grid, [&] { return teams; });
  if (settings.algorithm != Algorithm::automatic)
    best.reason = "asked for";
  else if (!choice && refusal)
    best.reason = refusal;
  return best;
}

}  // namespace cuda
}  // namespace fastlstm

#include "planner.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "persistent.h"
#include "rules.h"
#include "tiles.h"

namespace fastlstm {
namespace cuda {
namespace {

// What bounds a step's product: on one SM, and in the L2 cache for all SMs together. Leads from
// data sheets and from others' measurements on Hopper, to be replaced by our own.
constexpr double kBytesPerCycle = 64, kL2BytesPerCycle = 3100, kSharedBytesPerCycle = 128;
constexpr double kCyclesPerMicrosecond = 1755;
constexpr double kLaunchMicroseconds = 2;    // from one step's kernel to the next
constexpr double kSignalMicroseconds = 0.8;  // from a CTA's store to another's use of it
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
  double cycles;
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
  return {best, least};
}

Plan stepwise(const Problem& p, Pass pass, const Device& device, const Settings& settings) {
  Plan found{};
  found.algorithm = Algorithm::stepwise;
  found.wave = 1;
  const bool half = p.dtype == DType::bf16 || p.dtype == DType::f16;
  found.tensor_cores =
      device.capability >= 80 && (half || (p.dtype == DType::f32 && settings.allow_tf32));
  auto tile = [&](int64_t columns, int64_t depth) {
    return best_tile({p.batch, columns, depth, p.directions}, p.dtype, found.tensor_cores, device);
  };
  const Choice gates = tile(4 * p.hidden_size, p.out_size),
               project = tile(p.out_size, p.hidden_size),
               hidden = tile(p.out_size, 4 * p.hidden_size),
               cell = tile(p.hidden_size, p.projected ? p.out_size : 4 * p.hidden_size);
  found.gates = gates.index;
  found.project = project.index;
  found.hidden = hidden.index;
  found.cell = cell.index;
  const double cycles = (pass == Pass::forward ? gates.cycles : cell.cycles) +
                        (p.projected ? (pass == Pass::forward ? project : hidden).cycles : 0);
  const int launches = p.projected || p.layer_norm ? 2 : 1;
  found.microseconds = p.layers * (cycles / kCyclesPerMicrosecond + launches * kLaunchMicroseconds);
  return found;
}

// Why no persistent kernel runs this problem, whatever its size; null where one does.
const char* cannot_persist(const Problem& p, const Plan& stepwise, const Device& device) {
  if (device.capability < 80) return "persistent kernels need a GPU of compute capability 8.0";
  if (!stepwise.tensor_cores)
    return p.dtype == DType::f64 ? "persistent kernels have no float64"
                                 : "float32 has persistent kernels only where tf32 is allowed";
  if (p.projected) return "persistent kernels have no projection";
  if (p.batch_sizes) return "persistent kernels have no packed sequences";
  if (p.layer_norm) return "persistent kernels have no layer normalisation";
  if (!plain(p.cell)) return "persistent kernels have no zoneout, recurrent dropout or clipping";
  return nullptr;
}

// The shape, groups and wavefront whose step takes least; groups is 0 where nothing fits.
Plan persistent(const Problem& p, Pass pass, const Device& device, const Plan& stepwise) {
  Plan found = stepwise;
  found.algorithm = Algorithm::persistent;
  found.groups = 0;
  const bool forward = pass == Pass::forward;
  const int64_t size = bytes_of(p.dtype);
  const int wave = p.directions == 1 ? std::min(p.layers, kMaxCells) : 1;
  for (int layers = 1; layers <= wave; ++layers) {
    const int cells = layers * p.directions, sources = layers > 1 ? 2 : 1;
    for (int j = 0; j < kPersistentShapeCount; ++j) {
      const PersistentShape shape = kPersistentShapes[j];
      if (!forward && !runs_backward(shape)) continue;
      const PersistentSizes x = persistent_sizes(p.hidden_size, size, shape, forward);
      const int64_t shared = partial_bytes(shape) + sources * x.weights;
      const int64_t most = device.sms / (cells * int64_t(x.slots));  // groups at once
      if (most == 0 || shared > device.shared_per_block) continue;
      const int64_t groups = (p.batch + 8 * shape.tiles - 1) / (8 * shape.tiles);
      const int64_t launches = (groups + most - 1) / most;
      const int64_t active = (groups + launches - 1) / launches;
      const double rows = double(p.batch) / groups;
      // Both directions or the layers of a wavefront share the L2 cache; the slowest CTA has all
      // sources.
      const double moved = rows * x.depth * size, ctas = double(cells) * active * x.slots;
      const double l2 = std::max(sources * moved / kBytesPerCycle,
                                 ctas * moved * (2 * layers - 1) / layers / kL2BytesPerCycle);
      const double products = sources * 8.0 * shape.tiles * 4 * shape.units * x.depth /
                              products_per_cycle(p.dtype, true);
      const double local =
          (sources * x.weights + 2.0 * cell_blocks(shape) * 8192) / kSharedBytesPerCycle;
      const double step = std::max({l2, products, local}) / kCyclesPerMicrosecond +
                          (forward ? 1 : 2) * kSignalMicroseconds;
      const double turns = double(launches) * ((p.layers + layers - 1) / layers) *
                           (p.steps + layers - 1) / std::max<int64_t>(p.steps, 1);
      if (found.groups > 0 && step * turns >= found.microseconds) continue;
      found.shape = j;
      found.groups = int(groups);
      found.active = int(active);
      found.wave = layers;
      found.microseconds = step * turns;
    }
  }
  return found;
}

}  // namespace

const char* name(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::automatic: return "auto";
    case Algorithm::stepwise: return "stepwise";
    case Algorithm::persistent: return "persistent";
    case Algorithm::cluster: return "cluster";
  }
  return "?";
}

Plan plan(const Problem& p, Pass pass, const Device& device, const Settings& settings) {
  if (settings.algorithm == Algorithm::cluster)
    throw std::invalid_argument("fastlstm: the algorithm \"cluster\" has no kernels yet");
  Plan found = stepwise(p, pass, device, settings);
  if (settings.algorithm == Algorithm::stepwise) {
    found.reason = "asked for";
    return found;
  }
  const bool forced = settings.algorithm == Algorithm::persistent;
  const char* why_not = cannot_persist(p, found, device);
  const Plan other = why_not ? found : persistent(p, pass, device, found);
  if (!why_not && other.groups == 0) why_not = "the weights do not fit the GPU's shared memory";
  if (forced && why_not)
    throw std::invalid_argument(std::string("fastlstm: the algorithm \"persistent\" cannot run: ") +
                                why_not);
  if (forced || (!why_not && other.microseconds < found.microseconds)) {
    found = other;
    found.reason = forced ? "asked for" : "weights stay on chip for the whole sequence";
  } else {
    found.reason = why_not ? why_not : "its steps are estimated to be the faster ones";
  }
  return found;
}

}  // namespace cuda
}  // namespace fastlstm

#include "planner.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "tiles.h"

namespace fastlstm {
namespace cuda {
namespace {

// What bounds a step's product: on one SM, and in the L2 cache for all SMs together. Leads from
// data sheets and from others' measurements on Hopper, to be replaced by our own.
constexpr double kBytesPerCycle = 64, kL2BytesPerCycle = 3100;
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

// The tile whose product is done first: while the L2 cache delivers the operands of all CTAs, the
// busiest SM takes in those of its own and multiplies them. Of equals, the larger tile.
int best_tile(const Product& x, DType type, bool tensor_cores, const Device& device) {
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
  return best;
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

Plan plan(const Problem& p, Pass, const Device& device, const Settings& settings) {
  if (settings.algorithm != Algorithm::automatic && settings.algorithm != Algorithm::stepwise)
    throw std::invalid_argument(std::string("fastlstm: the algorithm \"") +
                                name(settings.algorithm) + "\" has no kernels yet");
  Plan found{};
  found.algorithm = Algorithm::stepwise;
  found.reason = settings.algorithm == Algorithm::stepwise
                     ? "asked for"
                     : "stepwise runs every problem and is the only algorithm so far";
  const bool half = p.dtype == DType::bf16 || p.dtype == DType::f16;
  found.tensor_cores =
      device.capability >= 80 && (half || (p.dtype == DType::f32 && settings.allow_tf32));
  auto tile = [&](int64_t columns, int64_t depth) {
    return best_tile({p.batch, columns, depth, p.directions}, p.dtype, found.tensor_cores, device);
  };
  found.gates = tile(4 * p.hidden_size, p.out_size);
  found.project = tile(p.out_size, p.hidden_size);
  found.hidden = tile(p.out_size, 4 * p.hidden_size);
  found.cell = tile(p.hidden_size, p.projected ? p.out_size : 4 * p.hidden_size);
  return found;
}

}  // namespace cuda
}  // namespace fastlstm

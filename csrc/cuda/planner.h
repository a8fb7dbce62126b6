// Which algorithm, tiles and groups a problem gets on a device, and why: one table.
#pragma once

#include <cstdint>

#include "lstm.h"

namespace fastlstm {
namespace cuda {

struct Device {
  int capability;  // 75, 80, 90, ...
  int sms;
  int64_t shared_per_block;  // bytes that a block may ask for
};

// fastlstm names them in this order.
enum class Pass { forward, backward };
enum class Algorithm { automatic, stepwise, cluster, grid };

struct Settings {
  Algorithm algorithm = Algorithm::automatic;
  bool allow_tf32 = false;  // for float32, in the steps; the large GEMMs follow torch's own flag
};

struct Plan {
  Algorithm algorithm;
  bool tensor_cores;
  // Tiles (indices of tile_shape, or kLibraryTile) of the products of a step.
  int gates, project;  // forward: W_hh with the cell, W_hr
  int hidden, cell;    // backward: the gradient of h (projected), and that with the cell
  // Cluster and grid: CTAs that share a group of sequences, units of one, sequences of a group.
  int ctas, units, sequences;
  // Grid: the kernel's shape (grid/shapes.h), groups of sequences, those of a launch.
  int shape, groups, active;
  double microseconds;  // estimate for one step of all layers; docs/kernels.md
  const char* reason;
};

// Throws std::invalid_argument where `settings` asks for what cannot run the problem.
Plan plan(const Problem& problem, Pass pass, const Device& device, const Settings& settings);

const char* name(Algorithm algorithm);

}  // namespace cuda
}  // namespace fastlstm

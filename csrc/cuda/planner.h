// The choice of an algorithm, its tiles and its groups for a problem on a device, and the reason.
#pragma once

#include <cstdint>

#include "lstm.h"

namespace fastlstm {
namespace cuda {

struct Device {
  int capability;  // 75, 80, 90, ...: of the GPU or of its code, whichever is older
  int sms;
  int64_t shared_per_block;  // bytes that a block may ask for
  // CTAs of a cluster, each with an SM of its own. They are SMs of one GPC, which may have fewer
  // than 16 on a GPU with few SMs or on a part of one.
  int largest_cluster = 16;
};

enum class Pass { forward, backward };
// In the order of fastlstm/stack.py's ALGORITHMS.
enum class Algorithm { automatic, stepwise, cluster, grid };

struct Settings {
  Algorithm algorithm = Algorithm::automatic;
  bool allow_tf32 = false;  // for float32, in the steps; the large GEMMs follow torch's own flag
};

struct Plan {
  Algorithm algorithm;
  bool tensor_cores;
  // Stepwise: the tiles (tile_shape's index, or kLibraryTile) of a step's products: the one that
  // cells follow (forward also kWideTile + wide_tile's index) and, with a projection, the one with
  // W_hr forward, with W_hh backward.
  int cell_tile, projection_tile;
  bool single_step;  // stepwise, forward: each layer is one launch (single_step.cuh)
  // Cluster and grid: the CTAs that run a group of sequences, a CTA's units, a group's sequences.
  // With one of wide_tile's: the CTAs of a cluster; 0: as many as the GPU runs best.
  int ctas, units, sequences;
  // Grid: the kernel's shape (grid/shapes.h); groups of sequences; teams that one launch runs.
  int shape, groups, active;
  // Cluster: steps of a chunk, where the layers work at once, each a chunk behind the one before;
  // 0: one layer after the other.
  int chunk_steps;
  double microseconds;  // estimate for one step of all layers; docs/kernels.md
  const char* reason;
};

// Throws std::invalid_argument where `settings` asks for what cannot run the problem.
Plan plan(const Problem& problem, Pass pass, const Device& device, const Settings& settings);

const char* name(Algorithm algorithm);

}  // namespace cuda
}  // namespace fastlstm

#include "planner.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cost_model.h"

namespace fastlstm {
namespace cuda {
namespace {

Plan stepwise(const Problem& p, Pass pass, const Device& device, const Settings& settings) {
  Plan plan{};
  plan.algorithm = Algorithm::stepwise;
  const bool half = p.dtype == DType::bf16 || p.dtype == DType::f16;
  plan.tensor_cores =
      device.capability >= 80 && (half || (p.dtype == DType::f32 && settings.allow_tf32));
  auto choose = [&](int64_t columns, int64_t depth, double moved) {
    const Product x{p.batch, columns, depth, p.directions};
    const Choice best = best_tile(x, p.dtype, plan.tensor_cores, device);
    const bool runs = best.microseconds > 0;
    if (runs && (p.dtype == DType::f64 || (half && !plan.tensor_cores))) return best;
    const double library = library_microseconds(x, p.dtype, moved);
    return runs && best.microseconds <= library ? best : Choice{kLibraryTile, library};
  };
  const bool is_forward = pass == Pass::forward;
  // Bytes that the cells move for each sum. Forward: the input part and, for every four gates, h
  // twice, c three times and the saved gates. Backward: for every unit gates, dgates, and six
  // elements of c, h and their gradients.
  Choice cell = is_forward
                    ? choose(4 * p.hidden_size, p.out_size, 10)
                    : choose(p.hidden_size, p.projected ? p.out_size : 4 * p.hidden_size, 36);
  // Clusters, and pairs of units that one access moves.
  if (is_forward && half && device.capability >= 90 && !p.projected && !p.layer_norm &&
      p.hidden_size % 8 == 0) {
    const Choice wide =
        best_wide({p.batch, 4 * p.hidden_size, p.hidden_size, p.directions}, device);
    if (wide.microseconds > 0 && wide.microseconds < cell.microseconds) cell = wide;
  }
  plan.cell_tile = cell.index;
  double step = cell.microseconds;
  if (p.projected) {
    const Choice projection = choose(p.out_size, (is_forward ? 1 : 4) * p.hidden_size, 4);
    plan.projection_tile = projection.index;
    step += projection.microseconds;
  }
  if (p.layer_norm) step += kLaunchMicroseconds;
  plan.single_step = is_forward && p.steps == 1 && p.batch <= kSingleStepRows && !p.projected &&
                     !p.layer_norm && p.dropout <= 0;
  if (plan.single_step) step = single_step_microseconds(p);
  plan.microseconds = p.layers * step;
  return plan;
}

// Why no cluster runs this problem, whatever its size; null where one does.
const char* cannot_cluster(const Problem& p, const Plan& stepwise, const Device& device) {
  if (device.capability < 90) return "clusters need a GPU of compute capability 9.0";
  if (device.shared_per_block < kClusterSharedBytes)
    return "clusters need 227 KiB of shared memory for each block";
  if (p.dtype == DType::f64) return "clusters have no float64";
  if (p.projected) return "clusters have no projection";
  if (p.layer_norm) return "clusters have no layer normalisation";
  if (p.hidden_size > (stepwise.tensor_cores ? largest_clustered(bytes_of(p.dtype)) : kLargestFp32))
    return "the recurrent weights do not fit a cluster";
  return nullptr;
}

// The cluster with the fastest steps of the whole batch; ctas is 0 where the GPU runs none.
Plan cluster(const Problem& p, Pass pass, const Device& device, const Plan& stepwise) {
  Plan best = stepwise;
  best.algorithm = Algorithm::cluster;
  best.ctas = 0;
  best.microseconds = 0;
  const int64_t bytes = bytes_of(p.dtype);
  auto consider = [&](ClusterShape shape) {
    if (shape.ctas > device.largest_cluster) return;
    const int64_t clusters = p.directions * ((p.batch + shape.sequences - 1) / shape.sequences);
    const int64_t resident = std::max(1, resident_clusters(shape.ctas, device.sms));
    const double step = p.layers * double((clusters + resident - 1) / resident) *
                        (stepwise.tensor_cores ? cluster_microseconds(shape, pass, p)
                                               : fp32_cluster_microseconds(shape, pass, p));
    if (best.microseconds > 0 && step >= best.microseconds) return;
    best.ctas = shape.ctas;
    best.units = shape.units;
    best.sequences = shape.sequences;
    best.microseconds = step;
  };
  const int alone = alone_units(p.hidden_size, bytes);
  for (int sequences : {4, 8, kMostSequences}) {
    if (!stepwise.tensor_cores) {
      for (const ForwardCluster& x : kFp32Clusters)
        if (x.ctas * x.units >= p.hidden_size)
          consider({x.ctas, x.units, fp32_sequences(x.ctas, sequences, pass == Pass::forward)});
    } else if (pass == Pass::forward) {
      for (const ForwardCluster& x : kForwardClusters)
        if (x.ctas * x.units >= p.hidden_size && runs_forward(x, bytes) &&
            (sequences > 4 || runs_four(x.ctas, x.units)) &&
            sequences <= most_sequences(x.ctas, x.units, bytes))
          consider({x.ctas, x.units, sequences});
    } else {
      if (alone > 0) {
        const int units = sequences == 4 ? std::max(alone, 64) : alone;
        consider(backward_shape({1, units, sequences}, bytes));
      }
      const int ctas = cluster_ctas(p.hidden_size), units = cluster_units(p.hidden_size);
      consider(backward_shape({ctas, units, sequences}, bytes));
    }
  }
  if (best.ctas == 0) return best;
  // The chunks' products: in half types, with tf32 at half that rate, or in full fp32.
  const double flops = !stepwise.tensor_cores ? kLibraryFp32Flops
                       : bytes == 4           ? kLibraryFlops / 2
                                              : kLibraryFlops;
  const ChunkChoice chunks =
      best_chunks(p, device, best.ctas, parts_of(p.batch, best.sequences),
                  resident_clusters(best.ctas, device.sms), flops, best.microseconds / p.layers);
  best.chunk_steps = int(chunks.steps);
  best.microseconds = chunks.microseconds;
  return best;
}

// Why the grid does not run this problem, whatever its size; null where it does.
const char* cannot_use_grid(const Problem& p, Pass pass, const Device& device) {
  if (device.capability < 80) return "the grid's kernels need a GPU of compute capability 8.0";
  if (p.dtype == DType::f64) return "the grid's kernels have no float64";
  if (p.projected) return "the grid's kernels have no projection";
  if (p.layer_norm) return "the grid's kernels have no layer normalisation";
  if (pass == Pass::forward && p.dtype != DType::f32 && p.cell.zoneout_h > 0 && p.h0)
    return "zoneout may keep an h0 beyond 1, which the grid's kernels cannot send in a half type";
  return nullptr;
}

// The teams with the fastest steps of the whole batch; groups is 0 where none fits.
Plan grid(const Problem& p, Pass pass, const Device& device, const Plan& stepwise) {
  Plan best = stepwise;
  best.algorithm = Algorithm::grid;
  best.groups = 0;
  const int bytes = int(bytes_of(p.dtype));
  const bool fp32 = !stepwise.tensor_cores;
  // Considers a shape: `parts` are those of a warp, of which the kernel holds `most_parts`;
  // `microseconds`: a step of tensor cores.
  auto consider = [&](int shape, int units, int sequences, int ctas, int parts, int most_parts,
                      int64_t shared, double microseconds) {
    const int at_once = device.sms / ctas;
    if (parts > most_parts || at_once == 0 || shared > device.shared_per_block) return;
    const int groups = parts_of(p.batch, sequences);
    const int launches = parts_of(p.directions * groups, at_once);
    if (fp32) microseconds += fma_microseconds(4.0 * units * p.hidden_size * sequences);
    const double step = p.layers * double(launches) * microseconds;
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
    for (int j = 0; j < forward_shape_count(fp32); ++j) {
      const GridShape x = forward_shape(j, fp32);
      const GridTeam team = forward_team(x, p.hidden_size, bytes);
      const int parts = parts_of(team.slabs, kGridWarps);
      consider(j, x.units, x.sequences(), team.ctas, parts, x.slabs, forward_shared(x, team.slabs),
               kGridForwardMicroseconds[j].of(parts));
    }
  } else {
    for (int j = 0; j < backward_shape_count(fp32); ++j) {
      const GridBackwardShape x = backward_shape(j, fp32);
      const GridBackwardTeam team = backward_team(x, p.hidden_size);
      const int parts = team.warp_blocks * bytes / 2;
      consider(j, x.units, x.sequences(), team.ctas, parts, x.blocks,
               backward_shared(x, team.warp_blocks, bytes),
               kGridBackwardMicroseconds[j].of(fp32 ? team.warp_blocks : parts));
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
  if (fallback.single_step && settings.algorithm == Algorithm::automatic) {
    best.reason = "a call of one step is one launch for each layer";
    return best;
  }
  const char* refusal = nullptr;  // why the last algorithm cannot run the problem
  bool choice = false;            // whether an algorithm besides stepwise can
  auto consider = [&](Algorithm algorithm, const char* why_not, const Plan& candidate) {
    const bool forced = settings.algorithm == algorithm;
    if (!forced && settings.algorithm != Algorithm::automatic) return;
    if (forced && why_not)
      throw std::invalid_argument(std::string("fastlstm: the algorithm \"") + name(algorithm) +
                                  "\" cannot run: " + why_not);
    if (why_not) refusal = why_not;
    if (why_not) return;
    choice = true;
    if (!forced && candidate.microseconds >= best.microseconds) return;
    best = candidate;
    best.reason = "weights stay on chip for the whole sequence";
    if (algorithm == Algorithm::cluster &&
        streams_weights(best.ctas, best.units, bytes_of(p.dtype)))
      best.reason = "weights stay on chip for the whole sequence, in registers and shared memory";
  };
  const char* no_cluster = cannot_cluster(p, fallback, device);
  const Plan clusters = no_cluster ? fallback : cluster(p, pass, device, fallback);
  if (!no_cluster && clusters.ctas == 0)
    no_cluster = "the GPU runs no cluster of as many CTAs as the recurrent weights need";
  const char* no_grid = cannot_use_grid(p, pass, device);
  const Plan teams = no_grid ? fallback : grid(p, pass, device, fallback);
  if (!no_grid && teams.groups == 0)
    no_grid = "no kernel of the grid holds the recurrent weights on this GPU";
  consider(Algorithm::cluster, no_cluster, clusters);
  consider(Algorithm::grid, no_grid, teams);
  if (best.algorithm == Algorithm::stepwise && pass == Pass::forward && best.cell_tile >= kWideTile)
    best.reason = "its steps, in which clusters share h, are estimated to be the fastest";
  if (settings.algorithm != Algorithm::automatic)
    best.reason = "asked for";
  else if (!choice && refusal)
    best.reason = refusal;
  return best;
}

}  // namespace cuda
}  // namespace fastlstm

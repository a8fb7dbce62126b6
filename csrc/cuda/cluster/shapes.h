// The shapes of the cluster kernels, and which of them hold a layer's recurrent weights.
#pragma once

#include "lstm.h"

namespace fastlstm {
namespace cuda {

// A cluster of `ctas` CTAs, each with `units` hidden units (ctas * units >= H), runs one direction
// of a layer for up to `sequences` sequences.
struct ClusterShape {
  int ctas, units, sequences;
};

// Forward: CTAs of a cluster and units of a CTA. Each shape runs with groups of 8 and of 16
// sequences.
struct ForwardCluster {
  int ctas, units;
};
constexpr ForwardCluster kForwardClusters[] = {{1, 64}, {2, 64}, {4, 32}, {8, 32}, {16, 32}};
constexpr int kForwardClusterCount = 5;

// Whether the registers of a CTA's eight warps hold its weights. A warp has 32 rows of W_hh: with
// 64 units in a CTA all of their K, with 32 half of it.
constexpr bool runs_forward(ForwardCluster c, int64_t bytes) {
  return c.ctas * c.units * bytes <= (c.units == 64 ? 256 : 1024);
}

// Backward: units of a CTA in a cluster; a single CTA has 32, 64 or 128.
constexpr int kClusterUnits = 32;
// CTAs of the largest cluster, and the most sequences of a group, a multiple of 8.
constexpr int kMostCtas = 16, kMostSequences = 16;

// The largest H whose weights fit the registers of a cluster.
constexpr int largest_clustered(int64_t bytes) { return bytes == 2 ? 512 : 256; }

// The fewest CTAs of a cluster that hold H units. alone_units: the units of a single CTA that holds
// them, or 0.
constexpr int cluster_ctas(int64_t hidden_size) {
  int ctas = 2;
  while (ctas * kClusterUnits < hidden_size) ctas *= 2;
  return ctas;
}
constexpr int alone_units(int64_t hidden_size, int64_t bytes) {
  const int most = bytes == 2 ? 128 : 64;
  for (int units = 32; units <= most; units *= 2)
    if (hidden_size <= units) return units;
  return 0;
}

// The backward kernel that runs a shape. One or two CTAs gain nothing from a second group of eight
// sequences: their exchange is short, so there is no wait for a second group to fill.
constexpr ClusterShape backward_shape(ClusterShape shape) {
  return {shape.ctas, shape.units, shape.ctas <= 2 || shape.sequences <= 8 ? 8 : 16};
}

// Clusters that are resident at once, one CTA an SM; measured on an H200 (132 SMs).
constexpr int resident_clusters(int ctas, int sms) {
  const int on_132 = ctas == 1 ? 132 : ctas == 2 ? 66 : ctas == 4 ? 30 : ctas == 8 ? 15 : 7;
  return on_132 * sms / 132;
}

}  // namespace cuda
}  // namespace fastlstm

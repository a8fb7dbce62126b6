// Which clusters hold a layer's recurrent weights, and how long a step of theirs takes.
#pragma once

#include "lstm.h"

namespace fastlstm {
namespace cuda {

// A cluster of `ctas` CTAs, each with `units` hidden units (ctas * units >= H), runs one direction
// of a layer for up to `sequences` sequences.
struct ClusterShape {
  int ctas, units, sequences;
};

// Forward: CTAs of a cluster and units of one, each for groups of 8 or of 16 sequences.
struct ForwardCluster {
  int ctas, units;
};
constexpr ForwardCluster kForwardClusters[] = {{1, 64}, {2, 64}, {4, 32}, {8, 32}, {16, 32}};
constexpr int kForwardClusterCount = 5;

// Whether the registers of a CTA's eight warps hold its weights: a warp has 32 rows, and of each
// all of K (64 units) or half.
constexpr bool runs_forward(ForwardCluster c, int64_t bytes) {
  return c.ctas * c.units * bytes <= (c.units == 64 ? 256 : 1024);
}

// Backward: units of a CTA that has peers; a CTA alone has 32, 64 or 128.
constexpr int kClusterUnits = 32;
// CTAs of the largest cluster, and sequences of one: a multiple of 8.
constexpr int kMostCtas = 16, kMostSequences = 16;

// Rows of H that fit the registers of a cluster: half of it for elements of four bytes.
constexpr int largest_clustered(int64_t bytes) { return bytes == 2 ? 512 : 256; }

// The fewest CTAs that hold H units; alone_units: 0, or units of a single CTA that holds them.
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

// The kernel of backward that runs a shape: one or two CTAs gain nothing from a second group of
// eight sequences, for they wait for no exchange or a short one.
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

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

// The bytes of W_hh that a CTA holds: the four gates of its units, and all of K.
constexpr int64_t weight_bytes(int ctas, int units, int64_t bytes) {
  return 4 * units * int64_t(ctas) * units * bytes;
}
// Up to so many fit the registers of the computing warps. Of more, a part is streamed: it is in
// shared memory, and every step reads it from there. Then a group has 8 sequences.
constexpr int64_t kRegisterBytes = 128 * 1024, kMostBytes = 288 * 1024;
constexpr bool streams_weights(int ctas, int units, int64_t bytes) {
  return weight_bytes(ctas, units, bytes) > kRegisterBytes;
}
// Then a warp keeps so many fragments of its weights, 512 bytes each, in registers.
constexpr int register_fragments(int units) { return units == 48 ? 26 : 36; }

// Where one CTA holds all weights and exchanges nothing, a group may have four sequences: a thread
// has half as many cells, and there are twice as many groups for SMs that would have none.
constexpr bool runs_four(int ctas, int units) { return ctas == 1 && units >= 64; }

// The most sequences of a group.
constexpr int kMostSequences = 16;
constexpr int most_sequences(int ctas, int units, int64_t bytes) {
  return streams_weights(ctas, units, bytes) ? 8 : kMostSequences;
}

// Forward: CTAs of a cluster and units of a CTA.
struct ForwardCluster {
  int ctas, units;
};
constexpr ForwardCluster kForwardClusters[] = {{1, 64}, {2, 64},  {4, 32},
                                               {8, 32}, {16, 32}, {16, 48}};
constexpr int kForwardClusterCount = 6;

// Whether a CTA holds its weights. With 64 units a warp has 32 rows of W_hh and all of their K.
constexpr bool runs_forward(ForwardCluster c, int64_t bytes) {
  return c.units == 64 ? c.ctas * c.units * bytes <= 256
                       : weight_bytes(c.ctas, c.units, bytes) <= kMostBytes;
}

// fp32 without tf32, forward and backward: W_hh in registers and, from 8 CTAs on, partly in shared
// memory. With 16 there is room for a group of 8 sequences only. A second group gains nothing where
// there is one CTA; nor, backward, where there are two.
constexpr ForwardCluster kFp32Clusters[] = {{1, 64}, {2, 32}, {4, 32}, {8, 32}, {16, 32}};
constexpr int kFp32ClusterCount = 5, kLargestFp32 = 512;
constexpr int fp32_sequences(int ctas, int sequences, bool forward) {
  if (sequences <= 4 && runs_four(ctas, 64)) return 4;
  return sequences <= 8 || ctas == 16 || ctas <= (forward ? 1 : 2) ? 8 : 16;
}

// The largest H whose weights fit a cluster.
constexpr int largest_clustered(int64_t bytes) { return bytes == 2 ? 768 : 512; }

// Backward: units of a CTA in a cluster, and the fewest CTAs that hold H units. alone_units: the
// units of a single CTA that holds them, or 0.
constexpr int cluster_units(int64_t hidden_size) { return hidden_size > 512 ? 48 : 32; }
constexpr int cluster_ctas(int64_t hidden_size) {
  int ctas = 2;
  while (ctas * cluster_units(hidden_size) < hidden_size) ctas *= 2;
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
constexpr ClusterShape backward_shape(ClusterShape shape, int64_t bytes) {
  if (shape.sequences <= 4 && runs_four(shape.ctas, shape.units))
    return {shape.ctas, shape.units, 4};
  const bool one = shape.ctas <= 2 || streams_weights(shape.ctas, shape.units, bytes);
  return {shape.ctas, shape.units, one || shape.sequences <= 8 ? 8 : 16};
}

// Clusters that are resident at once, one CTA an SM; measured on an H200 (132 SMs).
constexpr int resident_clusters(int ctas, int sms) {
  const int on_132 = ctas == 1   ? 132
                     : ctas == 2 ? 66
                     : ctas == 3 ? 43  // from the others, which fix how many SMs each GPC has
                     : ctas == 4 ? 30
                     : ctas == 8 ? 15
                                 : 7;
  return on_132 * sms / 132;
}

}  // namespace cuda
}  // namespace fastlstm

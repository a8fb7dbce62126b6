// The weights of a whole stack, packed once for any number of forward calls.
#pragma once

#include "forward_weights.h"

namespace fastlstm {
namespace {

template <class S>
struct PackedStack {
  PackedStack(const Problem& p, const Runtime& runtime) : layers(int64_t(p.layers) * p.directions) {
    for (int64_t j = 0; j < int64_t(p.layers) * p.directions; ++j) {
      const int64_t width = j < p.directions ? p.input_size : p.directions * p.out_size;
      layers.add(p, runtime, p.weights[j], width, true, false);
    }
  }

  List<ForwardWeights<S>> layers;  // one for each pseudo-layer
};

}  // namespace
}  // namespace fastlstm

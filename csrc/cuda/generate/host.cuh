// The launches that draw a text: as many groups at a time as are resident at once.
#pragma once

#include "../generate_launch.h"
#include "../shared/patience.h"
#include "kernel.cuh"

namespace fastlstm {
namespace cuda {

typedef void (*GenerateKernel)(GenerateArgs);

template <class S>
GenerateKernel generate_kernel_of(int tiles) {
  if constexpr (sizeof(S) == 2) {
    if (tiles == 4) return generate_kernel<GenerateShape<4, S>>;
    if (tiles == 8) return generate_kernel<GenerateShape<8, S>>;
  }
  return tiles == 1 ? generate_kernel<GenerateShape<1, S>> : generate_kernel<GenerateShape<2, S>>;
}

template <class S>
void generate_text(const Generate& g, const GeneratePlan& plan, void* stream, void* workspace) {
  GenerateArgs args{};
  args.layout = plan.layout;
  args.storage = g.storage;
  args.hidden_size = int(g.hidden_size);
  args.layers = g.layers;
  args.batch = g.batch;
  args.prime_steps = g.prime_steps;
  args.length = g.length;
  args.prime = g.prime;
  args.h0 = static_cast<const float*>(g.h0);
  args.c0 = static_cast<const float*>(g.c0);
  args.table = static_cast<const float*>(g.table);
  for (int layer = 0; layer < g.layers; ++layer) {
    args.ih[layer] = g.weights[layer].ih;
    args.hh[layer] = g.weights[layer].hh;
    args.bias[layer] = static_cast<const float*>(g.weights[layer].bias);
  }
  args.decoder = g.decoder;
  args.decoder_bias = static_cast<const float*>(g.decoder_bias);
  args.rules = {1.0f, g.cell.clip > 0 ? float(g.cell.clip) : INFINITY, float(1 - g.cell.zoneout_c),
                1.0f};
  args.plain = plain(g.cell);
  const int top_k = int(g.top_k < g.vocabulary ? g.top_k : 0);
  const bool filters = g.temperature > 0 && (top_k > 0 || g.top_p < 1);
  // Far above all logits, it leaves the choice to the noise, and its products are finite.
  const float factor = float(g.temperature < 1e30 ? g.temperature : 1e30);
  args.choice = {
      g.temperature, g.top_p, float(1 / g.temperature), filters ? 0 : factor,
      filters,       top_k,   int(g.vocabulary),        g.seed ? draw_keys(*g.seed) : DrawKeys{},
      g.offset};
  args.tokens = g.tokens;
  args.h_n = static_cast<float*>(g.h_n);
  args.c_n = static_cast<float*>(g.c_n);
  args.exchange = static_cast<unsigned char*>(workspace);
  args.limit = wait_limit();
  for (int first = 0; first < plan.groups; first += plan.active) {
    const int groups = plan.groups - first < plan.active ? plan.groups - first : plan.active;
    args.first_group = first;
    zero_async(workspace, size_t(groups * plan.layout.exchange_bytes), stream);
    launch_cooperative(generate_kernel_of<S>(plan.layout.tiles),
                       dim3(unsigned(groups * plan.layout.ctas)), kGenerateThreads,
                       size_t(plan.layout.bytes), stream, args);
  }
}

}  // namespace cuda
}  // namespace fastlstm

// The operator that draws text, as every device runs it: its checks, and one plain struct for the
// kernels. Values were checked in Python (fastlstm/generation/generate.py); what is checked again
// here only keeps a direct call of the operator from reading foreign memory.
//
// A device is a class: made from the table, on whose device everything has to be, it knows how
// weights are stored there (words_of: the elements of a panel) and runs the call.
#pragma once

#include "generate.h"
#include "ops_common.h"

namespace fastlstm {
namespace ops {

// Hands out pointers into tensors that it keeps alive, once their sizes are right.
template <class Device>
class Reader {
 public:
  Reader(const Device& device, ScalarType computed) : device_(device), computed_(computed) {}

  const void* read(const char* name, const Tensor& x, ScalarType type, int64_t elements) {
    STD_TORCH_CHECK(x.scalar_type() == type && x.numel() == elements, "fastlstm: ", name,
                    " must have ", elements, " elements of the right dtype, got ", x.numel());
    STD_TORCH_CHECK(device_.holds(x), "fastlstm: ", name, " is not on the table's device");
    kept_.push_back(as_contiguous(x));
    return kept_.back().const_data_ptr();
  }
  const void* read(const char* name, const MaybeTensor& x, int64_t elements) {
    return x ? read(name, *x, computed_, elements) : nullptr;
  }

 private:
  const Device& device_;
  ScalarType computed_;
  std::vector<Tensor> kept_;
};

inline int64_t panels(int64_t n, int64_t each) { return (n + each - 1) / each; }

template <class Device>
std::tuple<Tensor, Tensor, Tensor> generate_on(
    Tensor prime, MaybeTensor h0, MaybeTensor c0, Tensor table, std::vector<Tensor> weights,
    std::vector<Tensor> biases, std::vector<Tensor> scales, int64_t hidden_size, int64_t num_layers,
    int64_t proj_size, double zoneout_h, double zoneout_c, double cell_clip, int64_t length,
    double temperature, int64_t top_k, double top_p, MaybeTensor seed, int64_t offset) {
  Generate g{};
  g.hidden_size = hidden_size;
  g.projected = proj_size > 0;
  g.out_size = g.projected ? proj_size : hidden_size;
  g.layers = int(num_layers);
  g.cell = {0, zoneout_h, zoneout_c, cell_clip};
  const size_t matrices =
      size_t(num_layers * (g.projected ? 3 : 2));  // no ih below, a decoder above
  STD_TORCH_CHECK(hidden_size > 0 && num_layers > 0 && length > 0 && table.dim() == 2 &&
                      prime.dim() == 2 && prime.numel() > 0 && weights.size() == matrices &&
                      int64_t(biases.size()) == num_layers,
                  "fastlstm: generate was given sizes or weights that do not fit each other");
  STD_TORCH_CHECK(!g.projected || (zoneout_h <= 0 && zoneout_c <= 0),
                  "fastlstm: there is no zoneout with a projection");
  const Device device(table);
  STD_TORCH_CHECK(weights[0].dim() == 3, "fastlstm: packed weights must be 3-D");
  g.storage = device.storage_of(weights[0]);
  STD_TORCH_CHECK(scales.size() == (g.storage == Storage::int8 ? matrices : 0),
                  "fastlstm: int8 weights, and no others, have scales");
  g.prime_steps = prime.size(0);
  g.batch = prime.size(1);
  g.length = length;
  g.vocabulary = table.size(0);
  const ScalarType computed = g.storage == Storage::f64 ? ScalarType::Double : ScalarType::Float;
  Reader<Device> reader(device, computed);
  g.prime =
      static_cast<const int64_t*>(reader.read("prime", prime, ScalarType::Long, prime.numel()));
  device.check_tokens(g);
  g.h0 = reader.read("h0", h0, num_layers * g.batch * g.out_size);
  g.c0 = reader.read("c0", c0, num_layers * g.batch * hidden_size);

  const int64_t gates = panels(hidden_size, kGenerateUnits);
  g.table = reader.read("table", table, computed, g.vocabulary * gates * kGenerateColumns);
  size_t next = 0;
  auto matrix = [&](const char* name, int64_t count, int64_t depth) {
    const size_t j = next++;
    const void* scale =
        scales.empty() ? nullptr : reader.read(name, scales[j], computed, count * kGenerateColumns);
    const void* data = reader.read(name, weights[j], weights[0].scalar_type(),
                                   count * device.words_of(g.storage, depth));
    return PackedMatrix{data, scale, depth};
  };
  std::vector<GenerateLayer> layers(static_cast<size_t>(num_layers));
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    GenerateLayer& w = layers[layer];
    if (layer > 0) {
      w.ih = matrix("weight_ih", gates, g.out_size);
      w.bias = reader.read("bias", biases[layer - 1], computed, gates * kGenerateColumns);
    }
    w.hh = matrix("weight_hh", gates, g.out_size);
    if (g.projected) w.hr = matrix("weight_hr", panels(proj_size, kGenerateColumns), hidden_size);
  }
  const int64_t characters = panels(g.vocabulary, kGenerateColumns);
  g.decoder = matrix("decoder", characters, g.out_size);
  g.decoder_bias =
      reader.read("decoder bias", biases.back(), computed, characters * kGenerateColumns);
  g.weights = layers.data();

  g.temperature = temperature;
  g.top_k = top_k;
  g.top_p = top_p;
  g.offset = offset;
  STD_TORCH_CHECK(temperature == 0 || seed, "fastlstm: drawing needs a seed");
  if (seed) {
    STD_TORCH_CHECK(seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                    "fastlstm: seed must be one int64 element on the CPU");
    g.seed = static_cast<const int64_t*>(seed->const_data_ptr());
  }

  Tensor tokens = empty({length, g.batch}, table, ScalarType::Long);
  Tensor h_n = empty({num_layers, g.batch, g.out_size}, table, computed);
  Tensor c_n = empty({num_layers, g.batch, hidden_size}, table, computed);
  g.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  g.h_n = h_n.mutable_data_ptr();
  g.c_n = c_n.mutable_data_ptr();
  device.run(g);
  return {tokens, h_n, c_n};
}

}  // namespace ops
}  // namespace fastlstm

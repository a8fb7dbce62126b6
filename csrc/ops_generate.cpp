// The operator that draws text: its schema, its checks and one plain struct for the kernels.
// Values were checked in Python (fastlstm/generate.py); what is checked again here only keeps a
// direct call of the operator from reading foreign memory.
#include "cpu/kernels.h"
#include "ops_common.h"
#include "ops_threads.h"

namespace fastlstm {
namespace {

using namespace ops;

// Hands out pointers into tensors that it keeps alive, once their sizes are right.
class Reader {
 public:
  explicit Reader(ScalarType computed) : computed_(computed) {}

  const void* read(const char* name, const Tensor& x, ScalarType type, int64_t elements) {
    STD_TORCH_CHECK(x.scalar_type() == type && x.numel() == elements, "fastlstm: ", name,
                    " must have ", elements, " elements of the right dtype, got ", x.numel());
    kept_.push_back(as_contiguous(x));
    return kept_.back().const_data_ptr();
  }
  const void* read(const char* name, const MaybeTensor& x, int64_t elements) {
    return x ? read(name, *x, computed_, elements) : nullptr;
  }

 private:
  ScalarType computed_;
  std::vector<Tensor> kept_;
};

Storage storage_of(const Tensor& packed) {
  STD_TORCH_CHECK(packed.dim() == 3, "fastlstm: packed weights must be 3-D");
  const int64_t words = packed.size(2);
  switch (packed.scalar_type()) {
    case ScalarType::Float: return Storage::f32;
    case ScalarType::Double: return Storage::f64;
    case ScalarType::Int: return words == kGenerateColumns / 2 ? Storage::bf16 : Storage::int8;
    default: STD_TORCH_CHECK(false, "fastlstm: packed weights are float32, float64 or int32");
  }
  __builtin_unreachable();
}

int64_t words_of(Storage storage) {
  return storage == Storage::bf16   ? kGenerateColumns / 2
         : storage == Storage::int8 ? kGenerateColumns / 4
                                    : kGenerateColumns;
}

int64_t panels(int64_t n, int64_t each) { return (n + each - 1) / each; }

std::tuple<Tensor, Tensor, Tensor> generate(
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
  g.storage = storage_of(weights[0]);
  STD_TORCH_CHECK(scales.size() == (g.storage == Storage::int8 ? matrices : 0),
                  "fastlstm: int8 weights, and no others, have scales");
  g.prime_steps = prime.size(0);
  g.batch = prime.size(1);
  g.length = length;
  g.vocabulary = table.size(0);
  const ScalarType computed = g.storage == Storage::f64 ? ScalarType::Double : ScalarType::Float;
  Reader reader(computed);
  g.prime =
      static_cast<const int64_t*>(reader.read("prime", prime, ScalarType::Long, prime.numel()));
  for (int64_t j = 0; j < prime.numel(); ++j)
    STD_TORCH_CHECK(g.prime[j] >= 0 && g.prime[j] < g.vocabulary, "fastlstm: token ", g.prime[j],
                    " is outside 0 .. ", g.vocabulary - 1);
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
                                   count * depth * words_of(g.storage));
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
  if (seed) g.seed = static_cast<const int64_t*>(reader.read("seed", *seed, ScalarType::Long, 1));

  Tensor tokens = empty({length, g.batch}, table, ScalarType::Long);
  Tensor h_n = empty({num_layers, g.batch, g.out_size}, table, computed);
  Tensor c_n = empty({num_layers, g.batch, hidden_size}, table, computed);
  g.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  g.h_n = h_n.mutable_data_ptr();
  g.c_n = c_n.mutable_data_ptr();
  instruction_set().generate->storage[int(g.storage)](g, runtime());
  return {tokens, h_n, c_n};
}

}  // namespace
}  // namespace fastlstm

STABLE_TORCH_LIBRARY_FRAGMENT(fastlstm, m) {
  m.def(
      "generate(Tensor prime, Tensor? h0, Tensor? c0, Tensor table, Tensor[] weights, "
      "Tensor[] biases, Tensor[] scales, int hidden_size, int num_layers, int proj_size, "
      "float zoneout_h, float zoneout_c, float cell_clip, int length, float temperature, int "
      "top_k, float top_p, Tensor? seed, int offset) -> "
      "(Tensor tokens, Tensor h_n, Tensor c_n)");
}

STABLE_TORCH_LIBRARY_IMPL(fastlstm, CPU, m) { m.impl("generate", TORCH_BOX(&fastlstm::generate)); }

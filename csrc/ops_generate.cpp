// The operator that draws text: its schema, and the CPU's side.
#include "ops_generate.h"

#include "cpu/kernels.h"
#include "ops_threads.h"

namespace fastlstm {
namespace {

using namespace ops;

struct Cpu {
  explicit Cpu(const Tensor&) {}

  bool holds(const Tensor& x) const { return x.is_cpu(); }
  Storage storage_of(const Tensor& packed) const {
    switch (packed.scalar_type()) {
      case ScalarType::Float: return Storage::f32;
      case ScalarType::Double: return Storage::f64;
      case ScalarType::Int: return Storage::bf16;
      case ScalarType::Short: return Storage::int8;
      default:
        STD_TORCH_CHECK(false, "fastlstm: packed weights are float32, float64, int32 or int16");
    }
    __builtin_unreachable();
  }
  int64_t words_of(Storage storage, int64_t depth) const {
    return storage == Storage::bf16   ? depth * kGenerateColumns / 2
           : storage == Storage::int8 ? (depth + 1) / 2 * kGenerateColumns
                                      : depth * kGenerateColumns;
  }
  void check_tokens(const Generate& g) const {
    for (int64_t j = 0; j < g.prime_steps * g.batch; ++j)
      STD_TORCH_CHECK(g.prime[j] >= 0 && g.prime[j] < g.vocabulary, "fastlstm: token ", g.prime[j],
                      " is outside 0 .. ", g.vocabulary - 1);
  }
  void run(const Generate& g) const {
    instruction_set().generate->storage[int(g.storage)](g, runtime());
  }
};

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

STABLE_TORCH_LIBRARY_IMPL(fastlstm, CPU, m) {
  m.impl("generate", TORCH_BOX(&fastlstm::ops::generate_on<fastlstm::Cpu>));
}

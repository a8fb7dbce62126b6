#include "generate_plan.h"

#include <algorithm>

namespace fastlstm {
namespace cuda {
namespace {

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// One step of `active` groups at once. The constants were measured on an H200 for the exchange
// alone: 0.65 us for 8 KB and less, 13 ns more for every further KB that a CTA receives.
double step_microseconds(const GenerateModel& m, const GenerateLayout& l) {
  auto exchange = [](double bytes) { return 0.65 + 0.013 * std::max(0.0, bytes / 1024 - 8); };
  const double cycles = 1800;                             // a microsecond, about
  const double multiply = m.element_bytes == 2 ? 4 : 20;  // cycles for a tile, a slab and 8 columns
  const double tiles = double(2 * m.layers - 1) * l.unit_tiles + l.decoder_tiles;
  const double products = tiles * l.slabs * l.tiles * multiply / cycles;
  // A lane compares four logits for each tile and 128 characters, some six cycles each.
  const double draws = 0.2 + l.tiles * ((m.vocabulary + 127) / 128) * 4 * 6 / cycles;
  return m.layers * (exchange(double(l.state_bytes)) + 0.25) +
         exchange(4.0 * l.columns() * l.characters) + 0.2 + products + draws;
}

}  // namespace

bool generate_layout(const GenerateModel& m, int tiles, int units, GenerateLayout* layout) {
  GenerateLayout& l = *layout;
  l = {};
  if (m.hidden_size >
          generate_slabs(m.element_bytes, tiles) * kGenerateWarps * 64 / m.element_bytes ||
      units * tiles > 4 * kGenerateWarps)
    return false;
  l.units = units;
  l.tiles = tiles;
  l.depth = int(round_up(m.hidden_size, 32));
  l.slabs = l.depth * m.element_bytes / 64;
  l.ctas = l.depth / units;
  l.unit_tiles = units / 4;
  l.characters = int(round_up(m.vocabulary, 16));
  l.decoder_tiles = (l.characters / 16 + l.ctas - 1) / l.ctas;

  int64_t bytes = 0;
  auto take = [&bytes](int64_t size) {
    const int64_t at = bytes;
    bytes += round_up(size, 128);
    return int(at);
  };
  const int64_t matrices = 2 * m.layers - 1, blocks = int64_t(l.unit_tiles) * l.tiles;
  l.weights = take((matrices * l.unit_tiles + l.decoder_tiles) * l.slabs * 1024);
  l.table = take(m.vocabulary * units * 16);
  l.bias = take(m.layers * units * 16);
  l.scale = take((matrices * units + l.decoder_tiles * 4) * 16);
  l.decoder_bias = take(l.decoder_tiles * 64);
  l.start = take(m.layers * blocks * 512);
  l.cells = take(m.layers * blocks * 128);
  l.logit_start = take(int64_t(l.decoder_tiles) * l.tiles * 512);
  l.partial_bytes = int(int64_t(std::max(l.unit_tiles, l.decoder_tiles)) * l.tiles *
                        kGenerateWarps * kGeneratePartial);
  l.partial = take(2 * int64_t(l.partial_bytes));
  l.draw_room = l.characters + 4;  // rows apart for the banks of shared memory
  l.draws = take(int64_t(l.columns()) * l.draw_room * (2 * draw_bytes(m.element_bytes) + 4));
  l.tokens = take(8 * l.tiles * 4);
  l.bytes = int(std::min<int64_t>(bytes, 1 << 30));

  l.state_bytes = int64_t(l.depth) * l.columns() * m.element_bytes;
  l.exchange_bytes = round_up(2 * m.layers * l.state_bytes + l.columns() * l.characters * 4, 256);
  return true;
}

GeneratePlan generate_plan(const GenerateModel& m, const Device& device) {
  GeneratePlan best{};
  best.reason = "the weights do not fit the multiprocessors' shared memory";
  if (device.capability < 80)
    best.reason = "the GPU is older than sm_80";
  else if (m.layers > kGenerateMostLayers)
    best.reason = "there are more than 8 layers";
  else if (m.vocabulary > kGenerateMostVocabulary)
    best.reason = "the vocabulary exceeds 1024";
  if (device.capability < 80 || m.layers > kGenerateMostLayers ||
      m.vocabulary > kGenerateMostVocabulary)
    return best;

  double least = 0;
  for (int tiles = 1; tiles <= 8; tiles *= 2)
    for (int units = 4; units <= 32; units *= 2) {
      GeneratePlan p{};
      if (!generate_layout(m, tiles, units, &p.layout)) continue;
      if (p.layout.bytes > device.shared_per_block || p.layout.ctas > device.sms) continue;
      p.groups = int((m.batch + p.layout.columns() - 1) / p.layout.columns());
      p.active = std::min(p.groups, device.sms / p.layout.ctas);
      const int launches = (p.groups + p.active - 1) / p.active;
      p.microseconds = launches * step_microseconds(m, p.layout);
      if (best.reason && least == 0) least = p.microseconds + 1;
      if (p.microseconds < least) least = p.microseconds, best = p;
    }
  return best;
}

}  // namespace cuda
}  // namespace fastlstm

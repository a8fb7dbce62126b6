// The shape of the kernel that draws text for a model on a device, and whether the model fits.
#pragma once

#include <cstdint>

#include "planner.h"

namespace fastlstm {
namespace cuda {

constexpr int kGenerateWarps = 8, kGenerateThreads = 32 * kGenerateWarps;
constexpr int kGenerateMostLayers = 8;
constexpr int kGenerateMostVocabulary = 1024;
// Bytes of the sums of a tile of rows and a tile of columns: [unit 4][column 8][gate 4] floats, and
// 16 bytes of padding behind each unit.
constexpr int kGeneratePartial = 4 * 36 * 4;
// Bytes of a probability, where tokens are filtered by theirs: float for half types, whose logits
// are no more precise, double for float.
constexpr int draw_bytes(int element_bytes) { return 2 * element_bytes; }

// The columns of a product are rows of the batch, in tiles of 8. A warp holds its slice of the
// depth in registers: at most so many slabs, 64 bytes of every column each. 0: there is no such
// kernel.
constexpr int generate_slabs(int element_bytes, int tiles) {
  if (element_bytes == 4) return tiles <= 2 ? 8 : 0;
  return tiles <= 4 ? 4 : 2;
}

struct GenerateModel {
  int element_bytes;  // of weights and states on chip: 2 or 4
  int64_t hidden_size, layers, vocabulary, batch;
};

// The layout of a CTA's shared memory, in bytes, and sizes that follow from the shape.
struct GenerateLayout {
  int units, tiles, ctas;  // units of a layer that a CTA owns; tiles of columns; CTAs of a group
  int depth, slabs;        // H padded; its slabs of 64 bytes
  int unit_tiles;          // of 16 rows: four units with their gates
  int characters;          // V padded to 16
  int decoder_tiles;       // of 16 characters, the most that a CTA owns
  int draw_room;           // elements of a row's draw
  int weights, table, bias, scale, decoder_bias, start, cells, logit_start, partial, draws, tokens;
  int bytes;               // of all that
  int partial_bytes;       // of one of two buffers
  int64_t state_bytes;     // of one slot of a layer's h in the exchange
  int64_t exchange_bytes;  // of a group
  int columns() const { return 8 * tiles; }
};

struct GeneratePlan {
  const char* reason;  // why it does not run, or null
  GenerateLayout layout;
  int groups, active;   // groups of rows of the batch; groups of a launch
  double microseconds;  // estimate for one step of the whole batch; benchmarks/NOTES.md
};

GeneratePlan generate_plan(const GenerateModel& model, const Device& device);

// The layout with so many units in a CTA and tiles of columns; false where no kernel has that
// shape.
bool generate_layout(const GenerateModel& model, int tiles, int units, GenerateLayout* layout);

}  // namespace cuda
}  // namespace fastlstm

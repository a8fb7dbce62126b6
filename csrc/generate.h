// The contract between the operators and the kernels that draw text: plain structs of sizes and
// pointers, and the layout of packed weights (made by fastlstm/generation/packed_weights.py).
#pragma once

#include <cstdint>

#include "lstm.h"

namespace fastlstm {

// Rows of W (N x K) become columns: kGenerateColumns of them make a panel, [panel][k][column],
// zero-padded. A panel of gates holds 16 units: 16 columns each of i, f, g and o. The width is the
// same for every instruction set, so packed weights serve every processor.
constexpr int64_t kGenerateColumns = 64;
constexpr int64_t kGenerateUnits = kGenerateColumns / 4;

// An element of a panel is one column (f32, f64), or a word that holds more:
//   bf16  32 bits: word j holds column j in its low half and column j + 32 in its high half, which
//         are computed in float;
//   int8  16 bits: word j of row k / 2 holds column j of rows k (its low byte) and k + 1; an odd K
//         has a row of zeros more. They are multiplied with states in 16 bits, in integers.
// On a GPU every storage type has one column in each element, and there is f16 too.
enum class Storage { f32, f64, bf16, int8, f16 };

struct PackedMatrix {
  const void* data;
  const void* scale;  // a factor for every column; int8 only, else null
  int64_t depth;      // K
};

struct GenerateLayer {
  PackedMatrix ih;   // (4H, P); layer 0 has the table instead
  PackedMatrix hh;   // (4H, P)
  PackedMatrix hr;   // (P, H); data null without a projection
  const void* bias;  // b_ih + b_hh by columns; layer 0 has it in the table
};

// Elements that are not packed weights are double with f64 weights, and float otherwise.
struct Generate {
  Storage storage;
  int64_t batch, prime_steps, length, vocabulary;
  int64_t hidden_size, out_size;  // H, P (= H where there is no projection)
  bool projected;
  int layers;
  const int64_t* prime;  // (prime_steps, batch)
  const void* h0;        // (layers, batch, P) or null for zeros
  const void* c0;        // (layers, batch, H) or null for zeros
  const void* table;     // for every token its pre-activations in layer 0, by columns: W_ih + bias
  const GenerateLayer* weights;  // one for each layer
  CellOptions cell;              // as in evaluation: zoneout is its expectation
  PackedMatrix decoder;          // (vocabulary, P)
  const void* decoder_bias;      // by columns
  double temperature, top_p;     // temperature 0: the likeliest token; top_p 1: all tokens
  int64_t top_k;                 // 0: all
  const int64_t* seed;           // one element, or null at temperature 0
  int64_t offset;                // number of the first draw in the stream that the seed names
  int64_t* tokens;               // (length, batch)
  void* h_n;                     // like h0, after the prime and all tokens but the last
  void* c_n;                     // like c0
};

}  // namespace fastlstm

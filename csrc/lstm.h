// The contract between the op layer and every backend: plain structs of sizes and pointers.
// Kernels know nothing of torch. "Rows" are the (t, b) pairs of all steps in time-major order;
// sequences of different lengths are packed as in torch's PackedSequence (longest first).
#pragma once

#include <cstdint>

namespace fastlstm {

enum class DType { f32, f64, bf16, f16 };
enum class InputKind { dense, index32, index64 };

// Weights of one direction of one layer, row-major; absent ones are null.
struct CellWeights {
  const void* w_ih;  // (4H, I)
  const void* w_hh;  // (4H, P)
  const void* b_ih;  // (4H)
  const void* b_hh;  // (4H)
  const void* w_hr;  // (P, H)
  // With layer_norm: gains of W_ih x, W_hh h and c, and what is added to c's.
  const void* norm_ih;      // (4H)
  const void* norm_hh;      // (4H)
  const void* norm_c;       // (H)
  const void* norm_c_bias;  // (H)
};

// Where their gradients go; null where nobody needs one.
struct CellGrads {
  void* w_ih;
  void* w_hh;
  void* b_ih;
  void* b_hh;
  void* w_hr;
  void* norm_ih;
  void* norm_hh;
  void* norm_c;
  void* norm_c_bias;
};

// What cells do beyond nn.LSTM's (cell.h, rules.h); 0 where they do not.
struct CellOptions {
  double recurrent_dropout, zoneout_h, zoneout_c;  // probabilities
  double clip;                                     // bound of |c|
};

struct Problem {
  DType dtype;
  InputKind input_kind;
  int64_t steps, batch, rows;                 // T, B (of the first step), sum of all steps' B
  int64_t input_size, hidden_size, out_size;  // I, H, P (= H where there is no projection)
  bool projected;
  int layers, directions;
  const int64_t* batch_sizes;  // (T) on the host, or null: B at every step
  const void* input;           // element (t, b, j) at t*stride_t + b*stride_b + j
  int64_t stride_t, stride_b;  // packed: row r at r*stride_b
  const void* h0;              // (layers * directions, B, P) or null for zeros
  const void* c0;              // (layers * directions, B, H) or null for zeros
  const CellWeights* weights;  // layers * directions of them
  double dropout;              // after every layer but the last
  const int64_t* seed;         // one element, or null where nothing is drawn
  CellOptions cell;
  bool layer_norm;
};

// Numbers of a unit and row that backward reads again: the activated gates i, f, g and o; with
// layer_norm behind each kind of them those of W_ih x and those of W_hh h.
constexpr int kSavedGates = 4, kSavedWithNorm = 12;
static constexpr int saved_per_unit(bool layer_norm) {
  return layer_norm ? kSavedWithNorm : kSavedGates;
}

// What forward writes, and backward reads again. `dtype` elements unless said otherwise.
struct Saved {
  void* output;  // (rows, directions * P), the last layer's output
  void* hidden;  // (layers - 1, rows, directions * P), outputs of the other layers, undropped
  // (layers * directions, rows, saved_per_unit * H), or null for inference.
  void* gates;
  void* cells;  // (layers * directions, rows, H) cell states in the accumulation type, or null
};

struct Forward {
  Problem problem;
  Saved saved;
  void* h_n;  // like h0
  void* c_n;  // like c0
};

struct Backward {
  Problem problem;
  Saved saved;
  const void* grad_output;  // like output, or null for zeros
  const void* grad_h_n;     // like h_n, or null for zeros
  const void* grad_c_n;     // like c_n, or null for zeros
  const void* grad_cells;   // like cells, or null for zeros
  void* grad_input;         // (rows, I), or null where it is not needed
  void* grad_h0;            // like h0, or null
  void* grad_c0;            // like c0, or null
  const CellGrads* grads;   // layers * directions of them
};

}  // namespace fastlstm

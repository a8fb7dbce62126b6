// The contract between the operators and every backend: plain structs of sizes and pointers.
// Kernels know nothing of torch.
//
// Rows are the (t, b) pairs of all steps in time-major order; sequences of different lengths are
// packed as in torch's PackedSequence (longest first). One direction of one layer is a
// pseudo-layer, as cuDNN calls it; its number is layer * directions + direction.
#pragma once

#include <cstdint>

namespace fastlstm {

enum class DType { f32, f64, bf16, f16 };
enum class InputKind { dense, index32, index64 };

// The weights of a pseudo-layer, row-major; absent ones are null.
struct LayerWeights {
  const void* w_ih;  // (4H, I)
  const void* w_hh;  // (4H, P)
  const void* b_ih;  // (4H)
  const void* b_hh;  // (4H)
  const void* w_hr;  // (P, H)
  // With layer_norm: the gains of W_ih x, of W_hh h and of c, and the bias of c.
  const void* norm_ih;      // (4H)
  const void* norm_hh;      // (4H)
  const void* norm_c;       // (H)
  const void* norm_c_bias;  // (H)
};

// Where the gradients of these weights are written; null where none is needed.
struct LayerGrads {
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

// What nn.LSTM's cell does not have (cell.h, rules.h). 0: off.
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
  const int64_t* batch_sizes;   // (T) on the host, or null: B at every step
  const void* input;            // element (t, b, j) at t*stride_t + b*stride_b + j
  int64_t stride_t, stride_b;   // packed: row r at r*stride_b
  const void* h0;               // (layers * directions, B, P) or null for zeros
  const void* c0;               // (layers * directions, B, H) or null for zeros
  const LayerWeights* weights;  // one for each pseudo-layer
  double dropout;               // after every layer but the last
  const int64_t* seed;          // one element, or null where nothing is drawn
  CellOptions cell;
  bool layer_norm;
};

// How many elements forward saves for each unit of a row: the activated gates i, f, g and o, and
// with layer_norm also W_ih x and W_hh h, four elements each. A row of Saved.gates is therefore
// [i, f, g, o][H], then [W_ih x][4H], then [W_hh h][4H].
constexpr int kSavedGates = 4, kSavedWithNorm = 12;
static constexpr int saved_per_unit(bool layer_norm) {
  return layer_norm ? kSavedWithNorm : kSavedGates;
}

// What forward writes and backward reads. Elements are of `dtype` unless a comment names another.
struct Saved {
  void* output;  // (rows, directions * P), the last layer's output
  void* hidden;  // (layers - 1, rows, directions * P), outputs of the other layers, undropped
  // (layers * directions, rows, saved_per_unit * H), or null for inference.
  void* gates;
  // (layers * directions, rows, H), c of every row in the accumulation type, or null.
  void* cell_states;
};

struct Forward {
  Problem problem;
  Saved saved;
  void* h_n;           // like h0
  void* c_n;           // like c0
  const void* packed;  // the weights as a backend packed them before, or null: Problem's are read
};

struct Backward {
  Problem problem;
  Saved saved;
  const void* grad_output;       // like output, or null for zeros
  const void* grad_h_n;          // like h_n, or null for zeros
  const void* grad_c_n;          // like c_n, or null for zeros
  const void* grad_cell_states;  // like cell_states, or null for zeros
  void* grad_input;              // (rows, I), or null where it is not needed
  void* grad_h0;                 // like h0, or null
  void* grad_c0;                 // like c0, or null
  const LayerGrads* grads;       // one for each pseudo-layer
};

}  // namespace fastlstm

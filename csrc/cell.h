// The LSTM cell, forward and backward: the one place where its equations stand.
//
// Used by the CPU kernels (V a SIMD vector), the CUDA kernels (V a scalar) and their host build.
// Math supplies sigmoid and tanh for V. Gates are in PyTorch's order i, f, g, o.
// Hochreiter and Schmidhuber (1997), forget gate of Gers, Schmidhuber and Cummins (2000);
// fastlstm/reference.py derives the same equations in plain PyTorch.
#pragma once

#if defined(__CUDACC__)
#define FASTLSTM_INLINE __host__ __device__ __forceinline__
#else
#define FASTLSTM_INLINE inline __attribute__((always_inline))
#endif

namespace fastlstm {

template <class V>
struct CellForward {
  V i, f, g, o;  // activated gates
  V c;           // new cell state
  V h;           // new hidden state, before any projection
};

// Pre-activations a_* and the previous cell state to the new states.
template <class Math, class V>
FASTLSTM_INLINE CellForward<V> cell_forward(V a_i, V a_f, V a_g, V a_o, V c_prev) {
  CellForward<V> out;
  out.i = Math::sigmoid(a_i);
  out.f = Math::sigmoid(a_f);
  out.g = Math::tanh(a_g);
  out.o = Math::sigmoid(a_o);
  out.c = out.f * c_prev + out.i * out.g;
  out.h = out.o * Math::tanh(out.c);
  return out;
}

template <class V>
struct CellBackward {
  V a_i, a_f, a_g, a_o;  // gradients of the pre-activations
  V c_prev;              // gradient of the previous cell state
};

// Activated gates i..o, both cell states, and the gradients dh, dc that arrive at h_t and c_t.
template <class Math, class V>
FASTLSTM_INLINE CellBackward<V> cell_backward(V i, V f, V g, V o, V c_prev, V c, V dh, V dc) {
  const V tanh_c = Math::tanh(c);
  const V one = Math::one();
  dc = dc + dh * o * (one - tanh_c * tanh_c);
  CellBackward<V> d;
  d.a_i = dc * g * i * (one - i);
  d.a_f = dc * c_prev * f * (one - f);
  d.a_g = dc * i * (one - g * g);
  d.a_o = dh * tanh_c * o * (one - o);
  d.c_prev = dc * f;
  return d;
}

}  // namespace fastlstm

// The arguments of the kernel that draws text, and a CTA's place in its group, its rows of the
// batch and the layout of its shared memory.
#pragma once

#include "draw.cuh"
#include "generate.h"
#include "product.cuh"

namespace fastlstm {
namespace cuda {

struct GenerateArgs {
  GenerateLayout layout;
  Storage storage;  // of the weights
  int hidden_size, layers;
  int64_t batch, prime_steps, length;
  int64_t first_group;
  // As in csrc/generate.h, one column to an element.
  const int64_t* prime;
  const float *h0, *c0, *table;
  PackedMatrix ih[kGenerateMostLayers], hh[kGenerateMostLayers], decoder;
  const float *bias[kGenerateMostLayers], *decoder_bias;
  CellRules<float> rules;
  bool plain;  // without rules
  DrawChoice choice;
  int64_t* tokens;
  float *h_n, *c_n;
  unsigned char* exchange;  // layout.exchange_bytes for every group of the launch, zeros
  uint64_t limit;
};

struct TextCta {
  const GenerateArgs& args;
  const GenerateLayout& layout;
  unsigned char* const shared;
  const int rank;
  int rows;                 // of the batch, in this group
  int64_t first_row;        // the first of them
  unsigned char* exchange;  // of the group: states, then logits

  // columns: rows of the batch that a group has at most.
  __device__ __forceinline__ TextCta(const GenerateArgs& args_, unsigned char* shared_, int columns)
      : args(args_),
        layout(args_.layout),
        shared(shared_),
        rank(int(blockIdx.x) % args_.layout.ctas) {
    const int64_t group = int(blockIdx.x) / layout.ctas;
    first_row = (args.first_group + group) * columns;
    const int64_t left = args.batch - first_row;
    rows = int(left < columns ? left : columns);
    exchange = args.exchange + group * layout.exchange_bytes;
  }

  template <class T>
  __device__ __forceinline__ T* at(int offset) const {
    return reinterpret_cast<T*>(shared + offset);
  }
  // Numbers of the matrices in shared memory: W_hh of each layer, W_ih of layers 1 and up, decoder.
  __device__ __forceinline__ int hh_matrix(int layer) const { return layer; }
  __device__ __forceinline__ int ih_matrix(int layer) const { return args.layers + layer - 1; }
  __device__ __forceinline__ int decoder_matrix() const { return 2 * args.layers - 1; }
  // The weights of a tile of 16 rows; a matrix of gates has unit_tiles tiles.
  __device__ __forceinline__ const unsigned char* weights(int matrix, int tile) const {
    return shared + layout.weights + (matrix * layout.unit_tiles + tile) * layout.slabs * 1024;
  }
  // The factors of int8 weights: of the four gates of a unit, or of four characters.
  __device__ __forceinline__ float4 scale(int matrix, int unit) const {
    return at<float4>(layout.scale)[matrix * layout.units + unit];
  }
  __device__ __forceinline__ float* partial(int buffer) const {
    return at<float>(layout.partial + buffer * layout.partial_bytes);
  }
  __device__ __forceinline__ int decoder_tiles() const {  // of this CTA
    const int all = layout.characters / 16 - rank;
    return all > 0 ? (all + layout.ctas - 1) / layout.ctas : 0;
  }
};

}  // namespace cuda
}  // namespace fastlstm

// Loads a CTA's part of the model into shared memory, once for a whole text: weights, the table of
// layer 0, biases and factors.
#pragma once

#include "cta.cuh"

namespace fastlstm {
namespace cuda {

template <class Shape>
class ModelLoader {
  typedef typename Shape::Element S;
  static constexpr int kElements = 16 / int(sizeof(S));  // of a packet

 public:
  __device__ __forceinline__ explicit ModelLoader(const TextCta& cta)
      : cta_(cta), args_(cta.args), layout_(cta.layout) {}

  // Weights in the order in which lanes read them (product.cuh): chunks of 16 bytes, each of one
  // row.
  __device__ void load_weights() const {
    const int gate_tiles = cta_.decoder_matrix() * layout_.unit_tiles,
              tiles = gate_tiles + cta_.decoder_tiles();
    const int chunks = tiles * layout_.slabs * 64;
    for (int j = int(threadIdx.x); j < chunks; j += kGenerateThreads) {
      const int place = j % 64, slab = j / 64 % layout_.slabs, tile = j / 64 / layout_.slabs;
      const int row = sizeof(S) == 2 ? place / 32 * 8 + place % 32 / 4 : place / 4;
      const int k = (slab * 4 + place % 4) * kElements;
      union {
        uint4 whole;
        S elements[kElements];
      } chunk;
      for (int e = 0; e < kElements; ++e) {
        float value = 0;
        if (k + e >= args_.hidden_size) {
        } else if (tile < gate_tiles) {
          const int unit = cta_.rank * layout_.units + tile % layout_.unit_tiles * 4 + row / 4;
          if (unit < args_.hidden_size)
            value = packed(matrix(tile / layout_.unit_tiles), gate_column(unit, row % 4), k + e);
        } else {
          const int character = (cta_.rank + (tile - gate_tiles) * layout_.ctas) * 16 + row;
          if (character < args_.choice.vocabulary) value = packed(args_.decoder, character, k + e);
        }
        from_acc(value, chunk.elements[e]);
      }
      cta_.at<uint4>(layout_.weights)[j] = chunk.whole;
    }
  }

  __device__ void load_vectors() const {
    const int gates = 4 * layout_.units;
    const int64_t columns =
        (int64_t(args_.hidden_size) + kGenerateUnits - 1) / kGenerateUnits * kGenerateColumns;
    load_units(cta_.at<float>(layout_.table), args_.choice.vocabulary,
               [&](int token, int64_t column) { return args_.table[token * columns + column]; });
    load_units(cta_.at<float>(layout_.bias), args_.layers, [&](int layer, int64_t column) {
      return args_.bias[layer] ? args_.bias[layer][column] : 0;
    });
    load_units(cta_.at<float>(layout_.scale), cta_.decoder_matrix(),
               [&](int number, int64_t column) {
                 const float* scales = static_cast<const float*>(matrix(number).scale);
                 return scales ? scales[column] : 1;
               });
    const float* scales = static_cast<const float*>(args_.decoder.scale);
    for (int j = int(threadIdx.x); j < 16 * cta_.decoder_tiles(); j += kGenerateThreads) {
      const int character = (cta_.rank + j / 16 * layout_.ctas) * 16 + j % 16;
      const bool real = character < args_.choice.vocabulary;
      // No draw takes a character that only fills a tile.
      cta_.at<float>(layout_.decoder_bias)[j] = real ? args_.decoder_bias[character] : -INFINITY;
      cta_.at<float>(layout_.scale)[cta_.decoder_matrix() * gates + j] =
          real && scales ? scales[character] : 1;
    }
  }

 private:
  __device__ __forceinline__ float element(const void* from, int64_t j) const {
    switch (args_.storage) {
      case Storage::bf16: return to_acc(static_cast<const Bf16*>(from)[j]);
      case Storage::f16: return to_acc(static_cast<const F16*>(from)[j]);
      case Storage::int8: return float(static_cast<const signed char*>(from)[j]);
      default: return static_cast<const float*>(from)[j];
    }
  }
  // The packed column (csrc/generate.h) of a unit's gate.
  __device__ __forceinline__ static int64_t gate_column(int unit, int gate) {
    return int64_t(unit) / kGenerateUnits * kGenerateColumns + gate * kGenerateUnits +
           unit % kGenerateUnits;
  }
  // Element k of a packed matrix's column.
  __device__ __forceinline__ float packed(const PackedMatrix& m, int64_t column, int k) const {
    return element(m.data, (column / kGenerateColumns * m.depth + k) * kGenerateColumns +
                               column % kGenerateColumns);
  }

  __device__ __forceinline__ const PackedMatrix& matrix(int number) const {
    return number < args_.layers ? args_.hh[number] : args_.ih[number - args_.layers + 1];
  }

  // Stores value(row, gate column) of the gates of this CTA's units, for each of `rows` rows; zero
  // for units beyond H.
  template <class F>
  __device__ __forceinline__ void load_units(float* to, int rows, F&& value) const {
    const int gates = 4 * layout_.units;
    for (int j = int(threadIdx.x); j < rows * gates; j += kGenerateThreads) {
      const int unit = cta_.rank * layout_.units + j % gates / 4;
      to[j] = unit < args_.hidden_size ? value(j / gates, gate_column(unit, j % 4)) : 0;
    }
  }

  const TextCta& cta_;
  const GenerateArgs& args_;
  const GenerateLayout& layout_;
};

}  // namespace cuda
}  // namespace fastlstm

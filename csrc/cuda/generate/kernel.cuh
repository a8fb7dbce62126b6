// Draws text from a stack and its decoder: one launch for a whole text, sm_80 and newer.
//
// A group of CTAs works for 8 to 64 rows of the batch. A CTA owns `units` units of every layer,
// with their rows of W_ih and W_hh, and tiles of 16 characters of the decoder, all in shared memory
// for the whole text; so too its columns of the table that stands for layer 0's input part. All
// CTAs run at once (a cooperative launch), and groups have nothing to do with each other.
//
// A step: every CTA knows the rows' tokens. Layer 0's cells start from the table's row, and send
// their h. Then for every layer: all warps wait for their slice of that layer's h (words.cuh) and
// multiply it with what comes next, the next layer's W_ih or the decoder; behind a barrier the
// cells of the next layer are computed and sent, or the logits are; and while those travel, the
// same registers are multiplied with the layer's own W_hh, for the next step. When the logits have
// come every CTA draws every row's token by itself, from the same numbers (draw.cuh): the same
// token. A step moves (layers + 1) messages through the L2 cache, and nothing else that anyone
// waits for.
//
// Why no word is overwritten before all have read it. h of a layer at step s stands in slot s % 2.
// A CTA writes h[s + 2] over h[s] once its cells have all of W_hh h[s + 1], a sum over every CTA's
// part of h[s + 1]; and each of them computed its part from W_hh h[s], for which all its warps had
// read all of h[s]. Logits have one slot: a CTA writes those of step s + 1 from all of the last
// layer's h[s + 1], which every CTA computed from the tokens that it had drawn, row by row, from
// the logits of step s. These chains are dependencies of data, and barriers within CTAs. Why no
// reader takes an old word for a new one. The phases of one place alternate; a reader that saw
// message n there never sees one before it again (coherence of one location), and message n + 1 has
// the other phase. Places are zeroed before the launch, and the first phase is 1. Columns beyond
// the batch are neither sent nor awaited.
//
// Partial sums have two buffers, in turn: one is written again after the barrier of the other's
// sums, at which those who read it arrive when they have done so.
#pragma once

#include "draw.cuh"
#include "generate.h"
#include "product.cuh"
#include "rules.h"
#include "words.cuh"

namespace fastlstm {
namespace cuda {

struct GenerateArgs {
  GenerateLayout at;
  Storage storage;  // of the matrices
  int hidden_size, layers;
  int64_t batch, prime_steps, length;
  int64_t first_group;
  // As in csrc/generate.h, elements one by one.
  const int64_t* prime;
  const float *h0, *c0, *table;
  PackedMatrix ih[kGenerateMostLayers], hh[kGenerateMostLayers], decoder;
  const float *bias[kGenerateMostLayers], *decoder_bias;
  CellRules<float> rules;
  bool plain;  // no rules
  DrawChoice choice;
  int64_t* tokens;
  float *h_n, *c_n;
  unsigned char* exchange;  // at.exchange_bytes for every group of the launch, zeros
  uint64_t limit;
};

template <class Shape>
class TextGroup {
 public:
  typedef typename Shape::Element S;
  typedef typename std::conditional<sizeof(S) == 4, double, float>::type Probability;
  static constexpr int kElements = 16 / int(sizeof(S));  // of a packet

  __device__ __forceinline__ TextGroup(const GenerateArgs& args, unsigned char* shared)
      : a_(args),
        at_(args.at),
        shared_(shared),
        rank_(int(blockIdx.x) % args.at.ctas),
        lane_(lane_id()),
        warp_(warp_id()) {
    const int64_t group = int(blockIdx.x) / at_.ctas;
    first_row_ = (a_.first_group + group) * Shape::kColumns;
    const int64_t left = a_.batch - first_row_;
    rows_ = int(left < Shape::kColumns ? left : Shape::kColumns);
    exchange_ = a_.exchange + group * at_.exchange_bytes;
    logits_ = reinterpret_cast<float*>(exchange_ + 2 * a_.layers * at_.state_bytes);
  }

  __device__ void run() {
    load_weights();
    load_vectors();
    __syncthreads();
    for (int layer = 0; layer < a_.layers; ++layer) begin(layer);
    const int64_t steps = a_.prime_steps + a_.length - 1;
    for (int64_t s = 0; s < steps; ++s) step(s, s == steps - 1);
  }

 private:
  // ---- what stands in shared memory

  template <class T>
  __device__ __forceinline__ T* at(int offset) const {
    return reinterpret_cast<T*>(shared_ + offset);
  }
  __device__ __forceinline__ int hh_matrix(int layer) const { return layer; }
  __device__ __forceinline__ int ih_matrix(int layer) const { return a_.layers + layer - 1; }
  __device__ __forceinline__ int decoder_matrix() const { return 2 * a_.layers - 1; }
  // A tile's weights; a matrix of cells has unit_tiles of them.
  __device__ __forceinline__ const unsigned char* weights(int matrix, int tile) const {
    return shared_ + at_.weights + (matrix * at_.unit_tiles + tile) * at_.slabs * 1024;
  }
  // Factors of a matrix's rows, by units.
  __device__ __forceinline__ float4 scale(int matrix, int unit) const {
    return at<float4>(at_.scale)[matrix * at_.units + unit];
  }
  __device__ __forceinline__ float* partial(int buffer) const {
    return at<float>(at_.partial + buffer * at_.partial_bytes);
  }
  __device__ __forceinline__ int decoder_tiles() const {  // of this CTA
    const int all = at_.characters / 16 - rank_;
    return all > 0 ? (all + at_.ctas - 1) / at_.ctas : 0;
  }

  // ---- loading, once a launch

  __device__ __forceinline__ float element(const void* from, int64_t j) const {
    switch (a_.storage) {
      case Storage::bf16: return to_acc(static_cast<const Bf16*>(from)[j]);
      case Storage::f16: return to_acc(static_cast<const F16*>(from)[j]);
      case Storage::int8: return float(static_cast<const signed char*>(from)[j]);
      default: return static_cast<const float*>(from)[j];
    }
  }
  // The place in packed columns (csrc/generate.h) of a gate's row, or of a character's.
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
    return number < a_.layers ? a_.hh[number] : a_.ih[number - a_.layers + 1];
  }

  // Weights as the lanes read them (product.cuh): chunks of 16 bytes, each of one row.
  __device__ void load_weights() {
    const int cells = decoder_matrix() * at_.unit_tiles, tiles = cells + decoder_tiles();
    const int chunks = tiles * at_.slabs * 64;
    for (int j = int(threadIdx.x); j < chunks; j += kGenerateThreads) {
      const int place = j % 64, slab = j / 64 % at_.slabs, tile = j / 64 / at_.slabs;
      const int row = sizeof(S) == 2 ? place / 32 * 8 + place % 32 / 4 : place / 4;
      const int k = (slab * 4 + place % 4) * kElements;
      union {
        uint4 whole;
        S elements[kElements];
      } chunk;
      for (int e = 0; e < kElements; ++e) {
        float value = 0;
        if (k + e >= a_.hidden_size) {
        } else if (tile < cells) {
          const int unit = rank_ * at_.units + tile % at_.unit_tiles * 4 + row / 4;
          if (unit < a_.hidden_size)
            value = packed(matrix(tile / at_.unit_tiles), gate_column(unit, row % 4), k + e);
        } else {
          const int character = (rank_ + (tile - cells) * at_.ctas) * 16 + row;
          if (character < a_.choice.vocabulary) value = packed(a_.decoder, character, k + e);
        }
        from_acc(value, chunk.elements[e]);
      }
      at<uint4>(at_.weights)[j] = chunk.whole;
    }
  }

  // value(row, gate column) for this CTA's units, `rows` times, by units; zero for padding.
  template <class F>
  __device__ __forceinline__ void load_units(float* to, int rows, F&& value) {
    const int gates = 4 * at_.units;
    for (int j = int(threadIdx.x); j < rows * gates; j += kGenerateThreads) {
      const int unit = rank_ * at_.units + j % gates / 4;
      to[j] = unit < a_.hidden_size ? value(j / gates, gate_column(unit, j % 4)) : 0;
    }
  }

  __device__ void load_vectors() {
    const int gates = 4 * at_.units;
    const int64_t columns =
        (int64_t(a_.hidden_size) + kGenerateUnits - 1) / kGenerateUnits * kGenerateColumns;
    load_units(at<float>(at_.table), a_.choice.vocabulary,
               [&](int token, int64_t column) { return a_.table[token * columns + column]; });
    load_units(at<float>(at_.bias), a_.layers, [&](int layer, int64_t column) {
      return a_.bias[layer] ? a_.bias[layer][column] : 0;
    });
    load_units(at<float>(at_.scale), decoder_matrix(), [&](int number, int64_t column) {
      const float* scales = static_cast<const float*>(matrix(number).scale);
      return scales ? scales[column] : 1;
    });
    const float* scales = static_cast<const float*>(a_.decoder.scale);
    for (int j = int(threadIdx.x); j < 16 * decoder_tiles(); j += kGenerateThreads) {
      const int character = (rank_ + j / 16 * at_.ctas) * 16 + j % 16;
      const bool real = character < a_.choice.vocabulary;
      at<float>(at_.decoder_bias)[j] = real ? a_.decoder_bias[character] : 0;
      at<float>(at_.scale)[decoder_matrix() * gates + j] = real && scales ? scales[character] : 1;
    }
  }

  // ---- cells: blocks of a tile of units and a tile of columns, each a warp's for the whole text

  struct Cell {
    int tile, n;       // of the block
    int unit, column;  // of the CTA, of the group
    int place;         // among the cells of a layer
  };
  // f(cell) for this thread's cells of `tiles` tiles of rows.
  template <class F>
  __device__ __forceinline__ void for_cells(int tiles, F&& f) const {
    for (int block = warp_; block < tiles * Shape::kTiles; block += kGenerateWarps) {
      const int tile = block / Shape::kTiles, n = block % Shape::kTiles;
      f(Cell{tile, n, tile * 4 + lane_ / 8, n * 8 + lane_ % 8, block * 32 + lane_});
    }
  }
  __device__ __forceinline__ int layer_place(int layer, const Cell& cell) const {
    return layer * at_.unit_tiles * Shape::kTiles * 32 + cell.place;
  }
  __device__ __forceinline__ float4 sums(int matrix, int buffer, const Cell& cell) const {
    const float4 factor = scale(matrix, cell.unit);
    const float4 sum = total_of<Shape>(partial(buffer), cell.tile, cell.n, lane_ / 8, lane_ % 8);
    return make_float4(sum.x * factor.x, sum.y * factor.y, sum.z * factor.z, sum.w * factor.w);
  }
  __device__ __forceinline__ static float4 plus(const float4& x, const float4& y) {
    return make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
  }

  __device__ __forceinline__ void multiply(int matrix, int tiles, const uint4 (&b)[Shape::kPackets],
                                           int buffer) const {
    for (int tile = 0; tile < tiles; ++tile)
      multiply_tile<Shape>(weights(matrix, tile), at_.slabs, b, partial(buffer), tile);
  }

  // Where the next step's cells of a layer start: bias + W_hh h.
  __device__ __forceinline__ void prepare(int layer, const uint4 (&b)[Shape::kPackets]) {
    multiply(hh_matrix(layer), at_.unit_tiles, b, 1);
    __syncthreads();
    for_cells(at_.unit_tiles, [&](const Cell& cell) {
      const float4 bias = at<float4>(at_.bias)[layer * at_.units + cell.unit];
      at<float4>(at_.start)[layer_place(layer, cell)] = plus(bias, sums(hh_matrix(layer), 1, cell));
    });
  }

  // The states before the first step.
  __device__ void begin(int layer) {
    uint4 b[Shape::kPackets];
#pragma unroll
    for (int j = 0; j < Shape::kPackets; ++j) {
      const int slab = j / Shape::kTiles * kGenerateWarps + warp_;
      const int column = j % Shape::kTiles * 8 + lane_ / 4;
      union {
        uint4 whole;
        S elements[kElements];
      } packet;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const int k = (slab * 4 + lane_ % 4) * kElements + e;
        const bool real = a_.h0 && k < a_.hidden_size && column < rows_;
        from_acc(real ? settled(a_.h0[state_place(layer, column) + k], S()) : 0.0f,
                 packet.elements[e]);
      }
      b[j] = packet.whole;
    }
    __syncthreads();  // the buffer of the layer before has been read
    prepare(layer, b);
    for_cells(at_.unit_tiles, [&](const Cell& cell) {
      const int unit = rank_ * at_.units + cell.unit;
      const bool real = a_.c0 && unit < a_.hidden_size && cell.column < rows_;
      at<float>(at_.cells)[layer_place(layer, cell)] =
          real ? a_.c0[state_place(layer, cell.column) + unit] : 0;
    });
  }
  __device__ __forceinline__ int64_t state_place(int layer, int column) const {
    return (layer * a_.batch + first_row_ + column) * a_.hidden_size;
  }

  // ---- a step

  __device__ __forceinline__ unsigned char* slot(int layer, int64_t s) const {
    return exchange_ + (2 * layer + s % 2) * at_.state_bytes;
  }

  // A layer's cells from their pre-activations, to everyone.
  __device__ __forceinline__ void finish(int layer, const Cell& cell, const float4& more, int64_t s,
                                         bool last) {
    const int place = layer_place(layer, cell);
    const float4 z = plus(at<float4>(at_.start)[place], more);
    float& c = at<float>(at_.cells)[place];
    typedef typename std::conditional<sizeof(S) == 4, Math<float>, FastMath>::type Functions;
    const CellForward<float> out =
        a_.plain ? cell_forward<Functions>(z.x, z.y, z.z, z.w, c)
                 : cell_forward<Functions>(z.x, z.y, z.z, z.w, c, 0.0f, a_.rules);
    c = out.c;
    const int unit = rank_ * at_.units + cell.unit;
    const bool sends = cell.column < rows_;
    unsigned char* to = slot(layer, s) +
                        (int64_t(unit / kElements) * Shape::kColumns + cell.column) * 16 +
                        unit % kElements * int(sizeof(S));
    const uint32_t phase = phase_of<S>(s, 2);
    if constexpr (sizeof(S) == 4) {
      if (sends) send_word(to, (bits_of<uint32_t>(out.h) & ~1u) | phase);
    } else {
      const float odd = __shfl_xor_sync(~0u, out.h, 8);  // of the next unit
      if (sends && unit % 2 == 0) send_word(to, pair_word<S>(out.h, odd) | phase);
    }
    if (last && sends && unit < a_.hidden_size) {
      a_.h_n[state_place(layer, cell.column) + unit] = settled(out.h, S());
      a_.c_n[state_place(layer, cell.column) + unit] = out.c;
    }
  }

  __device__ __forceinline__ void receive_states(int layer, int64_t s,
                                                 uint4 (&b)[Shape::kPackets]) const {
    const unsigned char* from[Shape::kPackets];
#pragma unroll
    for (int j = 0; j < Shape::kPackets; ++j) {
      const int slab = j / Shape::kTiles * kGenerateWarps + warp_;
      const int column = j % Shape::kTiles * 8 + lane_ / 4;
      from[j] = slab < at_.slabs && column < rows_
                    ? slot(layer, s) + ((slab * 4 + lane_ % 4) * Shape::kColumns + column) * 16
                    : nullptr;
    }
    receive<S>(b, from, phase_of<S>(s, 2), a_.limit);
  }

  __device__ void step(int64_t s, bool last) {
    const int64_t drawn = s - (a_.prime_steps - 1);
    for_cells(at_.unit_tiles, [&](const Cell& cell) {
      const int token = token_of(s, cell.column);
      finish(0, cell, at<float4>(at_.table)[token * at_.units + cell.unit], s, last);
    });
    for (int layer = 0; layer < a_.layers; ++layer) {
      uint4 b[Shape::kPackets];
      receive_states(layer, s, b);
      if (layer + 1 < a_.layers) {
        multiply(ih_matrix(layer + 1), at_.unit_tiles, b, 0);
        __syncthreads();
        for_cells(at_.unit_tiles, [&](const Cell& cell) {
          finish(layer + 1, cell, sums(ih_matrix(layer + 1), 0, cell), s, last);
        });
      } else if (drawn >= 0) {
        multiply(decoder_matrix(), decoder_tiles(), b, 0);
        __syncthreads();
        send_logits(drawn);
      } else {
        __syncthreads();  // the partial sums of the layer before have been read
      }
      prepare(layer, b);
    }
    if (drawn >= 0) draw_all(drawn);
  }

  __device__ __forceinline__ int token_of(int64_t s, int column) const {
    if (column >= rows_) return 0;
    if (s >= a_.prime_steps) return at<int>(at_.tokens)[column];
    const int64_t token = a_.prime[s * a_.batch + first_row_ + column];
    return token >= 0 && token < a_.choice.vocabulary ? int(token) : 0;
  }

  __device__ __forceinline__ void send_logits(int64_t drawn) const {
    const uint32_t phase = phase_of<float>(drawn, 1);
    for_cells(decoder_tiles(), [&](const Cell& cell) {
      if (cell.column >= rows_) return;
      const float4 logits =
          plus(at<float4>(at_.decoder_bias)[cell.unit], sums(decoder_matrix(), 0, cell));
      const uint4 words = make_uint4(logit_word(logits.x, phase), logit_word(logits.y, phase),
                                     logit_word(logits.z, phase), logit_word(logits.w, phase));
      const int character = (rank_ + cell.tile * at_.ctas) * 16 + lane_ / 8 * 4;
      send_packet(logits_ + cell.column * at_.characters + character, words);
    });
  }

  // Every row's token: a warp draws as many rows as there are tiles, each with its share of lanes.
  __device__ __forceinline__ void draw_all(int64_t drawn) {
    constexpr int kLanes = 32 / Shape::kTiles, kPolls = Shape::kTiles;
    if (warp_ * Shape::kTiles < rows_) {
      const int column = warp_ * Shape::kTiles + lane_ / kLanes, lane = lane_ % kLanes;
      const bool real = column < rows_;
      const float* row = logits_ + column * at_.characters;
      const Probability number =
          Probability(draw_number(a_.choice.seed, a_.choice.offset + drawn, first_row_ + column));
      Probability* numbers = at<Probability>(at_.draws);
      const DrawRoom<Probability> room{
          numbers + column * at_.draw_room, numbers + (Shape::kColumns + column) * at_.draw_room,
          reinterpret_cast<int*>(numbers + 2 * Shape::kColumns * at_.draw_room) +
              column * at_.draw_room};
      for (int first = 0; first < at_.characters; first += kLanes * kPolls * 4) {
        const unsigned char* from[kPolls];
        uint4 v[kPolls];
#pragma unroll
        for (int j = 0; j < kPolls; ++j) {
          const int character = first + (j * kLanes + lane) * 4;
          from[j] = real && character < at_.characters
                        ? reinterpret_cast<const unsigned char*>(row + character)
                        : nullptr;
        }
        receive<float>(v, from, phase_of<float>(drawn, 1), a_.limit);
#pragma unroll
        for (int j = 0; j < kPolls; ++j) {
          const int character = first + (j * kLanes + lane) * 4;
          if (character < at_.characters) {
            room.values[character] = bits_of<float>(v[j].x);
            room.values[character + 1] = bits_of<float>(v[j].y);
            room.values[character + 2] = bits_of<float>(v[j].z);
            room.values[character + 3] = bits_of<float>(v[j].w);
          }
        }
      }
      __syncwarp();
      const int token = TeamDraw<kLanes, Probability>(a_.choice, room).token(number);
      if (real && lane == 0) {
        at<int>(at_.tokens)[column] = token;
        if (rank_ == 0) a_.tokens[drawn * a_.batch + first_row_ + column] = token;
      }
    }
    __syncthreads();
  }

  const GenerateArgs& a_;
  const GenerateLayout& at_;
  unsigned char* const shared_;
  const int rank_, lane_, warp_;
  int rows_;
  int64_t first_row_;
  unsigned char* exchange_;
  float* logits_;
};

template <class Shape>
__global__ void __launch_bounds__(kGenerateThreads, 1)
    generate_kernel(const __grid_constant__ GenerateArgs args) {
#if FASTLSTM_SM80
  FASTLSTM_SHARED_BUFFER(shared);
  TextGroup<Shape>(args, shared).run();
#endif
}

}  // namespace cuda
}  // namespace fastlstm

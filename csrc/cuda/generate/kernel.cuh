// Draws text from a stack and its decoder: one launch for a whole text, sm_80 and newer.
//
// Who owns what: a group of CTAs works for 8 to 64 rows of the batch. A CTA owns `units` units of
// every layer, with their rows of W_ih and W_hh, tiles of 16 characters of the decoder, and its
// columns of the table that stands for the input part of layer 0. All of that is in shared memory
// for the whole text. All CTAs are resident at once (a cooperative launch); groups exchange
// nothing.
//
// A step: every CTA knows the rows' tokens. The cells of layer 0 start from the table's row, and
// their h is sent. Then for every layer: each warp waits for its slice of the layer's h (words.cuh)
// and multiplies it with what comes next, W_ih of the next layer or the decoder. Behind a barrier,
// the next layer's cells or the logits are computed and sent. While those travel, the same
// registers are multiplied with the layer's own W_hh, for the next step. A CTA adds to its logits,
// before they are sent, the noise that decides the draw, computed while the step's first message
// travels: what remains of a draw is to find the largest number (draw.cuh). Every CTA does that for
// every row, so that no token travels. A step sends layers + 1 messages through the L2 cache, and
// waits for nothing else.
//
// Why no word is overwritten before all have read it. h of a layer at step s has slot s % 2.
//  * A CTA writes h[s + 2] over h[s] after its cells have all of W_hh h[s + 1], to which every CTA
//    gave its part of h[s + 1]. Each CTA computed its part from W_hh h[s], for which all its warps
//    had read all of h[s].
//  * Logits have one slot. A CTA writes those of step s + 1 from all of the last layer's h[s + 1],
//    which every CTA computed from the tokens that it had drawn, for every row, from the logits of
//    step s.
// These chains consist of data dependencies and of barriers within CTAs.
//
// Why no reader takes an old word for a new one. The phases of one slot alternate. A reader that
// saw message n there never sees an earlier one again (coherence of one location), and message n +
// 1 has the other phase. The slots are zeroed before the launch, and the first phase is 1. Columns
// beyond the batch are neither sent nor awaited.
//
// Partial sums have two buffers in turn: one is written again after the barrier of the other's
// sums, at which its readers arrive when they have read it.
#pragma once

#include "cta.cuh"
#include "load.cuh"
#include "rules.h"
#include "words.cuh"

namespace fastlstm {
namespace cuda {

template <class Shape>
class TextGroup {
 public:
  typedef typename Shape::Element S;
  typedef typename std::conditional<sizeof(S) == 4, double, float>::type Probability;
  static constexpr int kElements = 16 / int(sizeof(S));  // of a packet
  static constexpr int kTeam = 32 / Shape::kTiles;       // lanes that draw a row's token

  __device__ __forceinline__ TextGroup(const GenerateArgs& args, unsigned char* shared)
      : args_(args),
        layout_(args.layout),
        cta_(args, shared, Shape::kColumns),
        lane_(lane_id()),
        warp_(warp_id()),
        logits_(reinterpret_cast<float*>(cta_.exchange + 2 * args.layers * layout_.state_bytes)) {}

  __device__ void run() {
    const ModelLoader<Shape> loader(cta_);
    loader.load_weights();
    loader.load_vectors();
    __syncthreads();
    for (int layer = 0; layer < args_.layers; ++layer) begin(layer);
    const int64_t steps = args_.prime_steps + args_.length - 1;
    for (int64_t s = 0; s < steps; ++s) step(s, s == steps - 1);
    write_tokens(args_.length - 1);
  }

 private:
  // ---- sums: a block is a tile of rows and a tile of columns, and has the same warp all the time

  struct Place {
    int tile, n;       // of the block
    int unit, column;  // of the CTA, of the group
    int index;         // among the cells of a layer
  };
  // Calls f(place) for this thread's sums of `tiles` tiles of rows.
  template <class F>
  __device__ __forceinline__ void for_places(int tiles, F&& f) const {
    for (int block = warp_; block < tiles * Shape::kTiles; block += kGenerateWarps) {
      const int tile = block / Shape::kTiles, n = block % Shape::kTiles;
      f(Place{tile, n, tile * 4 + lane_ / 8, n * 8 + lane_ % 8, block * 32 + lane_});
    }
  }
  __device__ __forceinline__ int layer_index(int layer, const Place& place) const {
    return layer * layout_.unit_tiles * Shape::kTiles * 32 + place.index;
  }
  __device__ __forceinline__ float4 sums(int matrix, int buffer, const Place& place) const {
    const float4 factor = cta_.scale(matrix, place.unit);
    const float4 sum =
        total_of<Shape>(cta_.partial(buffer), place.tile, place.n, lane_ / 8, lane_ % 8);
    return make_float4(sum.x * factor.x, sum.y * factor.y, sum.z * factor.z, sum.w * factor.w);
  }
  __device__ __forceinline__ static float4 plus(const float4& x, const float4& y) {
    return make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
  }

  __device__ __forceinline__ void multiply(int matrix, int tiles, const uint4 (&b)[Shape::kPackets],
                                           int buffer) const {
    for (int tile = 0; tile < tiles; ++tile)
      multiply_tile<Shape>(cta_.weights(matrix, tile), layout_.slabs, b, cta_.partial(buffer),
                           tile);
  }

  // What the next step's cells of a layer start from: bias + W_hh h.
  __device__ __forceinline__ void prepare(int layer, const uint4 (&b)[Shape::kPackets]) {
    multiply(cta_.hh_matrix(layer), layout_.unit_tiles, b, 1);
    __syncthreads();
    for_places(layout_.unit_tiles, [&](const Place& place) {
      const float4 bias = cta_.at<float4>(layout_.bias)[layer * layout_.units + place.unit];
      cta_.at<float4>(layout_.start)[layer_index(layer, place)] =
          plus(bias, sums(cta_.hh_matrix(layer), 1, place));
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
        const bool real = args_.h0 && k < args_.hidden_size && column < cta_.rows;
        from_acc(real ? settled(args_.h0[state_place(layer, column) + k], S()) : 0.0f,
                 packet.elements[e]);
      }
      b[j] = packet.whole;
    }
    __syncthreads();  // the buffer of the previous layer has been read
    prepare(layer, b);
    for_places(layout_.unit_tiles, [&](const Place& place) {
      const int unit = cta_.rank * layout_.units + place.unit;
      const bool real = args_.c0 && unit < args_.hidden_size && place.column < cta_.rows;
      cta_.at<float>(layout_.cells)[layer_index(layer, place)] =
          real ? args_.c0[state_place(layer, place.column) + unit] : 0;
    });
  }
  __device__ __forceinline__ int64_t state_place(int layer, int column) const {
    return (layer * args_.batch + cta_.first_row + column) * args_.hidden_size;
  }

  // What the logits of this CTA start from: the decoder's bias, and the noise of a draw where every
  // token may be drawn. A thread reads what it has written itself.
  __device__ __forceinline__ void begin_logits(int64_t drawn) const {
    for_places(cta_.decoder_tiles(), [&](const Place& place) {
      float4 start = cta_.at<float4>(layout_.decoder_bias)[place.unit];
      const float factor = args_.choice.noise;
      if (factor > 0) {
        const DrawRow row = row_of(drawn, place.column);
        const int token = first_character(place);
        start.x = fmaf(factor, gumbel(row, token), start.x);
        start.y = fmaf(factor, gumbel(row, token + 1), start.y);
        start.z = fmaf(factor, gumbel(row, token + 2), start.z);
        start.w = fmaf(factor, gumbel(row, token + 3), start.w);
      }
      cta_.at<float4>(layout_.logit_start)[place.index] = start;
    });
  }
  __device__ __forceinline__ DrawRow row_of(int64_t drawn, int column) const {
    return draw_row(args_.choice.keys, args_.choice.offset + drawn, cta_.first_row + column);
  }
  __device__ __forceinline__ int first_character(const Place& place) const {
    return (cta_.rank + place.tile * layout_.ctas) * 16 + lane_ / 8 * 4;
  }

  // ---- a step

  __device__ __forceinline__ unsigned char* slot(int layer, int64_t s) const {
    return cta_.exchange + (2 * layer + s % 2) * layout_.state_bytes;
  }

  // Computes a layer's cells from their pre-activations, and sends h to all CTAs.
  __device__ __forceinline__ void finish(int layer, const Place& place, const float4& sum,
                                         int64_t s, bool last) {
    const int index = layer_index(layer, place);
    const float4 z = plus(cta_.at<float4>(layout_.start)[index], sum);
    float& c = cta_.at<float>(layout_.cells)[index];
    typedef typename std::conditional<sizeof(S) == 4, Math<float>, FastMath>::type Functions;
    const CellForward<float> out =
        args_.plain ? cell_forward<Functions>(z.x, z.y, z.z, z.w, c)
                    : cell_forward<Functions>(z.x, z.y, z.z, z.w, c, 0.0f, args_.rules);
    c = out.c;
    const int unit = cta_.rank * layout_.units + place.unit;
    const bool sends = place.column < cta_.rows;
    unsigned char* to = slot(layer, s) +
                        (int64_t(unit / kElements) * Shape::kColumns + place.column) * 16 +
                        unit % kElements * int(sizeof(S));
    const uint32_t phase = phase_of<S>(s, 2);
    if constexpr (sizeof(S) == 4) {
      if (sends) send_word(to, (bits_of<uint32_t>(out.h) & ~1u) | phase);
    } else {
      const float odd = __shfl_xor_sync(~0u, out.h, 8);  // of the next unit
      if (sends && unit % 2 == 0) send_word(to, pair_word<S>(out.h, odd) | phase);
    }
    if (last && sends && unit < args_.hidden_size) {
      args_.h_n[state_place(layer, place.column) + unit] = settled(out.h, S());
      args_.c_n[state_place(layer, place.column) + unit] = out.c;
    }
  }

  __device__ __forceinline__ void receive_states(int layer, int64_t s,
                                                 uint4 (&b)[Shape::kPackets]) const {
    const unsigned char* from[Shape::kPackets];
#pragma unroll
    for (int j = 0; j < Shape::kPackets; ++j) {
      const int slab = j / Shape::kTiles * kGenerateWarps + warp_;
      const int column = j % Shape::kTiles * 8 + lane_ / 4;
      from[j] = slab < layout_.slabs && column < cta_.rows
                    ? slot(layer, s) + ((slab * 4 + lane_ % 4) * Shape::kColumns + column) * 16
                    : nullptr;
    }
    receive<S>(b, from, phase_of<S>(s, 2), args_.limit);
  }

  __device__ void step(int64_t s, bool last) {
    const int64_t drawn = s - (args_.prime_steps - 1);
    for_places(layout_.unit_tiles, [&](const Place& place) {
      const int token = token_of(s, place.column);
      finish(0, place, cta_.at<float4>(layout_.table)[token * layout_.units + place.unit], s, last);
    });
    if (drawn > 0) write_tokens(drawn - 1);
    if (drawn >= 0) begin_logits(drawn);
    for (int layer = 0; layer < args_.layers; ++layer) {
      uint4 b[Shape::kPackets];
      receive_states(layer, s, b);
      if (layer + 1 < args_.layers) {
        multiply(cta_.ih_matrix(layer + 1), layout_.unit_tiles, b, 0);
        __syncthreads();
        for_places(layout_.unit_tiles, [&](const Place& place) {
          finish(layer + 1, place, sums(cta_.ih_matrix(layer + 1), 0, place), s, last);
        });
      } else if (drawn >= 0) {
        multiply(cta_.decoder_matrix(), cta_.decoder_tiles(), b, 0);
        __syncthreads();
        send_logits(drawn);
      } else {
        __syncthreads();  // the previous layer's partial sums have been read
      }
      prepare(layer, b);
    }
    if (drawn >= 0) draw_all(drawn);
  }

  __device__ __forceinline__ int token_of(int64_t s, int column) const {
    if (column >= cta_.rows) return 0;
    if (s >= args_.prime_steps) return cta_.at<int>(layout_.tokens)[column];
    const int64_t token = args_.prime[s * args_.batch + cta_.first_row + column];
    return token >= 0 && token < args_.choice.vocabulary ? int(token) : 0;
  }

  __device__ __forceinline__ void send_logits(int64_t drawn) const {
    const uint32_t phase = phase_of<float>(drawn, 1);
    for_places(cta_.decoder_tiles(), [&](const Place& place) {
      if (place.column >= cta_.rows) return;
      const float4 logits = plus(cta_.at<float4>(layout_.logit_start)[place.index],
                                 sums(cta_.decoder_matrix(), 0, place));
      const uint4 words = make_uint4(logit_word(logits.x, phase), logit_word(logits.y, phase),
                                     logit_word(logits.z, phase), logit_word(logits.w, phase));
      send_packet(logits_ + place.column * layout_.characters + first_character(place), words);
    });
  }

  // Calls f(character, logits) for four logits at a time of a row; a team of lanes shares them, in
  // ascending order in each lane. A team without a row sees zeros.
  template <class F>
  __device__ __forceinline__ void receive_logits(int64_t drawn, int column, F&& f) const {
    constexpr int kPolls = Shape::kTiles;
    const float* row = logits_ + column * layout_.characters;
    for (int first = 0; first < layout_.characters; first += kTeam * kPolls * 4) {
      auto character = [&](int j) { return first + (j * kTeam + lane_ % kTeam) * 4; };
      const unsigned char* from[kPolls];
      uint4 v[kPolls];
#pragma unroll
      for (int j = 0; j < kPolls; ++j)
        from[j] = column < cta_.rows && character(j) < layout_.characters
                      ? reinterpret_cast<const unsigned char*>(row + character(j))
                      : nullptr;
      receive<float>(v, from, phase_of<float>(drawn, 1), args_.limit);
#pragma unroll
      for (int j = 0; j < kPolls; ++j)
        if (character(j) < layout_.characters)
          f(character(j), make_float4(bits_of<float>(v[j].x), bits_of<float>(v[j].y),
                                      bits_of<float>(v[j].z), bits_of<float>(v[j].w)));
    }
  }

  // Draws every row's token. A warp draws as many rows as there are tiles, each with its team of
  // lanes.
  __device__ __forceinline__ void draw_all(int64_t drawn) const {
    if (warp_ * Shape::kTiles < cta_.rows) {
      const int column = warp_ * Shape::kTiles + lane_ / kTeam;
      const int token = args_.choice.filters ? filtered(drawn, column) : likeliest(drawn, column);
      if (column < cta_.rows && lane_ % kTeam == 0) cta_.at<int>(layout_.tokens)[column] = token;
    }
    __syncthreads();
  }
  // Behind what the other CTAs wait for.
  __device__ __forceinline__ void write_tokens(int64_t drawn) const {
    const int column = int(threadIdx.x);
    if (cta_.rank == 0 && column < cta_.rows)
      args_.tokens[drawn * args_.batch + cta_.first_row + column] =
          cta_.at<int>(layout_.tokens)[column];
  }
  __device__ __forceinline__ int likeliest(int64_t drawn, int column) const {
    TeamBest<kTeam, float> best;
    receive_logits(drawn, column, [&](int character, const float4& logits) {
      best.see(logits.x, character);
      best.see(logits.y, character + 1);
      best.see(logits.z, character + 2);
      best.see(logits.w, character + 3);
    });
    best.unite();
    return best.token;
  }
  __device__ __forceinline__ int filtered(int64_t drawn, int column) const {
    Probability* numbers = cta_.at<Probability>(layout_.draws);
    const DrawRoom<Probability> room{
        numbers + column * layout_.draw_room,
        numbers + (Shape::kColumns + column) * layout_.draw_room,
        reinterpret_cast<int*>(numbers + 2 * Shape::kColumns * layout_.draw_room) +
            column * layout_.draw_room};
    receive_logits(drawn, column, [&](int character, const float4& logits) {
      room.values[character] = logits.x;
      room.values[character + 1] = logits.y;
      room.values[character + 2] = logits.z;
      room.values[character + 3] = logits.w;
    });
    __syncwarp();
    return FilteredDraw<kTeam, Probability>(args_.choice, room).token(row_of(drawn, column));
  }

  const GenerateArgs& args_;
  const GenerateLayout& layout_;
  const TextCta cta_;
  const int lane_, warp_;
  float* const logits_;
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

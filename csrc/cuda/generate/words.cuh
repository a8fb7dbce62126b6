// How states and logits travel through the L2 cache: as 32-bit words that say themselves to which
// step they belong, by one bit of each, the phase.
//
// Half types: a word holds units k and k + 1 of a row. |h| <= 1 (there is no zoneout of h here), so
// the top bit of an exponent is 0: that of unit k carries the phase. A NaN has it set: a NaN of
// unit k makes the word's other half NaN and leaves 0, which no sum over k can tell apart.
// float: the lowest bit of the mantissa carries the phase, and is 0 in what is computed with.
#pragma once

#include <cstring>

#include "../exchange.cuh"
#include "../numeric.cuh"

namespace fastlstm {
namespace cuda {

template <class S>
struct Words {
  static constexpr uint32_t kPhase = 0x4000;
};
template <>
struct Words<float> {
  static constexpr uint32_t kPhase = 1;
};

template <class To, class From>
__device__ __forceinline__ To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "sizes");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// The phase of message number n at a place that takes every `slots`-th message.
template <class S>
__device__ __forceinline__ uint32_t phase_of(int64_t n, int slots) {
  return n / slots % 2 == 0 ? Words<S>::kPhase : 0;
}

// Not 0 where a word is of another message.
template <class S>
__device__ __forceinline__ uint32_t missing(const uint4& v, uint32_t phase) {
  return ((v.x ^ phase) | (v.y ^ phase) | (v.z ^ phase) | (v.w ^ phase)) & Words<S>::kPhase;
}
template <class S>
__device__ __forceinline__ uint4 without_phase(const uint4& v) {
  constexpr uint32_t kept = ~Words<S>::kPhase;
  return make_uint4(v.x & kept, v.y & kept, v.z & kept, v.w & kept);
}

__device__ __forceinline__ uint32_t logit_word(float x, uint32_t phase) {
  return (bits_of<uint32_t>(x) & ~1u) | phase;
}

// What a state is worth once it has travelled.
__device__ __forceinline__ float settled(float x, float) {
  return bits_of<float>(bits_of<uint32_t>(x) & ~1u);
}
template <class S>
__device__ __forceinline__ float settled(float x, S) {
  S rounded;
  from_acc(x, rounded);
  return to_acc(rounded);
}

// Two units of a row, k even.
template <class S>
__device__ __forceinline__ uint32_t pair_word(float even, float odd) {
  S low, high;
  from_acc(even, low);
  from_acc(odd, high);
  const uint32_t word = bits_of<uint16_t>(low) | uint32_t(bits_of<uint16_t>(high)) << 16;
  return word & Words<S>::kPhase ? 0x7fff0000u : word;
}

// How often a lane polls before it looks at the clock: about a millisecond.
constexpr int kPatientPolls = 1000;

// Waits until all packets that this lane asks for have arrived, and then for the warp's others:
// v[j] is asked for where at[j] is not null, and becomes zero elsewhere.
template <class S, int kCount>
__device__ __forceinline__ void receive(uint4 (&v)[kCount], const unsigned char* (&at)[kCount],
                                        uint32_t phase, uint64_t limit) {
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    v[j] = at[j] ? poll_packet(at[j]) : make_uint4(phase, phase, phase, phase);
  auto waits = [&] {
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < kCount; ++j) bits |= missing<S>(v[j], phase);
    return bits != 0;
  };
  auto poll = [&] {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      if (missing<S>(v[j], phase)) v[j] = poll_packet(at[j]);
  };
  bool waiting = waits();
  for (int polls = 0; waiting && polls < kPatientPolls; ++polls) {
    poll();
    waiting = waits();
  }
  if (waiting) {
    const Patience patience(limit);
    do {
      poll();
      patience.check();
    } while (waits());
  }
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kCount; ++j) v[j] = without_phase<S>(v[j]);
}

}  // namespace cuda
}  // namespace fastlstm

// States and logits travel through the L2 cache as 32-bit words. One bit of each word, the phase,
// tells the word's step.
//
// Half types: a word holds units k and k + 1 of a row. |h| <= 1 (zoneout of h is refused), so the
// top bit of the exponent is 0, and that of unit k carries the phase. A NaN has it set: for a NaN
// of unit k, the word's other half becomes a NaN and unit k becomes 0. Every sum over k is a NaN
// all the same. float: the lowest bit of the mantissa carries the phase, and is 0 in what is
// computed with.
#pragma once

#include <cstring>

#include "../shared/exchange.cuh"
#include "../shared/numeric.cuh"

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

// The phase of message n, where `slots` slots take the messages in turn.
template <class S>
__device__ __forceinline__ uint32_t phase_of(int64_t n, int slots) {
  return n / slots % 2 == 0 ? Words<S>::kPhase : 0;
}

// Not 0 where any of the words is of another message.
template <class S>
__device__ __forceinline__ uint32_t missing(const uint4& v, uint32_t phase) {
  return ((v.x ^ phase) | (v.y ^ phase) | (v.z ^ phase) | (v.w ^ phase)) & Words<S>::kPhase;
}
template <class S>
__device__ __forceinline__ uint4 without_phase(const uint4& v) {
  constexpr uint32_t mask = ~Words<S>::kPhase;
  return make_uint4(v.x & mask, v.y & mask, v.z & mask, v.w & mask);
}

__device__ __forceinline__ uint32_t logit_word(float x, uint32_t phase) {
  return (bits_of<uint32_t>(x) & ~1u) | phase;
}

// The value that a state has for its receivers.
__device__ __forceinline__ float settled(float x, float) {
  return bits_of<float>(bits_of<uint32_t>(x) & ~1u);
}
template <class S>
__device__ __forceinline__ float settled(float x, S) {
  S rounded;
  from_acc(x, rounded);
  return to_acc(rounded);
}

// The word of two units of a row, k (even) and k + 1.
template <class S>
__device__ __forceinline__ uint32_t pair_word(float even, float odd) {
  S low, high;
  from_acc(even, low);
  from_acc(odd, high);
  const uint32_t word = bits_of<uint16_t>(low) | uint32_t(bits_of<uint16_t>(high)) << 16;
  return word & Words<S>::kPhase ? 0x7fff0000u : word;
}

// Polls before a lane reads the clock: about a millisecond.
constexpr int kPatientPolls = 1000;

// Waits until all packets of this lane have arrived, then for the warp's other lanes. v[j] is the
// packet at at[j], or zero where that is null.
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

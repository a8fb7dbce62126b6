// How a word that goes over the grid says to which step it belongs: one of its bits, its phase.
//
// Two places take turns, so a reader must tell a step's words from those of two steps before: the
// phase is the other one. An element of a half type whose absolute value is at most 1 has a top
// exponent bit of 0, which is free for the phase; a NaN travels as a number between 1 and 2, which
// h never is. A float gives up the last bit of its mantissa: tf32 does not look at it, and a
// partial sum loses half a unit of its last place.
#pragma once

#include "../exchange.cuh"
#include "../numeric.cuh"

namespace fastlstm {
namespace cuda {

// The phase of a team's `step`th exchange, in all bits that carry it. Memory begins as zeros.
__device__ __forceinline__ uint32_t phase_of(int step, uint32_t bits) {
  return step & 2 ? 0u : bits;
}

// h as an operand of tensor cores.
template <class S>
struct Carrier;

template <>
struct Carrier<float> {
  typedef RoundedFloat Element;  // of a product
  static constexpr uint32_t kPhase = 1, kAboveOne = 0;
  // What goes out for h, and what is read after the phase is taken off. (A template: without tensor
  // cores there is no round_tf32.)
  template <class T>
  __device__ __forceinline__ static uint32_t encode(T h, uint32_t phase) {
    return (round_tf32(bits_of(h)) & ~kPhase) | phase;
  }
  __device__ __forceinline__ static uint32_t mend(uint32_t word) { return word; }
};

template <class S, uint32_t kOne>
struct HalfCarrier {
  typedef S Element;
  static constexpr uint32_t kPhase = 0x40004000u;
  // Added to an element without its phase: the phase's bit shows whether it was above 1.
  static constexpr uint32_t kAboveOne = 0x3fff3fffu - kOne * 0x10001u;
  __device__ __forceinline__ static uint16_t encode(S h, uint32_t phase) {
    const uint32_t bits = bits_of(h);
    return uint16_t(((bits & 0x7fffu) > kOne ? 0x3fffu : bits) | (phase & 0x4000u));
  }
  // Elements that were NaN become it again.
  __device__ __forceinline__ static uint32_t mend(uint32_t word) {
    const uint32_t above = (((word & 0x3fff3fffu) + kAboveOne) & kPhase) >> 14;
    return word | above * 0x7fffu;
  }
};
template <>
struct Carrier<Bf16> : HalfCarrier<Bf16, 0x3f80u> {};
template <>
struct Carrier<F16> : HalfCarrier<F16, 0x3c00u> {};

// Sends one element of a packet.
template <class S>
__device__ __forceinline__ void send_element(void* to, S h, uint32_t phase) {
  if constexpr (sizeof(S) == 4)
    send_word(to, Carrier<S>::encode(h, phase));
  else
    send_half_word(to, Carrier<S>::encode(h, phase));
}

// A partial sum and its phase.
constexpr uint32_t kSumPhase = 1;
__device__ __forceinline__ uint32_t tagged(float sum, uint32_t phase) {
  return (bits_of(sum) & ~kSumPhase) | phase;
}

// Patience of a loop that polls. To read the clock takes as long as a poll: it does so rarely.
class PollingPatience {
 public:
  __device__ __forceinline__ explicit PollingPatience(uint64_t limit)
      : limit_(limit), patience_(0) {}
  __device__ __forceinline__ void check() {
    if (++polls_ % 512) return;
    if (polls_ == 512)
      patience_ = Patience(limit_);
    else
      patience_.check();
  }

 private:
  uint64_t limit_;
  Patience patience_;
  unsigned polls_ = 0;
};

template <int kCount>
__device__ __forceinline__ uint32_t off_phase(const uint4 (&v)[kCount], uint32_t phase) {
  uint32_t off = 0;
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    off |= (v[j].x ^ phase) | (v[j].y ^ phase) | (v[j].z ^ phase) | (v[j].w ^ phase);
  return off;
}

}  // namespace cuda
}  // namespace fastlstm

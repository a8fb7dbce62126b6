// The phase: a bit of each word that CTAs exchange, by which a reader knows the word's step.
//
// h and sums of successive steps go to two places in turn, and the phase of a place alternates: so
// a reader can tell a step's words from those of two steps before. Where the bit comes from:
// - An element of a half type whose absolute value is at most 1 has a top exponent bit of 0, which
//   carries the phase. A NaN is sent as a number between 1 and 2, which h never is.
// - A float gives up the last bit of its mantissa. tf32 ignores that bit; in fp32 h loses it, and a
//   partial sum loses half a unit in the last place.
#pragma once

#include "../shared/exchange.cuh"
#include "../shared/numeric.cuh"

namespace fastlstm {
namespace cuda {

// The phase of exchange `step`, in all the `bits` that carry it. Memory begins as zeros, which is
// the phase of neither of the first two exchanges.
__device__ __forceinline__ uint32_t phase_of(int step, uint32_t bits) {
  return step & 2 ? 0u : bits;
}

// How h carries the phase, by the type of the product's operands (RoundedFloat: tf32).
template <class Operand>
struct PhaseCode;

template <>
struct PhaseCode<float> {
  static constexpr uint32_t kPhase = 1;
  __device__ __forceinline__ static uint32_t encode(float h, uint32_t phase) {
    return (bits_of(h) & ~kPhase) | phase;
  }
};
template <>
struct PhaseCode<RoundedFloat> {
  static constexpr uint32_t kPhase = 1, kAboveOne = 0;
  // What is sent for h. (A template, because round_tf32 exists only with tensor cores.)
  template <class T>
  __device__ __forceinline__ static uint32_t encode(T h, uint32_t phase) {
    return (round_tf32(bits_of(h)) & ~kPhase) | phase;
  }
};

template <class S, uint32_t kOne>
struct HalfPhaseCode {
  static constexpr uint32_t kPhase = 0x40004000u;
  // Added to an element without its phase: sets the phase's bit if the element is above 1, which
  // stands for a NaN.
  static constexpr uint32_t kAboveOne = 0x3fff3fffu - kOne * 0x10001u;
  __device__ __forceinline__ static uint16_t encode(S h, uint32_t phase) {
    const uint32_t bits = bits_of(h);
    return uint16_t(((bits & 0x7fffu) > kOne ? 0x3fffu : bits) | (phase & 0x4000u));
  }
};
template <>
struct PhaseCode<Bf16> : HalfPhaseCode<Bf16, 0x3f80u> {};
template <>
struct PhaseCode<F16> : HalfPhaseCode<F16, 0x3c00u> {};

// Sends h as one element of a packet.
template <class Code, class S>
__device__ __forceinline__ void send_element(void* to, S h, uint32_t phase) {
  if constexpr (sizeof(S) == 4)
    send_word(to, Code::encode(h, phase));
  else
    send_half_word(to, Code::encode(h, phase));
}

// A partial sum with its phase.
constexpr uint32_t kSumPhase = 1;
__device__ __forceinline__ uint32_t tagged(float sum, uint32_t phase) {
  return (bits_of(sum) & ~kSumPhase) | phase;
}

// Patience for a polling loop. Reading the clock takes as long as a poll, so it is read rarely, and
// for the first time when the wait is long already.
class PollingPatience {
 public:
  __device__ __forceinline__ explicit PollingPatience(uint64_t limit) : limit_(limit) {}
  __device__ __forceinline__ void check() {
    if (++polls_ % 512 == 0) end_if_longer(limit_, begin_);
  }

 private:
  const uint64_t limit_;
  uint64_t begin_ = 0;
  unsigned polls_ = 0;
};

// The bits in which any of the words differ from the phase.
__device__ __forceinline__ uint32_t off_phase(const uint4& v, uint32_t phase) {
  return (v.x ^ phase) | (v.y ^ phase) | (v.z ^ phase) | (v.w ^ phase);
}
template <int kCount>
__device__ __forceinline__ uint32_t off_phase(const uint4 (&v)[kCount], uint32_t phase) {
  uint32_t off = 0;
#pragma unroll
  for (int j = 0; j < kCount; ++j) off |= off_phase(v[j], phase);
  return off;
}

}  // namespace cuda
}  // namespace fastlstm

// The CUDA keywords and intrinsics that kernels use, defined for the host compiler.
#pragma once

#include <cmath>
#include <cstring>

#include "simt.h"

#define threadIdx (simt::self->index)
#define blockIdx (simt::self->block->index)
#define blockDim (simt::block_size())
#define gridDim (simt::grid_size())
#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __syncthreads() simt::barrier(simt::Scope::block, "__syncthreads", __LINE__)

inline void __threadfence() { simt::fence(); }
inline void __syncwarp(unsigned mask = ~0u) {
  static const char operation = 0;
  simt::collective(mask, &operation, nullptr, [](void**, unsigned) {}, true);
}

template <class T>
SIMT_UNSEEN inline T atomicAdd(T* address, T value) {
  simt::relaxed_store(address, true);
  const T before = *address;
  *address = before + value;
  return before;
}

namespace simt {

// Source(lane, argument) is the lane that `lane` reads; a lane outside the mask is an error.
template <class T, class Source>
SIMT_UNSEEN inline T shuffle(unsigned mask, T value, int argument, Source) {
  struct Slot {
    T in, out;
    int argument;
  } slot{value, value, argument};
  static const char operation = 0;
  collective(
      mask, &operation, &slot,
      [](void** lanes, unsigned m) SIMT_UNSEEN {
        for (int j = 0; j < 32; ++j) {
          if (!(m >> j & 1)) continue;
          Slot& mine = *static_cast<Slot*>(lanes[j]);
          const int from = Source::of(j, mine.argument);
          if (!(m >> from & 1)) fail("a shuffle reads a lane that is not in its mask");
          mine.out = static_cast<Slot*>(lanes[from])->in;
        }
      },
      false);
  return slot.out;
}
struct Indexed {
  static int of(int, int argument) { return argument & 31; }
};
struct Exclusive {
  static int of(int lane, int argument) { return lane ^ argument; }
};
struct Down {
  static int of(int lane, int argument) { return lane + argument < 32 ? lane + argument : lane; }
};

}  // namespace simt

template <class T>
inline T __shfl_sync(unsigned mask, T value, int from) {
  return simt::shuffle(mask, value, from, simt::Indexed());
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int with) {
  return simt::shuffle(mask, value, with, simt::Exclusive());
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, int by) {
  return simt::shuffle(mask, value, by, simt::Down());
}
SIMT_UNSEEN inline unsigned __ballot_sync(unsigned mask, bool vote) {
  struct Slot {
    bool in;
    unsigned out;
  } slot{vote, 0};
  static const char operation = 0;
  simt::collective(
      mask, &operation, &slot,
      [](void** lanes, unsigned m) SIMT_UNSEEN {
        unsigned votes = 0;
        for (int j = 0; j < 32; ++j)
          if (m >> j & 1 && static_cast<Slot*>(lanes[j])->in) votes |= 1u << j;
        for (int j = 0; j < 32; ++j)
          if (m >> j & 1) static_cast<Slot*>(lanes[j])->out = votes;
      },
      false);
  return slot.out;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }

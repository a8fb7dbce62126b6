// The one place where nvcc and the emulator's host build differ: inline PTX and CUDA types on one
// side, calls of the emulator on the other, each a named function with its emulated twin.
//
// Rules for the kernels: no PTX outside this file and exchange.cuh; one dynamic shared buffer, no
// bare __shared__; one struct of arguments a kernel; every load that polls goes through a named
// function.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define FASTLSTM_SHARED_BUFFER(name) extern __shared__ __align__(128) unsigned char name[]
#else
#include "dialect.h"
#include "half.h"
#include "tensor_core.h"
#define FASTLSTM_SHARED_BUFFER(name) unsigned char* name = simt::self->block->shared
#endif

// Tensor cores for bf16, fp16 and tf32, and cp.async, came with sm_80. The host build has both,
// unless it checks the code for older GPUs.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800 || defined(FASTLSTM_BEFORE_SM80)
#define FASTLSTM_SM80 0
#else
#define FASTLSTM_SM80 1
#endif

// Clusters, and kernels that begin early, came with sm_90.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900 || defined(FASTLSTM_BEFORE_SM80)
#define FASTLSTM_SM90 0
#else
#define FASTLSTM_SM90 1
#endif

namespace fastlstm {
namespace cuda {

__device__ __forceinline__ constexpr int min_of(int a, int b) { return a < b ? a : b; }

// Elements of a tf32 product: `float` is rounded before each mma; RoundedFloat has been rounded by
// round_tf32 already.
struct RoundedFloat {};

// When a kernel begins: when all before it on its stream has ended; or early, as soon as every CTA
// of the kernel before it (its primary) has called start_dependents() or ended. Before
// wait_for_primary() an early kernel reads only what was complete when the last kernel began that
// was not early, and writes only its own shared memory: its primary may not have waited either.
enum class Begin { late, early };

#if defined(__CUDACC__)

typedef __nv_bfloat16 Bf16;
typedef __half F16;

__device__ __forceinline__ float to_float(Bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(F16 x) { return __half2float(x); }
__device__ __forceinline__ void from_float(float x, Bf16& to) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void from_float(float x, F16& to) { to = __float2half_rn(x); }

// Copies 16 bytes to shared memory without registers; bytes from `valid` on become zero.
__device__ __forceinline__ void copy_async(void* to, const void* from, unsigned valid) {
#if FASTLSTM_SM80
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(valid)
               : "memory");
#else
  *static_cast<uint4*>(to) = valid ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}
// Closes a group of copies; wait_async<n> waits until all but the last n groups have arrived.
__device__ __forceinline__ void commit_async() {
#if FASTLSTM_SM80
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kGroupsLeft>
__device__ __forceinline__ void wait_async() {
#if FASTLSTM_SM80
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
#endif
}

// The next kernel on the stream may begin, if it is launched early and all other CTAs agree.
__device__ __forceinline__ void start_dependents() {
#if FASTLSTM_SM90
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits until the primary has ended and all that it wrote is visible. Every thread that reads or
// writes such memory calls it.
__device__ __forceinline__ void wait_for_primary() {
#if FASTLSTM_SM90
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// A hint: the 32 bytes at `from` will be read from the L2 cache.
__device__ __forceinline__ void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// Ends the kernel where a wait takes longer than `limit` nanoseconds; 0: never.
class Patience {
 public:
  __device__ __forceinline__ explicit Patience(uint64_t limit)
      : limit_(limit), begin_(limit ? now() : 0) {}
  __device__ __forceinline__ void check() const {
    if (limit_ && now() - begin_ > limit_) __trap();
  }

  __device__ __forceinline__ static uint64_t now() {
    uint64_t time;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
    return time;
  }

 private:
  uint64_t limit_, begin_;
};
// The same for a wait that began at the first call, when `begin` was 0.
__device__ __forceinline__ void end_if_longer(uint64_t limit, uint64_t& begin) {
  const uint64_t now = Patience::now();
  if (begin == 0) begin = now;
  if (limit && now - begin > limit) __trap();
}

#if FASTLSTM_SM80
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    Bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    F16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ uint32_t round_tf32(uint32_t x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(x)));
  return y;
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    RoundedFloat) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    float) {
  const uint32_t left[4] = {round_tf32(a[0]), round_tf32(a[1]), round_tf32(a[2]), round_tf32(a[3])};
  const uint32_t right[2] = {round_tf32(b[0]), round_tf32(b[1])};
  mma(d, left, right, RoundedFloat());
}
#endif

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint32_t bits_of(Bf16 x) { return __bfloat16_as_ushort(x); }
__device__ __forceinline__ uint32_t bits_of(F16 x) { return __half_as_ushort(x); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }
// Two elements of a half type as a word, rounded by one instruction.
__device__ __forceinline__ uint32_t pair_of(float low, float high, Bf16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t pair_of(float low, float high, F16) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
// Of two words the lower halves, or the upper ones, as a word.
__device__ __forceinline__ uint32_t lower_halves(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x5410);
}
__device__ __forceinline__ uint32_t upper_halves(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x7632);
}

// 2^x and 1/x by the special function unit: about 2 units in the last place.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Pins a computation to its place: the compiler may not move it behind a wait.
__device__ __forceinline__ void pin(float& x) { asm volatile("" : "+f"(x)); }
__device__ __forceinline__ void pin(uint32_t& x) { asm volatile("" : "+r"(x)); }

// Over a whole warp, for kernels of sm_80 and newer.
__device__ __forceinline__ uint32_t largest_of_warp(uint32_t x) {
#if FASTLSTM_SM80
  x = __reduce_max_sync(~0u, x);
#endif
  return x;
}
__device__ __forceinline__ uint32_t smallest_of_warp(uint32_t x) {
#if FASTLSTM_SM80
  x = __reduce_min_sync(~0u, x);
#endif
  return x;
}

__device__ __forceinline__ void trap(const char*) { __trap(); }

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("fastlstm: ") + what + ": " + cudaGetErrorString(error));
}

// Whether kernels can begin early on the current GPU (device_properties.cu).
bool kernels_begin_early();

// Lets launches of a kernel on the current GPU take so much dynamic shared memory: more than 48 KiB
// are an opt-in (device_properties.cu).
void allow_shared(const void* kernel, size_t bytes);

template <class Args>
void launch(void (*kernel)(Args), dim3 grid, unsigned threads, size_t shared, void* stream,
            const Args& args, Begin begin = Begin::late) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  allow_shared(reinterpret_cast<const void*>(kernel), shared);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = begin == Begin::early && kernels_begin_early() ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args), "kernel launch");
}

// All CTAs of the grid are resident at once, or the launch fails.
template <class Args>
void launch_cooperative(void (*kernel)(Args), dim3 grid, unsigned threads, size_t shared,
                        void* stream, const Args& args) {
  const void* function = reinterpret_cast<const void*>(kernel);
  allow_shared(function, shared);
  void* parameters[] = {const_cast<Args*>(&args)};
  check(cudaLaunchCooperativeKernel(function, grid, dim3(threads), parameters, shared,
                                    static_cast<cudaStream_t>(stream)),
        "cooperative launch");
}

inline void zero_async(void* memory, size_t bytes, void* stream) {
  check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)), "memset");
}

#else  // the host build

typedef simt::Bf16 Bf16;
typedef simt::F16 F16;

using simt::to_float;
inline void from_float(float x, Bf16& to) { to = simt::round_to_bf16(x); }
inline void from_float(float x, F16& to) { to = simt::round_to_f16(x); }

#if FASTLSTM_SM80
inline void copy_async(void* to, const void* from, unsigned valid) {
  simt::async_copy(to, from, 16, valid);
}
inline void commit_async() { simt::async_commit(); }
template <int kGroupsLeft>
inline void wait_async() {
  simt::async_wait(kGroupsLeft);
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Bf16) {
  simt::mma_16x8<2, simt::Bf16Pair>(d, a, b);
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], F16) {
  simt::mma_16x8<2, simt::F16Pair>(d, a, b);
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float) {
  simt::mma_16x8<1, simt::Tf32>(d, a, b);
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], RoundedFloat) {
  simt::mma_16x8<1, simt::RoundedTf32>(d, a, b);
}
inline uint32_t round_tf32(uint32_t x) { return simt::as_bits(simt::Tf32::get(x, 0)); }
#else
inline void copy_async(void* to, const void* from, unsigned valid) {
  *static_cast<uint4*>(to) = valid ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
}
inline void commit_async() {}
template <int>
inline void wait_async() {}
#endif

// The emulator's scheduler detects a wait that never ends.
struct Patience {
  explicit Patience(uint64_t) {}
  void check() const {}
};
inline void end_if_longer(uint64_t, uint64_t&) {}

inline uint32_t bits_of(float x) { return simt::as_bits(x); }
inline uint32_t bits_of(Bf16 x) { return x.bits; }
inline uint32_t bits_of(F16 x) { return x.bits; }
inline uint32_t lower_halves(uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; }
inline uint32_t upper_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000); }
template <class S>
uint32_t pair_of(float low, float high, S) {
  S pair[2];
  from_float(low, pair[0]);
  from_float(high, pair[1]);
  return lower_halves(bits_of(pair[0]), bits_of(pair[1]));
}
inline float float_of(uint32_t bits) { return simt::as_float(bits); }

inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return 1 / x; }
inline void pin(float&) {}
inline void pin(uint32_t&) {}

inline uint32_t largest_of_warp(uint32_t x) {
  for (int d = 16; d > 0; d /= 2) {
    const uint32_t other = __shfl_xor_sync(~0u, x, d);
    x = other > x ? other : x;
  }
  return x;
}
inline uint32_t smallest_of_warp(uint32_t x) { return ~largest_of_warp(~x); }

inline void trap(const char* why) { simt::fail(why); }

#if FASTLSTM_SM90
inline void start_dependents() { simt::start_dependents(); }
inline void wait_for_primary(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt::wait_for_primary(file, line);
}
#else
inline void start_dependents() {}
inline void wait_for_primary() {}
#endif
inline void prefetch(const void*) {}

inline bool kernels_begin_early() { return FASTLSTM_SM90; }

template <class Args>
void launch(void (*kernel)(Args), dim3 grid, unsigned threads, size_t shared, void* stream,
            const Args& args, Begin begin = Begin::late) {
  if (grid.count() == 0) return;
  const bool early = begin == Begin::early && kernels_begin_early();
  static_cast<simt::Stream*>(stream)->run(
      {grid, dim3(threads), 1, shared, early, [=] { kernel(args); }});
}

template <class Args>
void launch_cooperative(void (*kernel)(Args), dim3 grid, unsigned threads, size_t shared,
                        void* stream, const Args& args) {
  launch(kernel, grid, threads, shared, stream, args);
}

inline void zero_async(void* memory, size_t bytes, void* stream) {
  static_cast<simt::Stream*>(stream)->zero(memory, bytes);
}

#endif

}  // namespace cuda
}  // namespace fastlstm

// How CTAs exchange data without a fence: within a thread-block cluster, and over the whole grid.
// As in device.cuh, each function is inline PTX; its emulated twin is in the emulator's exchange.h.
//
// Within a cluster (sm_90 and newer) bytes arrive in a CTA's shared memory asynchronously, and an
// mbarrier counts them. A phase of an mbarrier ends when all its expected arrivals have come and
// as many bytes as they announced; a waiter names the parity of the phase whose end it awaits:
// 0 for the first, 1 for the second, and so on in turn.
//
// Over the grid (sm_80 and newer) 16-byte packets go through the L2 cache. Nothing orders the
// 32-bit words of a packet: a reader must recognise each word by its own bits.
#pragma once

#include "device.cuh"

// Whether warpgroups can hand registers to each other (setmaxnreg): sm_90a and sm_100a can, plain
// sm_90 cannot.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_FEAT_SM100_ALL)
#define FASTLSTM_MOVES_REGISTERS 1
#else
#define FASTLSTM_MOVES_REGISTERS 0
#endif

#if !defined(__CUDACC__)
#include "exchange.h"
#endif

namespace fastlstm {
namespace cuda {

// The registers with which each thread begins, where its CTA has an SM for itself.
constexpr int registers_at_entry(int threads) { return 65536 / threads / 8 * 8; }

#if defined(__CUDACC__)

// In shared memory, 8 bytes aligned to 8.
struct Mbarrier {
  unsigned long long state;
};

// A place in the shared memory of a CTA of the same cluster.
struct Remote {
  uint32_t address;
  __device__ __forceinline__ Remote operator+(uint32_t bytes) const { return {address + bytes}; }
};

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

#if FASTLSTM_SM90
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// The same place as `shared`, in the CTA of that rank.
__device__ __forceinline__ Remote remote(const void* shared, unsigned rank) {
  Remote place;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(place.address)
               : "r"(shared_address(shared)), "r"(rank));
  return place;
}
// A barrier of all threads of the cluster: what each wrote before it, all see after it.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}

// One thread calls init(), then publish_mbarriers(); then comes a barrier of all who use them.
__device__ __forceinline__ void init(Mbarrier* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
__device__ __forceinline__ void publish_mbarriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// At that of a CTA of the cluster. What this thread has read by then, no other overwrites first:
// the values are there. It orders no writes (a release to the cluster waits for all memory).
__device__ __forceinline__ void arrive(Remote barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier.address) : "memory");
}
// Arrives, and announces bytes of the running phase.
__device__ __forceinline__ void arrive_expecting(Mbarrier* barrier, unsigned bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
__device__ __forceinline__ bool try_wait(const Mbarrier* barrier, unsigned parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}
// Waits for the end of the phase of that parity, no longer than `limit` (see Patience). A read of
// the clock would delay a step that waits for less than a microsecond: many tries come before it.
__device__ __forceinline__ void wait(const Mbarrier* barrier, unsigned parity, uint64_t limit) {
#pragma unroll 1
  for (int tries = 0; tries < 256; ++tries)
    if (try_wait(barrier, parity)) return;
  const Patience patience(limit);
  while (!try_wait(barrier, parity)) patience.check();
}

// 16 bytes to a peer, counted by its mbarrier: `to` and `barrier` are in the same CTA.
__device__ __forceinline__ void send_async(Remote to, const uint4& value, Remote barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, "
      "[%5];" ::"r"(to.address),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier.address)
      : "memory");
}
// A whole piece of this CTA's shared memory to a peer: multiples of 16 bytes, aligned to 16. What
// other threads wrote there needs fence_async_copies() by each of them, then a barrier.
__device__ __forceinline__ void bulk_send(Remote to, const void* from, unsigned bytes,
                                          Remote barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(to.address),
      "r"(shared_address(from)), "r"(bytes), "r"(barrier.address)
      : "memory");
}
// Global memory to this CTA's shared memory; size and alignment as above.
__device__ __forceinline__ void bulk_load(void* to, const void* from, unsigned bytes,
                                          Mbarrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
// The same to all CTAs of the cluster whose rank's bit is set in `ranks`: each receives the bytes
// at the place of `to` in its own shared memory, and its mbarrier at the place of `barrier` counts
// them.
__device__ __forceinline__ void bulk_multicast(void* to, const void* from, unsigned bytes,
                                               Mbarrier* barrier, unsigned ranks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "h"(uint16_t(ranks))
      : "memory");
}
// This CTA's shared memory to global. Copies are closed in groups by the thread that issued them;
// bulk_wait_read<n> waits until all but its last n groups have read their source.
__device__ __forceinline__ void bulk_store(void* to, const void* from, unsigned bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int kGroupsLeft>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroupsLeft) : "memory");
}
// Before bulk copies read what this thread stored in shared memory, or count on an mbarrier that it
// has set up.
__device__ __forceinline__ void fence_async_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
#endif  // FASTLSTM_SM90

// Sets the registers of each thread from here on, by all of a warpgroup (four neighbouring warps)
// together. Registers that one warpgroup gives up another may take. Without setmaxnreg: nothing.
template <int kCount>
__device__ __forceinline__ void raise_registers() {
#if FASTLSTM_MOVES_REGISTERS
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
template <int kCount>
__device__ __forceinline__ void lower_registers() {
#if FASTLSTM_MOVES_REGISTERS
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

// The same value, opaque to the compiler (a shuffle from the thread's own lane): it stays in a
// register and is not rematerialised behind a wait.
__device__ __forceinline__ unsigned opaque(unsigned x) {
  return __shfl_sync(0xffffffffu, x, threadIdx.x % 32);
}

// A barrier of some of a CTA's warps: id 1 to 15, and how many threads take part.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Packets through the L2 cache. Each 32-bit word becomes visible on its own, in any order.
__device__ __forceinline__ uint4 poll_packet(const void* from) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}
// Polls again where `again` is not 0; without a branch, so that polls of several packets overlap.
__device__ __forceinline__ void poll_packet_if(uint32_t again, const void* from, uint4& v) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.u32 p, %5, 0;\n"
      "@p ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];\n}\n"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(from), "r"(again)
      : "memory");
}
__device__ __forceinline__ void send_packet(void* to, const uint4& v) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}
// Nothing where `exists` is zero.
__device__ __forceinline__ void send_packet(void* to, const uint4& v, uint32_t exists) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.u32 p, %5, 0;\n"
      "@p st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};\n}\n" ::"l"(to),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(exists)
      : "memory");
}
__device__ __forceinline__ void send_word(void* to, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}
__device__ __forceinline__ void send_half_word(void* to, uint16_t v) {
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(to), "h"(v) : "memory");
}

// A grid of clusters of `cluster` CTAs, neighbours along x. More than eight are an opt-in: sm_90
// holds 16.
template <class Args>
void launch_clusters(void (*kernel)(Args), dim3 grid, unsigned cluster, unsigned threads,
                     size_t shared, void* stream, const Args& args, Begin begin = Begin::late) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const void* function = reinterpret_cast<const void*>(kernel);
  allow_shared(function, shared);
  if (cluster > 8)
    check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cluster size");
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = cluster;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = begin == Begin::early && kernels_begin_early() ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, args), "cluster launch");
}

// How many clusters of `cluster` CTAs the current GPU runs at once; 0 where it runs none of that
// size (device_properties.cu).
int clusters_at_once(const void* kernel, unsigned cluster, unsigned threads, size_t shared);

template <class Args>
int clusters_at_once(void (*kernel)(Args), unsigned cluster, unsigned threads, size_t shared) {
  return clusters_at_once(reinterpret_cast<const void*>(kernel), cluster, threads, shared);
}

#endif

}  // namespace cuda
}  // namespace fastlstm

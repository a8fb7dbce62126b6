// The emulated twins of csrc/cuda/shared/exchange.cuh, which documents each function.
#pragma once

#include "dialect.h"
#include "exchange_state.h"

#define SIMT_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace fastlstm {
namespace cuda {

struct Mbarrier {
  unsigned long long state;
};

struct Remote {
  uint32_t address, rank;  // an offset in the shared memory of the CTA of that rank
  Remote operator+(uint32_t bytes) const { return {address + bytes, rank}; }
};

__forceinline__ uint32_t shared_address(const void* shared) {
  return simt::offset_in_shared(shared);
}
__forceinline__ unsigned cluster_rank() { return simt::cluster_rank(); }
__forceinline__ Remote remote(const void* shared, unsigned rank) {
  return {simt::offset_in_shared(shared), rank};
}
__forceinline__ void cluster_barrier(SIMT_PLACE) {
  simt::barrier(simt::Scope::cluster, "cluster_barrier", line, file);
}

__forceinline__ void init(Mbarrier* barrier, unsigned arrivals) {
  simt::mbarrier_init(barrier, arrivals);
}
__forceinline__ void publish_mbarriers() { simt::mbarrier_publish(); }
__forceinline__ void arrive(Mbarrier* barrier) { simt::mbarrier_arrive(barrier, 0); }
__forceinline__ void arrive(Remote barrier) {
  simt::mbarrier_arrive_at(barrier.rank, barrier.address);
}
__forceinline__ void arrive_expecting(Mbarrier* barrier, unsigned bytes) {
  simt::mbarrier_arrive(barrier, bytes);
}
__forceinline__ bool try_wait(const Mbarrier* barrier, unsigned parity, SIMT_PLACE) {
  return simt::mbarrier_try_wait(barrier, parity, file, line);
}
__forceinline__ void wait(const Mbarrier* barrier, unsigned parity, uint64_t, SIMT_PLACE) {
  simt::mbarrier_wait(barrier, parity, file, line);
}

// The value is read here, in code that the race checker instruments.
__forceinline__ void send_async(Remote to, const uint4& value, Remote barrier) {
  const uint4 read = value;
  simt::async_send(to.rank, to.address, read, barrier.rank, barrier.address);
}
__forceinline__ void bulk_send(Remote to, const void* from, unsigned bytes, Remote barrier) {
  simt::bulk_send(to.rank, to.address, from, bytes, barrier.rank, barrier.address);
}
__forceinline__ void bulk_load(void* to, const void* from, unsigned bytes, Mbarrier* barrier) {
  simt::bulk_load(to, from, bytes, barrier);
}
__forceinline__ void bulk_multicast(void* to, const void* from, unsigned bytes, Mbarrier* barrier,
                                    unsigned ranks) {
  simt::bulk_multicast(to, from, bytes, barrier, ranks);
}
__forceinline__ void bulk_store(void* to, const void* from, unsigned bytes) {
  simt::bulk_store(to, from, bytes);
}
__forceinline__ void bulk_commit() { simt::bulk_commit(); }
template <int kGroupsLeft>
__forceinline__ void bulk_wait_read() {
  simt::bulk_wait_read(kGroupsLeft);
}
__forceinline__ void fence_async_copies() { simt::fence_async_copies(); }

template <int>
__forceinline__ void raise_registers() {}
template <int>
__forceinline__ void lower_registers() {}
__forceinline__ unsigned opaque(unsigned x) { return x; }

__forceinline__ void named_barrier(int id, int threads, SIMT_PLACE) {
  simt::named_barrier(id, threads, file, line);
}

__forceinline__ uint4 poll_packet(const void* from, SIMT_PLACE) {
  return simt::packet_poll(from, file, line);
}
__forceinline__ void poll_packet_if(uint32_t again, const void* from, uint4& packet, SIMT_PLACE) {
  if (again) packet = simt::packet_poll(from, file, line);
}
__forceinline__ void send_packet(void* to, const uint4& value) {
  const uint4 read = value;
  simt::packet_send(to, read);
}
__forceinline__ void send_packet(void* to, const uint4& value, uint32_t exists) {
  if (exists != 0) send_packet(to, value);
}
__forceinline__ void send_word(void* to, uint32_t value) { simt::packet_send_word(to, value); }
__forceinline__ void send_half_word(void* to, uint16_t value) {
  simt::packet_send_half_word(to, value);
}

template <class Args>
void launch_clusters(void (*kernel)(Args), dim3 grid, unsigned cluster, unsigned threads,
                     size_t shared, void* stream, const Args& args, Begin begin = Begin::late) {
  if (grid.count() == 0) return;
  simt::Stream& s = *static_cast<simt::Stream*>(stream);
  s.run({grid, dim3(threads), cluster, shared, begin == Begin::early, [=] { kernel(args); }});
}
template <class Args>
int clusters_at_once(void (*)(Args), unsigned cluster, unsigned, size_t) {
  return int(132 / cluster);
}

}  // namespace cuda
}  // namespace fastlstm

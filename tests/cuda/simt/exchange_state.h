// mbarriers, asynchronous copies and packets: the primitives of csrc/cuda/shared/exchange.cuh as
// calls of the emulator (by exchange.h), and what the scheduler calls.
#pragma once

#include "simt.h"

namespace simt {

// ---- by exchange.h ----

void mbarrier_init(void* at, unsigned arrivals);
void mbarrier_publish();
void mbarrier_arrive(void* at, unsigned bytes);
void mbarrier_arrive_at(unsigned rank, uint32_t offset);
bool mbarrier_try_wait(const void* at, unsigned parity, const char* file, int line);
void mbarrier_wait(const void* at, unsigned parity, const char* file, int line);

unsigned cluster_rank();
uint32_t offset_in_shared(const void* place);
// Copies to shared memory of the block of that rank in the cluster, at an offset.
void async_send(unsigned rank, uint32_t to, const uint4& value, unsigned barrier_rank,
                uint32_t barrier);
void bulk_send(unsigned rank, uint32_t to, const void* from, unsigned bytes, unsigned barrier_rank,
               uint32_t barrier);
void bulk_load(void* to, const void* from, unsigned bytes, void* barrier);
void bulk_multicast(void* to, const void* from, unsigned bytes, void* barrier, unsigned ranks);
void bulk_store(void* to, const void* from, unsigned bytes);
void bulk_commit();
void bulk_wait_read(unsigned groups_left);
void fence_async_copies();

uint4 packet_poll(const void* from, const char* file, int line);
void packet_send(void* to, const uint4& value);
void packet_send_word(void* to, uint32_t value);
void packet_send_half_word(void* to, uint16_t value);

// ---- by the scheduler ----

void forget_exchange();      // at a launch
void deliver_some();         // between two threads
bool deliver_when_idle();    // one piece, when no thread can go on; false: none is in flight
void check_exit();           // of the running thread
void check_exit_of_block();  // by its last thread
std::string mbarrier_report(const void* at);

// ---- among themselves ----

void forget_mbarriers();
void forget_packets();

}  // namespace simt

// The interface between asynchronous copies and mbarriers.
#pragma once

#include "race.h"
#include "simt.h"

namespace simt {

// The running thread starts copies that the mbarrier will count. They read shared memory of
// `source`, or global memory where it is null.
race::Act mbarrier_copies(const void* at, const Block* source, bool bulk, const void* code);
void mbarrier_count(const void* at, unsigned bytes, uint32_t phase);  // bytes have arrived
// Memory of a block at an offset; an error where it has exited, or the bytes lie outside.
unsigned char* in_shared(const Block& block, uint32_t offset, unsigned bytes, const char* what);
void check_copies_at_exit();  // of the running thread's block, by its last thread

}  // namespace simt

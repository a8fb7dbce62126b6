// What asynchronous copies and mbarriers ask of each other.
#pragma once

#include "race.h"
#include "simt.h"

namespace simt {

// The running thread starts copies that the mbarrier will count. `source`: whose shared memory they
// read; null: of none.
race::Act mbarrier_copies(const void* at, const Block* source, bool bulk, const void* code);
void mbarrier_count(const void* at, unsigned bytes, uint32_t phase);  // that have arrived
void check_copies_at_exit();  // of a block; the running thread is its last

}  // namespace simt

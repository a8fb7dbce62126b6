// Memory for one call's intermediate results, which a thread keeps for its next call.
#pragma once

#include <stdint.h>

namespace fastlstm {

// Uninitialised, on a cache line, from what this thread has kept or from the system; null where
// neither has enough. Whichever thread gives it back keeps it, unless it then keeps more than a
// limit: what is beyond goes back to the system.
void* take_scratch(int64_t bytes);
void give_scratch(void* data);  // or null

// The bytes that this thread keeps and nobody uses.
int64_t kept_scratch();

}  // namespace fastlstm

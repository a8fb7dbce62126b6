// Fibers: each has a stack while it runs; switch_to() changes from one to another. A stack goes
// from a fiber that ends to the next one that begins, so that fibers that never wait share two of
// them.
#pragma once

#include <cstddef>

namespace simt {
namespace fiber {

constexpr int kMain = -1;  // the context that started the fibers

// Makes `count` fibers ready to call `entry`, which must never return.
void create(int count, void (*entry)());
// Gives their stacks back, where they are many.
void destroy();
// Switches from the running fiber to another. `ends`: the first one will never run again.
void switch_to(int from, int to, bool ends);
// Every fiber calls this first.
void begin();

}  // namespace fiber
}  // namespace simt

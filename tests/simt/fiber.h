// Fibers: a stack each, and a switch from one to another.
#pragma once

#include <cstddef>

namespace simt {
namespace fiber {

constexpr int kMain = -1;  // the context that started the fibers

// Makes `count` fibers ready to call `entry`, which must never return.
void create(int count, void (*entry)());
// Leaves the running fiber for another. `ends`: the one that is left will never run again.
void switch_to(int from, int to, bool ends);
// The first thing that a fiber calls.
void begin();

}  // namespace fiber
}  // namespace simt

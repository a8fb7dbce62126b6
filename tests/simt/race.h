// Happens-before race checker: one vector clock per thread, one shadow cell per two bytes.
//
// Kernels compiled with -fsanitize=thread call __tsan_readN / __tsan_writeN at every access; those
// hooks are defined here, in the place of the sanitizer's own runtime.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace simt {

void preempt();  // a point where the scheduler may switch

namespace race {

void begin(unsigned threads);
void end();
long count();
std::string first();

// Everything that any of these threads did happens before all that any of them will do.
void meet(const std::vector<unsigned>& threads);
void access(uintptr_t address, size_t bytes, bool write, const void* code);

}  // namespace race
}  // namespace simt

// What the planted kernels share: global memory that the race checker watches, and the outcome.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "simt.h"

namespace {

struct Words {
  Words(size_t n, const char* name)
      : count(n), values(static_cast<uint32_t*>(aligned_alloc(128, (4 * n + 127) / 128 * 128))) {
    std::memset(values, 0, 4 * n);
    simt::track(values, 4 * n, name);
  }
  ~Words() {
    simt::untrack(values);
    free(values);
  }
  size_t count;
  uint32_t* values;
};

// 0: result right, 1: wrong, 2: it did not end well.
inline int outcome(const simt::Stream& stream, bool right, int64_t* races, char* message) {
  *races = stream.races;
  snprintf(message, 512, "%s", (stream.error.empty() ? stream.first_race : stream.error).c_str());
  return !stream.error.empty() ? 2 : !right;
}

}  // namespace

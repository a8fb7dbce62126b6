// How long a CTA waits for another before it ends the kernel, which also ends the context. A CTA
// that has yet to begin may need an SM that another kernel holds: a collective holds its SMs until
// the slowest process joins, and NCCL's watchdog gives up after ten minutes. By default our waits
// are longer.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastlstm {
namespace cuda {

// In nanoseconds; 0: without a limit.
inline uint64_t wait_limit() {
  const char* text = std::getenv("FASTLSTM_WAIT_SECONDS");
  if (text == nullptr || *text == 0) return uint64_t(1800e9);
  char* end = nullptr;
  const double seconds = std::strtod(text, &end);
  if (end == text || *end != 0 || !(seconds >= 0 && seconds <= 1e9))  // false for a NaN, too
    throw std::invalid_argument(
        "fastlstm: FASTLSTM_WAIT_SECONDS: expected a number of seconds from 0 (no limit) to 1e9, "
        "got \"" +
        std::string(text) + "\"");
  // Only 0 means no limit: a time below a nanosecond becomes one.
  const uint64_t limit = uint64_t(seconds * 1e9);
  return seconds > 0 && limit == 0 ? 1 : limit;
}

}  // namespace cuda
}  // namespace fastlstm

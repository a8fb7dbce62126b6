// What the bindings need of ops_packed.cpp. No torch header here.
#pragma once

#include <cstdint>

namespace fastlstm {

// Frees the packed weights of a handle, once the calls that use them have ended.
void free_packed(int64_t handle);

}  // namespace fastlstm

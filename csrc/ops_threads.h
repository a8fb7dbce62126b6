// The kernels' threads are torch's: as many as torch.set_num_threads says.
#pragma once

#include "cpu/runtime.h"
#include "stable.h"

namespace fastlstm {
namespace ops {

inline Runtime runtime() {
  return {int(torch::stable::get_num_threads()),
          [](int64_t n, void* context, void (*fn)(void*, int64_t)) {
            torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) {
              for (int64_t j = begin; j < end; ++j) fn(context, j);
            });
          }};
}

}  // namespace ops
}  // namespace fastlstm

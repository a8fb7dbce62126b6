// How the host launches the teams of a layer.
#pragma once

#include <type_traits>

namespace fastlstm {
namespace cuda {

// Calls launch(first, count) for all teams, `active` at a time: as many as are resident at once.
template <class Launch>
void for_teams(int teams, int active, Launch&& launch) {
  for (int first = 0; first < teams; first += active)
    launch(first, teams - first < active ? teams - first : active);
}

// Calls f with the index, below kCount, as a compile-time constant.
template <int kCount, int kIndex = 0, class F>
void with_index(int index, F&& f) {
  if constexpr (kIndex < kCount) {
    if (index == kIndex)
      f(std::integral_constant<int, kIndex>());
    else
      with_index<kCount, kIndex + 1>(index, f);
  }
}

}  // namespace cuda
}  // namespace fastlstm

// How the host goes through the teams of a layer.
#pragma once

#include <type_traits>

namespace fastlstm {
namespace cuda {

// Calls launch(first, count) for the teams in turn, as many at a time as the plan lets run.
template <class Launch>
void for_teams(int teams, int active, Launch&& launch) {
  for (int first = 0; first < teams; first += active)
    launch(first, teams - first < active ? teams - first : active);
}

// Calls f with the number as a constant below kCount.
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

// mma.sync on the host, with the register layouts of the PTX ISA manual ("Matrix Fragments for
// mma.m16n8k16" and "... m16n8k8"). They have not been confirmed on hardware yet.
#pragma once

#include "simt.h"

namespace simt {

// D(16x8) += A(16xK) B(Kx8). Element e of register r of a lane (group = lane / 4, place = lane %
// 4):
//   A: row group + 8 * (r % 2), column place * E + e + K / 2 * (r / 2)
//   B: row place * E + e + K / 2 * r, column group
//   D: row group + 8 * (r / 2), column 2 * place + r % 2
// with E elements to a 32-bit register and K = 8 E.
template <int E, class Element>
SIMT_UNSEEN inline void mma_16x8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Slot {
    float* d;
    const uint32_t *a, *b;
  } slot{d, a, b};
  static const char operation = 0;
  collective(
      ~0u, &operation, &slot,
      [](void** lanes, unsigned) SIMT_UNSEEN {
        constexpr int K = 8 * E;
        float left[16][K], right[K][8];
        for (int lane = 0; lane < 32; ++lane) {
          const Slot& s = *static_cast<Slot*>(lanes[lane]);
          const int group = lane / 4, place = lane % 4;
          for (int e = 0; e < E; ++e) {
            for (int r = 0; r < 4; ++r)
              left[group + 8 * (r % 2)][place * E + e + K / 2 * (r / 2)] = Element::get(s.a[r], e);
            for (int r = 0; r < 2; ++r)
              right[place * E + e + K / 2 * r][group] = Element::get(s.b[r], e);
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          Slot& s = *static_cast<Slot*>(lanes[lane]);
          const int group = lane / 4, place = lane % 4;
          for (int r = 0; r < 4; ++r) {
            float sum = s.d[r];
            for (int k = 0; k < K; ++k)
              sum += left[group + 8 * (r / 2)][k] * right[k][2 * place + r % 2];
            s.d[r] = sum;
          }
        }
      },
      false);
}

}  // namespace simt

// exp, sigmoid and tanh on vectors.
#pragma once

#include "vec.h"

namespace fastlstm {
namespace {

// Double has the coefficients and the range reduction of Cephes (Moshier, 1989: exp, tanh). Float
// has its range reduction (expf), and both functions of e^r - 1 = r + r^2 p(r), |r| <= ln(2) / 2,
// where p is the polynomial with the least relative error of the whole, 1.3e-8.
// tests/ops/test_native.py checks the error against exact values over the whole range: float 3e-7
// relative for tanh and 2e-7 absolute for sigmoid, double 1e-15. NaN gives NaN: it compares false
// in the clamps below and passes them.
template <class T>
struct Math;

// 1 / x. With AVX-512 a division of 16 floats takes 16 cycles; an estimate and one Newton step take
// five.
FASTLSTM_INLINE VecF reciprocal(VecF x) {
#ifdef __AVX512F__
  const VecF y = bit_cast<VecF>(estimate_reciprocal(bit_cast<__m512>(x)));
  return y + y * (1.0f - x * y);
#else
  return 1.0f / x;
#endif
}

// a / b in the same way. The error of the quotient is corrected, so that x / x is 1.
FASTLSTM_INLINE VecF quotient(VecF a, VecF b) {
#ifdef __AVX512F__
  const VecF y = bit_cast<VecF>(estimate_reciprocal(bit_cast<__m512>(b))), q = a * y;
  return q + y * (a - q * b);
#else
  return a / b;
#endif
}

// The larger and the smaller of a bound and x. NaN stays NaN.
FASTLSTM_INLINE VecF larger(VecF bound, VecF x) {
#ifdef __AVX512F__
  return bit_cast<VecF>(larger_or_second(bit_cast<__m512>(bound), bit_cast<__m512>(x)));
#else
  return x < bound ? bound : x;
#endif
}
FASTLSTM_INLINE VecF smaller(VecF bound, VecF x) {
#ifdef __AVX512F__
  return bit_cast<VecF>(smaller_or_second(bit_cast<__m512>(bound), bit_cast<__m512>(x)));
#else
  return x > bound ? bound : x;
#endif
}

template <>
struct Math<float> {
  static FASTLSTM_INLINE VecF one() { return VecF{} + 1.0f; }

  // e^x is scale * (1 + rest), scale a power of two. x is cut to -bound and bound.
  struct Power {
    VecF scale, rest;
  };
  static FASTLSTM_INLINE Power power(VecF x, float bound) {
    x = smaller(VecF{} + bound, larger(VecF{} - bound, x));
    const VecF shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to integer
    const VecF n = shifted - 12582912.0f;
    const VecF r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    // In pairs: a shorter chain of dependent operations than one term after the other.
    const VecF r2 = r * r;
    const VecF p = (r * 1.6666543e-1f + 4.9999998e-1f) +
                   r2 * ((r * 8.3665488e-3f + 4.1667201e-2f) + r2 * 1.3882520e-3f);
    // The integer n is in the low bits of `shifted`.
    const VecF scale = bit_cast<VecF>((bit_cast<VecFi>(shifted) << 23) + (127 << 23));
    return {scale, p * r2 + r};
  }

  static FASTLSTM_INLINE VecF sigmoid(VecF x) {
    const Power e = power(-x, 87.0f);
    return reciprocal(e.scale * e.rest + (e.scale + 1.0f));
  }

  // (e^2x - 1) / (e^2x + 1). Where x is small, so is `rest`, and nothing cancels.
  static FASTLSTM_INLINE VecF tanh(VecF x) {
    const Power e = power(x + x, 40.0f);
    const VecF less_one = e.scale * e.rest + (e.scale - 1.0f);
    return quotient(less_one, less_one + 2.0f);
  }
};

template <>
struct Math<double> {
  static FASTLSTM_INLINE VecD one() { return VecD{} + 1.0; }

  static FASTLSTM_INLINE VecD exp(VecD x) {
    x = x < -708.0 ? VecD{} - 708.0 : x;
    x = x > 709.0 ? VecD{} + 709.0 : x;
    const VecD shifted = x * 1.4426950408889634073599 + 6755399441055744.0;  // 1.5 * 2^52
    const VecD n = shifted - 6755399441055744.0;
    const VecD r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
    const VecD z = r * r;
    VecD p = z * 1.26177193074810590878e-4 + 3.02994407707441961300e-2;
    p = (p * z + 9.99999999999999999910e-1) * r;
    VecD q = z * 3.00198505138664455042e-6 + 2.52448340349684104192e-3;
    q = q * z + 2.27265548208155028766e-1;
    q = q * z + 2.00000000000000000009e0;
    const VecD y = 1.0 + 2.0 * (p / (q - p));
    return y * bit_cast<VecD>((bit_cast<VecDi>(shifted) << 52) + (int64_t(1023) << 52));
  }

  static FASTLSTM_INLINE VecD sigmoid(VecD x) { return 1.0 / (1.0 + exp(-x)); }

  static FASTLSTM_INLINE VecD tanh(VecD x) {
    const VecD z = x * x;
    VecD p = z * -9.64399179425052238628e-1 + -9.92877231001918586564e1;
    p = p * z + -1.61468768441708447952e3;
    VecD q = z + 1.12811678491632931402e2;
    q = q * z + 2.23548839060100448583e3;
    q = q * z + 4.84406305325125486048e3;
    const VecD small = x * z * (p / q) + x;
    const VecD magnitude = x < 0.0 ? -x : x;
    const VecD large = 1.0 - 2.0 / (exp(magnitude + magnitude) + 1.0);
    return magnitude < 0.625 ? small : (x < 0.0 ? -large : large);
  }
};

}  // namespace
}  // namespace fastlstm

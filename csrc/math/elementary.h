// exp, log, sin and cos in float32 by IEEE add, subtract and multiply alone, so that every backend
// gives the same bits. Coefficients: minimax in relative error, fitted for these intervals; within
// 2 ulp of the exact value (swept in bench/noise_quality). kernels/arithmetic.py and
// fastgen/reference/arithmetic.py hold the same constants.
#pragma once

#include "macros.h"

namespace fastgen::FASTGEN_ISA {

// Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even; the low bits of
// the sum hold that integer.
constexpr float kRoundMagic = 12582912.0f;

// log(x) for a normal x > 0: x = 2^k m with m in [sqrt(1/2), sqrt(2)).
FASTGEN_INLINE float log_positive(float x) {
    const uint32_t bits = float_bits(x);
    const int32_t k = int32_t(bits - 0x3F3504F3u) >> 23;
    const float m = bits_float(bits - (uint32_t(k) << 23));
    const float f = m - 1.0f;
    float p = -0x1.38b5800000000p-4f;
    p = p * f + 0x1.055b6a0000000p-3f;
    p = p * f + -0x1.0d85420000000p-3f;
    p = p * f + 0x1.22da1c0000000p-3f;
    p = p * f + -0x1.5472440000000p-3f;
    p = p * f + 0x1.99a0080000000p-3f;
    p = p * f + -0x1.0002260000000p-2f;
    p = p * f + 0x1.5555540000000p-2f;
    const float square = f * f;
    const float exponent = float(k);
    // ln 2 in two parts: the first has 12 bits, so that its product with k is exact.
    float tail = square * f * p - 0.5f * square;
    tail = exponent * -0x1.bd01060000000p-13f + tail;
    return exponent * 0x1.6300000000000p-1f + (f + tail);
}

// exp(x) for every x: 0 and infinity beyond the range, NaN passed on, denormal results kept.
FASTGEN_INLINE float exp_any(float x) {
    x = x > 89.0f ? 89.0f : x;
    x = x < -104.0f ? -104.0f : x;
    const float shifted = x * 0x1.7154760000000p+0f + kRoundMagic;
    const float n = shifted - kRoundMagic;
    const int32_t k = int32_t(float_bits(shifted) - 0x4B400000u);
    // ln 2 in two parts: the first has 15 bits, so that its product with n is exact.
    const float r = (x - n * 0x1.62e4000000000p-1f) - n * 0x1.7f7d1c0000000p-20f;
    float p = 0x1.6a244c0000000p-10f;
    p = p * r + 0x1.1239d40000000p-7f;
    p = p * r + 0x1.5558f20000000p-5f;
    p = p * r + 0x1.5554920000000p-3f;
    p = p * r + 0x1.fffffc0000000p-2f;
    p = 1.0f + (r + r * r * p);
    // 2^k in two factors: k reaches past the range of normal exponents on both sides.
    const int32_t half = k >> 1;
    return p * bits_float(uint32_t(half + 127) << 23) * bits_float(uint32_t(k - half + 127) << 23);
}

// cos and sin of 2 pi u for u in [0, 1].
FASTGEN_INLINE void cos_sin_turn(float u, float& cosine, float& sine) {
    const float t = 4.0f * u;
    const float shifted = t + kRoundMagic;
    const uint32_t quadrant = float_bits(shifted);
    const float f = t - (shifted - kRoundMagic);  // exact, in [-1/2, 1/2] quarter turns
    const float y = f * f;
    float s = -0x1.2d93020000000p-8f;
    s = s * y + 0x1.465e920000000p-4f;
    s = s * y + -0x1.4abbba0000000p-1f;
    s = s * y + 0x1.921fb60000000p+0f;
    s = s * f;
    float c = 0x1.d9d57e0000000p-11f;
    c = c * y + -0x1.55c5e00000000p-6f;
    c = c * y + 0x1.03c1de0000000p-2f;
    c = c * y + -0x1.3bd3cc0000000p+0f;
    c = c * y + 1.0f;
    const bool odd = (quadrant & 1u) != 0;
    const float cosine_size = odd ? s : c;
    const float sine_size = odd ? c : s;
    cosine = bits_float(float_bits(cosine_size) ^ (((quadrant + 1u) & 2u) << 30));
    sine = bits_float(float_bits(sine_size) ^ ((quadrant & 2u) << 30));
}

}  // namespace fastgen::FASTGEN_ISA

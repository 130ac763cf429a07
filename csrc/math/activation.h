// Activations in float32 by IEEE add, subtract, multiply and divide alone: the same bits wherever
// they run. Within 4 ulp of the exact value where |y| >= 2^-10, within 2^-31 below (swept in
// tests/test_conv_transpose.py). NaN is passed on. kernels/conv_transpose.py holds the same
// constants.
#pragma once

#include "elementary.h"

namespace fastgen::FASTGEN_ISA {

FASTGEN_INLINE float magnitude(float x) { return bits_float(float_bits(x) & 0x7FFFFFFFu); }

// 1 / (1 + exp(-x)), by way of exp(-|x|), which cannot overflow.
FASTGEN_INLINE float sigmoid(float x) {
    const float e = exp_any(-magnitude(x));
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

FASTGEN_INLINE float silu(float x) { return x * sigmoid(x); }

FASTGEN_INLINE float tanh_any(float x) {
    const float a = magnitude(x);
    const float far = 1.0f - 2.0f / (exp_any(2.0f * a) + 1.0f);
    const float y = a * a;
    float p = -0x1.75e1cc0000000p-8f;
    p = p * y + 0x1.52269a0000000p-6f;
    p = p * y + -0x1.b83c5a0000000p-5f;
    p = p * y + 0x1.1107260000000p-3f;
    p = p * y + -0x1.5555320000000p-2f;
    const float near = a + a * y * p;  // odd series: no cancellation towards zero
    const float size = a < 0.625f ? near : far;
    return bits_float(float_bits(size) | (float_bits(x) & 0x80000000u));
}

// x Phi(x), Phi the normal distribution function: Hendrycks & Gimpel (2016), the exact form.
// With a = |x| and w = a / (a + 2): x Phi(x) = max(x, 0) - w exp(-a^2 / 2) P(w), P minimax in
// relative error up to a = 4.2 and within 5e-7 beyond, where the term is below 2^-13.
FASTGEN_INLINE float gelu(float x) {
    float a = magnitude(x);
    a = a > 14.5f ? 14.5f : a;  // exp(-14.5^2 / 2) is zero in float32
    // a^2 in two parts, the first exact: exp would magnify its rounding error.
    const float head = bits_float(float_bits(a) & 0xFFFFF000u);
    const float d = -0.5f * ((a - head) * (a + head));
    const float correction = d + d * d * (0.5f + d * 0x1.5555560000000p-3f);  // exp(d) - 1
    const float w = a / (a + 2.0f);
    float p = 0x1.433c880000000p-4f;
    p = p * w + -0x1.7324740000000p-3f;
    p = p * w + 0x1.c2c6040000000p-4f;
    p = p * w + -0x1.122a320000000p-4f;
    p = p * w + 0x1.c7f3d80000000p-5f;
    p = p * w + 0x1.adac6e0000000p-4f;
    p = p * w + 0x1.5be6d80000000p-4f;
    p = p * w + -0x1.883b8a0000000p-3f;
    p = p * w + -0x1.3108c00000000p-1f;
    p = p * w;
    p = 1.0f + (p + correction * (1.0f + p));
    return (x < 0.0f ? 0.0f : x) - w * (exp_any(-0.5f * (head * head)) * p);
}

}  // namespace fastgen::FASTGEN_ISA

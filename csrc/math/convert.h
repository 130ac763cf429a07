// float32 from and to bfloat16 and float16: round to nearest even, denormals kept, NaN stays NaN.
#pragma once

#include "macros.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fastgen::FASTGEN_ISA {

// Storage types: the bits alone.
struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

FASTGEN_INLINE float to_float(float value) { return value; }

FASTGEN_INLINE float to_float(bfloat16 value) { return bits_float(uint32_t{value.bits} << 16); }

FASTGEN_INLINE float to_float(float16 value) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(value.bits));
#else
    const uint32_t magnitude = (uint32_t{value.bits} & 0x7FFFu) << 13;
    // The product moves the exponent's bias from 15 to 127 and is exact, denormals included.
    const uint32_t finite = float_bits(bits_float(magnitude) * 0x1p112f);
    const uint32_t special = magnitude | 0x7F800000u;
    const uint32_t sign = (uint32_t{value.bits} & 0x8000u) << 16;
    return bits_float((magnitude >= 0x0F800000u ? special : finite) | sign);
#endif
}

FASTGEN_INLINE void from_float(float value, float& out) { out = value; }

FASTGEN_INLINE void from_float(float value, bfloat16& out) {
#if defined(__CUDA_ARCH__)
    out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
    const uint32_t bits = float_bits(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    out.bits = uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : rounded);
#endif
}

FASTGEN_INLINE void from_float(float value, float16& out) {
#if defined(__CUDA_ARCH__)
    out.bits = __half_as_ushort(__float2half_rn(value));
#else
    const uint32_t bits = float_bits(value);
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    const uint32_t sign = (bits >> 16) & 0x8000u;
    // Below 2^-14 the sum with 1/2 has its last place at float16's smallest denormal.
    const uint32_t denormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    const uint32_t finite = magnitude < 0x38800000u ? denormal : normal;
    out.bits = uint16_t((magnitude >= 0x47800000u ? special : finite) | sign);
#endif
}

}  // namespace fastgen::FASTGEN_ISA

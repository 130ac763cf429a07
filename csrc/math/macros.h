// Every function under math/ is inline, free of the standard library, and lives in a namespace of
// its instruction set, so that the linker can never merge a baseline copy with an AVX-512 one.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define FASTGEN_INLINE __host__ __device__ __forceinline__
#else
#define FASTGEN_INLINE inline __attribute__((always_inline))
#endif

#ifndef FASTGEN_ISA
#define FASTGEN_ISA baseline
#endif

namespace fastgen::FASTGEN_ISA {

FASTGEN_INLINE uint32_t float_bits(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

FASTGEN_INLINE float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

}  // namespace fastgen::FASTGEN_ISA

// Two words to two normals: Box & Muller (1958).
#pragma once

#include "elementary.h"

#if !defined(__CUDA_ARCH__)
#include <math.h>
#endif

namespace fastgen::FASTGEN_ISA {

FASTGEN_INLINE float uniform_open_closed(uint32_t word) {  // in (0, 1]
    return float(word) * 0x1p-32f + 0x1p-33f;
}

FASTGEN_INLINE void box_muller(uint32_t radius_word, uint32_t angle_word, float& z0, float& z1) {
    const float log_u = log_positive(uniform_open_closed(radius_word));
    const float radius = sqrtf(-2.0f * log_u);
    float cosine, sine;
    cos_sin_turn(uniform_open_closed(angle_word), cosine, sine);
    z0 = radius * cosine;
    z1 = radius * sine;
}

}  // namespace fastgen::FASTGEN_ISA

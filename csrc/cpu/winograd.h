// Winograd's F(2x2, 2x2): four outputs of a phase with 2x2 taps from nine products in place of
// sixteen. Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks" (2016); in one dim
//     y_0 = m_0 + m_1, y_1 = m_1 + m_2, with
//     m_0 = (d_0 - d_1) g_0, m_1 = d_1 (g_0 + g_1), m_2 = (d_2 - d_1) g_1.
// A patch is two outputs by two, of three inputs by three.
#pragma once

#include "multiply.h"
#include "tile.h"
#include "vector.h"

namespace fastgen::FASTGEN_ISA {

FASTGEN_INLINE Vector& lanes(const float* at) {
    return *const_cast<Vector*>(reinterpret_cast<const Vector*>(at));
}

// Of 3x3 inputs, `across` and `down` from one to the next, to nine places `apart` from each other.
// Whole vectors of channels: there must be room for the last one.
FASTGEN_INLINE void patch_of(const float* in, int64_t across, int64_t down, int64_t channels,
                             float* to, int64_t apart) {
    for (int64_t c = 0; c < channels; c += kLanes) {
        Vector t[3][3];
        for (int j = 0; j < 3; ++j) {
            const float* d = in + j * across + c;
            t[1][j] = lanes(d + down);
            t[0][j] = lanes(d) - t[1][j];
            t[2][j] = lanes(d + 2 * down) - t[1][j];
        }
        for (int i = 0; i < 3; ++i) {
            float* m = to + 3 * i * apart + c;
            lanes(m) = t[i][0] - t[i][1];
            lanes(m + apart) = t[i][1];
            lanes(m + 2 * apart) = t[i][2] - t[i][1];
        }
    }
}

// Nine tiles of products, `apart`, become four of outputs: at 3 i + j, i and j of 0 and 1.
FASTGEN_INLINE void outputs_of_products(float* products, int64_t apart, int64_t count) {
    for (int64_t k = 0; k < count; k += kLanes) {
        float* m = products + k;
        Vector s[2][3];
        for (int j = 0; j < 3; ++j) {
            const Vector middle = lanes(m + (3 + j) * apart);
            s[0][j] = lanes(m + j * apart) + middle;
            s[1][j] = middle + lanes(m + (6 + j) * apart);
        }
        for (int i = 0; i < 2; ++i) {
            lanes(m + 3 * i * apart) = s[i][0] + s[i][1];
            lanes(m + (3 * i + 1) * apart) = s[i][1] + s[i][2];
        }
    }
}

}  // namespace fastgen::FASTGEN_ISA

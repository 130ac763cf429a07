// How inputs come to where tile products read them (multiply.h): from any dtype and strides, a
// position at a time, or a row of positions.
#pragma once

#include "../math/convert.h"
#include "cutting.h"
#include "tile.h"

namespace fastgen::FASTGEN_ISA {

// Of a group, and where they go (Place): `pitch` is what lies from row to row of it.
struct Channels {
    int64_t count, depth;  // depth: with the zeros behind them
    int64_t step;          // from channel to channel of the source
    bool floats;           // where they go; else bfloat16
};

// 32 bits, wherever they lie: a float, or two bfloat16.
typedef uint32_t Word __attribute__((aligned(1), may_alias));

// to[k * pitch + row] = from[row][k]; zeros where a row is null. At most 16 rows.
static inline void transpose_words(const Word* const* from, int rows, int64_t words, uint32_t* to,
                                   int64_t pitch) {
    int64_t k = 0;
#if defined(__AVX512F__)
    const __mmask16 mask = __mmask16((1u << rows) - 1);
    for (; k + 16 <= words; k += 16) {
        __m512i a[16], b[16];
        for (int i = 0; i < 16; ++i)
            a[i] = i < rows && from[i] ? _mm512_loadu_si512(from[i] + k) : _mm512_setzero_si512();
        for (int i = 0; i < 16; i += 2) {
            b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        }
        for (int i = 0; i < 16; i += 4)
            for (int j = 0; j < 2; ++j) {
                a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + 2 + j]);
                a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + 2 + j]);
            }
        for (int j = 0; j < 4; ++j)
            for (int i = 0; i < 2; ++i) {
                b[8 * i + j] = _mm512_shuffle_i32x4(a[8 * i + j], a[8 * i + 4 + j], 0x88);
                b[8 * i + 4 + j] = _mm512_shuffle_i32x4(a[8 * i + j], a[8 * i + 4 + j], 0xdd);
            }
        for (int j = 0; j < 8; ++j) {
            a[j] = _mm512_shuffle_i32x4(b[j], b[8 + j], 0x88);
            a[8 + j] = _mm512_shuffle_i32x4(b[j], b[8 + j], 0xdd);
        }
        for (int j = 0; j < 16; ++j) _mm512_mask_storeu_epi32(to + (k + j) * pitch, mask, a[j]);
    }
#endif
    for (int row = 0; row < rows; ++row)
        if (const Word* source = from[row])
            for (int64_t i = k; i < words; ++i) to[i * pitch + row] = source[i];
        else
            for (int64_t i = k; i < words; ++i) to[i * pitch + row] = 0;
}

// Two channels side by side; null: zeros.
FASTGEN_INLINE void gather_pair(const uint16_t* low, const uint16_t* high, int64_t across,
                                int64_t count, uint32_t* to) {
    int64_t i = 0;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    if (across == 1 && low && high)
        for (; i < count; i += 16) {
            const int64_t left = count - i;
            const __mmask16 mask = left < 16 ? __mmask16((1u << left) - 1) : __mmask16(0xFFFF);
            const __m512i l = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, low + i));
            const __m512i h = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, high + i));
            _mm512_mask_storeu_epi32(to + i, mask, _mm512_or_si512(l, _mm512_slli_epi32(h, 16)));
        }
#endif
    for (; i < count; ++i)
        to[i] = (low ? low[i * across] : 0u) | uint32_t(high ? high[i * across] : 0u) << 16;
}

template <typename Element>
FASTGEN_INLINE void gather_floats(const Element* from, int64_t across, int64_t count, float* to) {
    if (!from) {
        for (int64_t i = 0; i < count; ++i) to[i] = 0.0f;
        return;
    }
    int64_t i = 0;
#if defined(__AVX512F__)
    if constexpr (sizeof(Element) == 4)
        if (across == 1)
            for (; i < count; i += 16) {
                const int64_t left = count - i;
                const __mmask16 mask = left < 16 ? __mmask16((1u << left) - 1) : __mmask16(0xFFFF);
                _mm512_mask_storeu_ps(to + i, mask, _mm512_maskz_loadu_ps(mask, from + i));
            }
#endif
    if (across == 1)
        for (; i < count; ++i) to[i] = to_float(from[i]);
    for (; i < count; ++i) to[i] = to_float(from[i * across]);
}

// `count` positions, `across` from one to the next, of channels that lie in any way; null: zeros.
template <typename Element>
static void gather_row(Place place, const Channels& channels, const Element* from, int64_t across,
                       int64_t count, void* to, int64_t pitch) {
    const int64_t step = channels.step, all = channels.count, depth = channels.depth;
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(from);
    const auto channel = [&](int64_t c) { return from && c < all ? bits + c * step : nullptr; };
    if (place == Place::kChannels) {
        if (channels.floats)
            for (int64_t c = 0; c < depth; ++c)
                gather_floats(from && c < all ? from + c * step : nullptr, across, count,
                              static_cast<float*>(to) + c * pitch);
        else
            for (int64_t c = 0; c < depth; c += 2)
                gather_pair(channel(c), channel(c + 1), across, count,
                            static_cast<uint32_t*>(to) + c / 2 * pitch);
        return;
    }
    const int64_t each = channels.floats ? 1 : 2, size = channels.floats ? 4 : 2;
    if (!from) {
        for (int64_t i = 0; i < count; ++i)
            __builtin_memset(static_cast<char*>(to) + i * pitch * size, 0, depth * size);
        return;
    }
    // blocks of 16 words: a float, or two bfloat16
    uint32_t words[16][16], block[16][16];  // [word][position] and back
    const Word* rows[16];
    for (int i = 0; i < 16; ++i) rows[i] = words[i];
    for (int64_t first = 0; first < count; first += 16) {
        const int64_t left = count - first < 16 ? count - first : 16;
        for (int64_t c = 0; c < depth; c += 16 * each) {
            const int64_t some = depth - c < 16 * each ? depth - c : 16 * each;
            for (int i = 0; i < 16; ++i) {
                const int64_t at = c + i * each;
                if (channels.floats) {
                    const Element* source =
                        from && at < all ? from + at * step + first * across : nullptr;
                    gather_floats(source, across, left, reinterpret_cast<float*>(words[i]));
                } else {
                    const uint16_t *low = channel(at), *high = channel(at + 1);
                    gather_pair(low ? low + first * across : nullptr,
                                high ? high + first * across : nullptr, across, left, words[i]);
                }
            }
            transpose_words(rows, 16, 16, block[0], 16);
            char* target = static_cast<char*>(to) + (first * pitch + c) * size;
            for (int64_t i = 0; i < left; ++i, target += pitch * size)
                if (some == 16 * each)
                    __builtin_memcpy(target, block[i], sizeof block[i]);
                else
                    __builtin_memcpy(target, block[i], some * size);
        }
    }
}

// At most 16 positions whose channels lie side by side; null: zeros.
template <typename Element>
static void gather_positions(Place place, const Channels& channels, const Element* const* from,
                             int count, void* to, int64_t pitch) {
    const int64_t all = channels.count, depth = channels.depth;
    if (place == Place::kPositions) {
        for (int i = 0; i < count; ++i) {
            const int64_t there = from[i] ? all : 0;
            if (channels.floats) {
                float* row = static_cast<float*>(to) + i * pitch;
                if (there) gather_floats(from[i], 1, there, row);
                for (int64_t c = there; c < depth; ++c) row[c] = 0.0f;
            } else {
                uint16_t* row = static_cast<uint16_t*>(to) + i * pitch;
                if (there) __builtin_memcpy(row, from[i], there * 2);
                for (int64_t c = there; c < depth; ++c) row[c] = 0;
            }
        }
        return;
    }
    if (channels.floats && sizeof(Element) != 4) {
        for (int i = 0; i < count; ++i) {
            float* column = static_cast<float*>(to) + i;
            for (int64_t c = 0; c < all; ++c)
                column[c * pitch] = from[i] ? to_float(from[i][c]) : 0.0f;
        }
        return;
    }
    const int64_t words = channels.floats ? all : all / 2;
    const Word* rows[16];
    for (int i = 0; i < count; ++i) rows[i] = reinterpret_cast<const Word*>(from[i]);
    uint32_t* out = static_cast<uint32_t*>(to);
    transpose_words(rows, count, words, out, pitch);
    if (channels.floats) return;
    for (int64_t pair = words; pair < depth / 2; ++pair)
        for (int i = 0; i < count; ++i) {
            const uint16_t* source = reinterpret_cast<const uint16_t*>(from[i]);
            out[pair * pitch + i] = source && 2 * pair < all ? source[2 * pair] : 0;
        }
}

}  // namespace fastgen::FASTGEN_ISA

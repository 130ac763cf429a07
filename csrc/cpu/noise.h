// A tile of standard normals in logical order: 32 Philox blocks (128 normals) at a time.
#pragma once

#include "../math/normal.h"
#include "../math/philox.h"
#include "tile.h"

namespace fastgen::FASTGEN_ISA {

constexpr int kBlocks = 32;

// words[j][i]: word j of block `block + i`.
static inline void philox_blocks(uint32_t words[4][kBlocks], uint32_t block, uint32_t c1,
                                 uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
#if defined(__AVX512F__)
    // Eight blocks a vector, a word in the low half of each 64-bit lane; the multiply reads that
    // half alone, so the high halves may hold anything until the words are packed.
    const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
    const __m512i lane = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    __m512i a[kBlocks / 8], b[kBlocks / 8], c[kBlocks / 8], d[kBlocks / 8];
    for (int half = 0; half < kBlocks / 8; ++half) {
        a[half] = _mm512_add_epi64(_mm512_set1_epi64(uint64_t{block} + 8 * half), lane);
        b[half] = _mm512_set1_epi64(c1);
        c[half] = _mm512_set1_epi64(c2);
        d[half] = _mm512_set1_epi64(c3);
    }
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
        for (int half = 0; half < kBlocks / 8; ++half) {
            const __m512i p0 = _mm512_mul_epu32(a[half], m0);
            const __m512i p1 = _mm512_mul_epu32(c[half], m1);
            a[half] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), b[half], key0, 0x96);
            c[half] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), d[half], key1, 0x96);
            b[half] = p1;
            d[half] = p0;
        }
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
    }
    for (int half = 0; half < kBlocks / 8; ++half) {
        const __m512i* columns[4] = {a, b, c, d};
        for (int word = 0; word < 4; ++word)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(words[word] + 8 * half),
                                _mm512_cvtepi64_epi32(columns[word][half]));
    }
#elif defined(__AVX2__)
    const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
    const __m256i lane = _mm256_set_epi64x(3, 2, 1, 0);
    __m256i a[kBlocks / 4], b[kBlocks / 4], c[kBlocks / 4], d[kBlocks / 4];
    for (int part = 0; part < kBlocks / 4; ++part) {
        a[part] = _mm256_add_epi64(_mm256_set1_epi64x(int64_t{block} + 4 * part), lane);
        b[part] = _mm256_set1_epi64x(c1);
        c[part] = _mm256_set1_epi64x(c2);
        d[part] = _mm256_set1_epi64x(c3);
    }
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
        for (int part = 0; part < kBlocks / 4; ++part) {
            const __m256i p0 = _mm256_mul_epu32(a[part], m0);
            const __m256i p1 = _mm256_mul_epu32(c[part], m1);
            a[part] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), b[part]), key0);
            c[part] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), d[part]), key1);
            b[part] = p1;
            d[part] = p0;
        }
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
    }
    const __m256i low_halves = _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0);
    for (int part = 0; part < kBlocks / 4; ++part) {
        const __m256i* columns[4] = {a, b, c, d};
        for (int word = 0; word < 4; ++word)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(words[word] + 4 * part),
                             _mm256_castsi256_si128(
                                 _mm256_permutevar8x32_epi32(columns[word][part], low_halves)));
    }
#else
    for (int i = 0; i < kBlocks; ++i) {
        uint32_t counter[4] = {block + uint32_t(i), c1, c2, c3};
        philox4x32(counter, k0, k1);
        for (int word = 0; word < 4; ++word) words[word][i] = counter[word];
    }
#endif
}

// z: room for kChunk normals; those of elements [tile.start, tile.start + count rounded up to 128).
static inline void fill_normal(float* z, const NoiseKey& key, int32_t stream, const Tile& tile) {
    const uint64_t seed = key.seeds ? uint64_t(key.seeds[tile.sample * key.seed_stride]) : key.seed;
    const uint64_t id =
        uint64_t(key.sample_ids ? key.sample_ids[tile.sample] : key.first_sample_id + tile.sample);
    const uint32_t step = key.step + uint32_t(key.step_pointer ? *key.step_pointer : 0);
    const uint32_t c1 = step << 8 | uint32_t(stream);
    uint32_t block = uint32_t(tile.start / 4);
    for (int64_t done = 0; done < tile.count; done += 4 * kBlocks, block += kBlocks) {
        uint32_t words[4][kBlocks];
        float normals[4][kBlocks];
        philox_blocks(words, block, c1, uint32_t(id), uint32_t(id >> 32), uint32_t(seed),
                      uint32_t(seed >> 32));
        for (int i = 0; i < kBlocks; ++i)
            box_muller(words[0][i], words[1][i], normals[0][i], normals[1][i]);
        for (int i = 0; i < kBlocks; ++i)
            box_muller(words[2][i], words[3][i], normals[2][i], normals[3][i]);
        float* to = z + done;
        for (int i = 0; i < kBlocks; ++i)
            for (int word = 0; word < 4; ++word) to[4 * i + word] = normals[word][i];
    }
}

}  // namespace fastgen::FASTGEN_ISA

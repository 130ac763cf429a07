// Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#include "macros.h"

namespace fastgen::FASTGEN_ISA {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// c: the counter on entry, the four random words on return.
FASTGEN_INLINE void philox4x32(uint32_t c[4], uint32_t k0, uint32_t k1) {
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint64_t p0 = uint64_t{kPhiloxM0} * c[0];
        const uint64_t p1 = uint64_t{kPhiloxM1} * c[2];
        c[0] = uint32_t(p1 >> 32) ^ c[1] ^ k0;
        c[1] = uint32_t(p1);
        c[2] = uint32_t(p0 >> 32) ^ c[3] ^ k1;
        c[3] = uint32_t(p0);
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
    }
}

}  // namespace fastgen::FASTGEN_ISA

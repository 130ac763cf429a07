#include "math/elementary.h"

#include <math.h>

#include "testing.h"

namespace fastgen::testing {
namespace {

using baseline::bits_float;

// Distance in units of the last place of the exact value.
double ulps(float value, double exact) {
    if (float(exact) == value) return 0;
    const double place = ldexp(1.0, ilogb(fmax(fabs(exact), 0x1p-126)) - 23);
    return fabs(value - exact) / place;
}

TEST(log_is_within_two_ulp) {
    for (uint32_t bits = 0x00800000; bits < 0x7F800000; bits += 1021) {
        const float x = bits_float(bits);
        CHECK(ulps(baseline::log_positive(x), log(double(x))) <= 2);
    }
}

TEST(exp_is_within_two_ulp) {
    for (uint32_t bits = 0; bits < 0x42B00000; bits += 1021)  // up to 88
        for (float x : {bits_float(bits), -bits_float(bits)})
            CHECK(ulps(baseline::exp_any(x), exp(double(x))) <= 2);
    CHECK(baseline::exp_any(INFINITY) == INFINITY && baseline::exp_any(-INFINITY) == 0);
    CHECK(isnan(baseline::exp_any(NAN)));
}

TEST(cos_and_sin_of_a_turn_are_close_and_exact_at_quarters) {
    for (uint32_t i = 0; i <= 1 << 20; ++i) {
        const float u = float(i) * 0x1p-20f;
        float cosine, sine;
        baseline::cos_sin_turn(u, cosine, sine);
        const double angle = 2 * M_PI * double(u);
        CHECK(fabs(cosine - cos(angle)) < 2 * 0x1p-24 && fabs(sine - sin(angle)) < 2 * 0x1p-24);
        if (i % (1 << 18) == 0) CHECK(cosine * sine == 0 && fabsf(cosine + sine) == 1);
    }
}

}  // namespace
}  // namespace fastgen::testing

// Conversions by way of the kernels: a step that copies x to an output of another dtype.
#include <math.h>

#include <algorithm>

#include "testing.h"

namespace fastgen::testing {
namespace {

using baseline::bits_float;

template <typename In, typename Out>
std::vector<Out> convert(const CpuKernels& kernels, std::vector<In> values, DType from, DType to) {
    std::vector<Out> result(values.size());
    StepParams p{};
    p.shape = {1, int64_t(values.size()), 1, {int64_t(values.size())}};
    p.x = {values.data(), from, 0, {1}};
    p.out[0] = {result.data(), to, 0, {1}};
    p.row.weights[0][kX] = 1.0f;
    kernels.step(p, 1);
    return result;
}

// How a 16-bit format reads, from its definition: sign, exponent, mantissa.
struct Format {
    DType dtype;
    int exponent_bits, mantissa_bits;

    double value(uint16_t bits) const {
        const int exponent = (bits & 0x7FFF) >> mantissa_bits;
        const int mantissa = bits & ((1 << mantissa_bits) - 1);
        const int bias = (1 << (exponent_bits - 1)) - 1;
        const double sign = bits & 0x8000 ? -1.0 : 1.0;
        if (exponent == (1 << exponent_bits) - 1) return mantissa ? NAN : sign * INFINITY;
        if (exponent == 0) return sign * ldexp(mantissa, 1 - bias - mantissa_bits);
        return sign * ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
    }
    uint16_t infinity() const { return uint16_t(((1 << exponent_bits) - 1) << mantissa_bits); }

    // Nearest, ties to even, by bisection over the table of positive values.
    uint16_t nearest(float from) const {
        const double size = fabs(double(from));
        const uint16_t sign = signbit(from) ? 0x8000 : 0;
        uint16_t low = 0, high = infinity();  // value(low) <= size
        while (high - low > 1) {
            const uint16_t middle = uint16_t((low + high) / 2);
            (value(middle) <= size ? low : high) = middle;
        }
        // Beyond the largest finite value, infinity counts as the value that would follow it.
        const double above = high == infinity() ? 2 * value(low) - value(low - 1) : value(high);
        const double half = value(low) + (above - value(low)) / 2;
        const bool up = size > half || (size == half && (low & 1));
        return sign | (up ? high : low);
    }
};

const Format formats[] = {{kBFloat16, 8, 7}, {kFloat16, 5, 10}};

TEST(every_16_bit_value_widens_exactly) {
    std::vector<uint16_t> all(1 << 16);
    for (int i = 0; i < 1 << 16; ++i) all[i] = uint16_t(i);
    for (const Format& format : formats)
        for_each_isa([&](const CpuKernels& kernels) {
            const auto wide = convert<uint16_t, float>(kernels, all, format.dtype, kFloat32);
            for (int i = 0; i < 1 << 16; ++i) {
                const double expected = format.value(uint16_t(i));
                CHECK(isnan(expected) ? isnan(wide[i])
                                      : wide[i] == expected &&
                                            bool(signbit(wide[i])) == bool(signbit(expected)));
            }
        });
}

// Rounding is monotone, so that the neighbours of every boundary stand for all floats between.
TEST(floats_narrow_to_the_nearest_ties_to_even) {
    for (const Format& format : formats) {
        std::vector<float> values = {INFINITY, -INFINITY, NAN, 0.0f, -0.0f, 3.4028235e38f};
        for (uint16_t bits = 0; bits < format.infinity(); ++bits) {
            const double low = format.value(bits);
            const double high = bits + 1 == format.infinity()
                                    ? 2 * low - format.value(uint16_t(bits - 1))
                                    : format.value(uint16_t(bits + 1));
            const float exact = float(low), half = float(low + (high - low) / 2);
            for (float value : {exact, nextafterf(exact, 0), nextafterf(exact, INFINITY), half,
                                nextafterf(half, 0), nextafterf(half, INFINITY)})
                values.insert(values.end(), {value, -value});
        }
        for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 65521)  // a sweep between them
            values.push_back(bits_float(uint32_t(bits)));
        for_each_isa([&](const CpuKernels& kernels) {
            const auto narrow = convert<float, uint16_t>(kernels, values, kFloat32, format.dtype);
            for (size_t i = 0; i < values.size(); ++i)
                CHECK(isnan(values[i]) ? isnan(format.value(narrow[i]))
                                       : narrow[i] == format.nearest(values[i]));
        });
    }
}

}  // namespace
}  // namespace fastgen::testing

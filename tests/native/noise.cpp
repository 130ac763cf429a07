#include <math.h>

#include "math/philox.h"
#include "testing.h"

namespace fastgen::testing {
namespace {

struct KnownAnswer {
    uint32_t counter[4], key[2], words[4];
};

// From the authors' Random123 distribution.
TEST(philox_gives_its_known_answers) {
    const KnownAnswer answers[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}};
    for (const KnownAnswer& answer : answers) {
        uint32_t c[4] = {answer.counter[0], answer.counter[1], answer.counter[2],
                         answer.counter[3]};
        baseline::philox4x32(c, answer.key[0], answer.key[1]);
        for (int i = 0; i < 4; ++i) CHECK(c[i] == answer.words[i]);
    }
}

std::vector<float> draw(const CpuKernels& kernels, int64_t batch, int64_t elements, NoiseKey key,
                        int32_t stream, int threads) {
    std::vector<float> z(batch * elements);
    StepParams p{};
    p.shape = {batch, elements, 1, {elements}};
    p.out[0] = {z.data(), kFloat32, elements, {1}};
    p.row.noise[0][0] = 1.0f;
    p.key = key;
    p.draws = 1;
    p.stream[0] = stream;
    kernels.step(p, threads);
    return z;
}

TEST(noise_is_a_function_of_seed_sample_step_stream_and_element) {
    const int64_t seeds[] = {-1, 0, int64_t{5} << 40}, ids[] = {7, int64_t{1} << 33, -3};
    const int64_t later = 4;
    NoiseKey key{};
    key.seeds = seeds;
    key.seed_stride = 1;
    key.sample_ids = ids;
    key.step = 1000;
    key.step_pointer = &later;
    for (int64_t elements : {1, 3, 64, 1023, 1025, 5000})
        for (int threads : {1, 2, 5})
            for_each_isa([&](const CpuKernels& kernels) {
                const auto z = draw(kernels, 3, elements, key, 255, threads);
                for (int64_t b = 0; b < 3; ++b)
                    for (int64_t i = 0; i < elements; ++i)
                        CHECK(z[b * elements + i] ==
                              normal(uint64_t(seeds[b]), ids[b], 1004, 255, i));
            });
}

TEST(normals_have_the_moments_of_a_normal) {
    NoiseKey key{};
    key.seed = 11;
    const int64_t n = 1 << 20;
    const auto z = draw(cpu_kernels(), 1, n, key, 2, 2);
    double sum = 0, square = 0, fourth = 0, largest = 0;
    for (float value : z) {
        const double s = double(value) * value;
        sum += value;
        square += s;
        fourth += s * s;
        largest = fmax(largest, fabs(double(value)));
    }
    CHECK(fabs(sum / n) < 5 / sqrt(double(n)));
    CHECK(fabs(square / n - 1) < 5 * sqrt(2.0 / n));
    CHECK(fabs(fourth / n - 3) < 5 * sqrt(96.0 / n));
    CHECK(largest <= 6.764);
}

}  // namespace
}  // namespace fastgen::testing

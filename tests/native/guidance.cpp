// The factor of guidance rescale against standard deviations in double precision.
#include <math.h>

#include "testing.h"

namespace fastgen::testing {
namespace {

double deviation(const std::vector<double>& values) {
    double mean = 0, square = 0;
    for (double value : values) mean += value / double(values.size());
    for (double value : values) square += (value - mean) * (value - mean);
    return sqrt(square / double(values.size() - 1));
}

TEST(rescale_is_the_ratio_of_standard_deviations_on_every_instruction_set) {
    Random random(22);
    for (int trial = 0; trial < 40; ++trial) {
        const Sizes sizes = {pick(random, 1, 3), pick(random, 2, 50), pick(random, 1, 60)};
        Array cond(sizes, any_dtype(random), any_layout(random, true), random);
        Array uncond(sizes, any_dtype(random), any_layout(random, true), random);
        cond.fill_ordinary(random);
        uncond.fill_ordinary(random);
        const std::vector<float> guidance = {7.5f, 1.0f, 3.0f};
        const int64_t batch = sizes[0], elements = sizes[1] * sizes[2];
        const int64_t chunks = (elements + kChunk - 1) / kChunk;
        std::vector<float> first;
        for_each_isa([&](const CpuKernels& kernels) {
            for (int threads : {1, 3}) {
                std::vector<float> scale(batch), partials(batch * 5 * chunks);
                RescaleParams p{};
                CHECK(
                    lay_out(p.shape, {{&p.cond, &cond}, {&p.uncond, &uncond}}, sizes, true, true));
                p.guidance = guidance.data();
                p.guidance_stride = 1;
                p.rescale = 0.7f;
                p.partials = partials.data();
                p.scale = scale.data();
                kernels.rescale(p, threads);
                if (first.empty()) first = scale;
                CHECK(scale == first);
            }
        });
        for (int64_t b = 0; b < batch; ++b) {
            std::vector<double> of_cond, of_guided;
            for (int64_t i = b * elements; i < (b + 1) * elements; ++i) {
                const double c = cond.at(i), u = uncond.at(i);
                of_cond.push_back(c);
                of_guided.push_back(u + guidance[b] * (c - u));
            }
            const double factor = 0.7 * deviation(of_cond) / deviation(of_guided) + 0.3;
            CHECK(fabs(first[b] - factor) < 1e-5 * factor);
        }
    }
}

}  // namespace
}  // namespace fastgen::testing

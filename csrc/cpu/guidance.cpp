// Per-sample factor of guidance rescale: Lin et al., "Common diffusion noise schedules and sample
// steps are flawed" (2024), equations 15 and 16.
#include <math.h>

#include "kernels.h"
#include "tile.h"

namespace fastgen::FASTGEN_ISA {
namespace {

struct Moments {
    float sum;
    float centred;  // sum of squared distances to the chunk's own mean
};

Moments chunk_moments(const float* values, int64_t count) {
    alignas(64) float scratch[kChunk];
    for (int64_t i = 0; i < kChunk; ++i) scratch[i] = i < count ? values[i] : 0.0f;
    const float sum = sum_chunk(scratch);
    const float mean = sum / float(count);
    for (int64_t i = 0; i < kChunk; ++i) {
        const float distance = values[i < count ? i : 0] - mean;
        scratch[i] = i < count ? distance * distance : 0.0f;
    }
    return {sum, sum_chunk(scratch)};
}

// Unbiased: M2 of all = sum of the chunks' M2 + sum of count (chunk mean - mean)^2 (Chan et al.,
// "Algorithms for computing the sample variance", 1983).
float standard_deviation(float* sums, float* centred, int64_t chunks, int64_t elements,
                         float* between) {
    for (int64_t c = 0; c < chunks; ++c) between[c] = sums[c];
    const float mean = sum_tree(between, chunks) / float(elements);
    for (int64_t c = 0; c < chunks; ++c) {
        const int64_t left = elements - c * kChunk;
        const float count = float(left < kChunk ? left : kChunk);
        const float distance = sums[c] / count - mean;
        between[c] = count * (distance * distance);
    }
    const float total = sum_tree(centred, chunks) + sum_tree(between, chunks);
    return sqrtf(total / float(elements - 1));
}

}  // namespace

void rescale(const RescaleParams& p, int threads) {
    const int64_t chunks = (p.shape.elements + kChunk - 1) / kChunk;
    for_each_tile(p.shape, threads, [&](const Tile& tile) {
        alignas(64) float cond[kChunk], guided[kChunk];
        const float* c = load(p.shape, p.cond, tile, cond);
        const float* u = load(p.shape, p.uncond, tile, guided);
        const float g = p.guidance ? p.guidance[tile.sample * p.guidance_stride] : p.guidance_scale;
        for (int64_t i = 0; i < tile.count; ++i)
            guided[i] = g == 1.0f ? c[i] : u[i] + g * (c[i] - u[i]);
        float* partials = p.partials + tile.sample * 5 * chunks + tile.start / kChunk;
        const Moments of_cond = chunk_moments(c, tile.count);
        const Moments of_guided = chunk_moments(guided, tile.count);
        partials[0 * chunks] = of_cond.sum;
        partials[1 * chunks] = of_cond.centred;
        partials[2 * chunks] = of_guided.sum;
        partials[3 * chunks] = of_guided.centred;
    });
    parallel_for(p.shape.batch, threads, [&](int64_t begin, int64_t end) {
        IeeeMode ieee;
        for (int64_t sample = begin; sample < end; ++sample) {
            float* partials = p.partials + sample * 5 * chunks;
            float* between = partials + 4 * chunks;
            const float of_cond =
                standard_deviation(partials, partials + chunks, chunks, p.shape.elements, between);
            const float of_guided = standard_deviation(partials + 2 * chunks, partials + 3 * chunks,
                                                       chunks, p.shape.elements, between);
            p.scale[sample] = p.rescale * (of_cond / of_guided) + (1.0f - p.rescale);
        }
    });
}

}  // namespace fastgen::FASTGEN_ISA

// z = mean + exp(logvar / 2) eps, with the KL divergence to N(0, 1) from the same pass, and the
// gradients of both with eps drawn again: Kingma & Welling, "Auto-encoding variational Bayes"
// (2014), section 2.4 and appendix B.
#include <math.h>

#include "kernels.h"
#include "noise.h"

namespace fastgen::FASTGEN_ISA {
namespace {

struct Buffers {
    alignas(64) float mean[kChunk], logvar[kChunk], noise[kChunk], grad[kChunk], out[kChunk];
};

bool clamps(const ReparameterizeParams& p) {
    return p.clamp_low != -INFINITY || p.clamp_high != INFINITY;
}

// exp(logvar / 2) into `deviation`; returns the log-variance, clamped into `room` where asked for.
const float* deviations(const ReparameterizeParams& p, const float* logvar, int64_t count,
                        float* room, float* __restrict deviation) {
    if (clamps(p)) {
        const float low = p.clamp_low, high = p.clamp_high;
        for (int64_t i = 0; i < count; ++i) {
            const float raised = logvar[i] < low ? low : logvar[i];
            room[i] = raised > high ? high : raised;
        }
        logvar = room;
    }
    for (int64_t i = 0; i < count; ++i) deviation[i] = exp_any(0.5f * logvar[i]);
    return logvar;
}

// Drawing takes long: meanwhile the tile's other tensors come into the caches.
const float* noise_of(const ReparameterizeParams& p, const Tile& tile, float* buffer) {
    if (p.given_noise.data) return load(p.shape, p.given_noise, tile, buffer);
    const Tensor* const meanwhile[] = {&p.mean, &p.logvar, &p.out, &p.grad_out, &p.grad_logvar};
    for (const Tensor* tensor : meanwhile) prefetch(p.shape, *tensor, tile);
    fill_normal(buffer, p.key, p.stream, tile);
    return buffer;
}

// Where results go before the store: the tensor's own memory where they may.
void finish(const Shape& shape, const Tensor& out, const Tile& tile, const float* values,
            const float* buffer) {
    if (values == buffer) store(shape, out, tile, values);
}

void forward_tile(const ReparameterizeParams& p, const Tile& tile, int64_t chunks) {
    Buffers b;
    alignas(64) float deviation[kChunk];
    const int64_t count = tile.count;
    const float* z = p.out.data ? noise_of(p, tile, b.noise) : nullptr;
    const float* mean = load(p.shape, p.mean, tile, b.mean);
    const float* logvar = load(p.shape, p.logvar, tile, b.logvar);
    logvar = deviations(p, logvar, count, b.logvar, deviation);
    float* divergence = b.grad;
    if (p.partials) {  // before z is written: out may be mean or logvar itself
        for (int64_t i = 0; i < count; ++i)
            divergence[i] = ((mean[i] * mean[i] + deviation[i] * deviation[i]) - 1.0f) - logvar[i];
        for (int64_t i = count; i < kChunk; ++i) divergence[i] = 0.0f;
        p.partials[tile.sample * chunks + tile.start / kChunk] = sum_chunk(divergence);
    }
    if (!z) return;
    float* to = destination(p.shape, p.out, tile, b.out);
    for (int64_t i = 0; i < count; ++i) to[i] = mean[i] + deviation[i] * z[i];
    finish(p.shape, p.out, tile, to, b.out);
}

void backward_tile(const ReparameterizeParams& p, const Tile& tile) {
    Buffers b;
    alignas(64) float deviation[kChunk], clamped[kChunk], result[kChunk];
    const int64_t count = tile.count;
    const bool draws = p.grad_out.data && p.grad_logvar.data;
    const float* z = draws ? noise_of(p, tile, b.noise) : nullptr;
    const float* logvar = load(p.shape, p.logvar, tile, b.logvar);
    const float* bounded = deviations(p, logvar, count, clamped, deviation);
    const float* grad = nullptr;
    if (p.grad_out.data) grad = load(p.shape, p.grad_out, tile, b.grad);
    const float grad_kl = p.grad_kl ? p.grad_kl[tile.sample] : 0.0f;
    if (p.grad_logvar.data) {
        float* to = destination(p.shape, p.grad_logvar, tile, b.out);
        const bool divergence = p.grad_kl != nullptr;
        for (int64_t i = 0; i < count; ++i) {
            float sum = grad ? 0.5f * (grad[i] * (deviation[i] * z[i])) : 0.0f;
            if (divergence) sum = sum + (0.5f * grad_kl) * (deviation[i] * deviation[i] - 1.0f);
            to[i] = bounded[i] < logvar[i] || bounded[i] > logvar[i] ? 0.0f : sum;
        }
        finish(p.shape, p.grad_logvar, tile, to, b.out);
    }
    if (p.grad_noise.data) {
        float* to = destination(p.shape, p.grad_noise, tile, result);
        for (int64_t i = 0; i < count; ++i) to[i] = grad[i] * deviation[i];
        finish(p.shape, p.grad_noise, tile, to, result);
    }
    if (p.grad_mean.data) {
        const float* mean = load(p.shape, p.mean, tile, b.mean);
        float* to = destination(p.shape, p.grad_mean, tile, result);
        for (int64_t i = 0; i < count; ++i) {
            float sum = grad ? grad[i] : 0.0f;
            if (p.grad_kl) sum = sum + grad_kl * mean[i];
            to[i] = sum;
        }
        finish(p.shape, p.grad_mean, tile, to, result);
    }
}

}  // namespace

void reparameterize(const ReparameterizeParams& p, int threads) {
    const int64_t chunks = (p.shape.elements + kChunk - 1) / kChunk;
    for_each_tile(p.shape, threads, [&](const Tile& tile) { forward_tile(p, tile, chunks); });
    if (!p.kl) return;
    parallel_for(p.shape.batch, threads, [&](int64_t begin, int64_t end) {
        IeeeMode ieee;
        for (int64_t sample = begin; sample < end; ++sample)
            p.kl[sample] = chunks ? 0.5f * sum_tree(p.partials + sample * chunks, chunks) : 0.0f;
    });
}

void reparameterize_backward(const ReparameterizeParams& p, int threads) {
    for_each_tile(p.shape, threads, [&](const Tile& tile) { backward_tile(p, tile); });
}

}  // namespace fastgen::FASTGEN_ISA

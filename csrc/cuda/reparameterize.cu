// z = mean + exp(logvar / 2) eps, with the KL divergence from the same pass, and the gradients of
// both with eps drawn again: the twin of csrc/cpu/reparameterize.cpp.
#include "launch.cuh"
#include "launch.h"
#include "noise.cuh"
#include "reduce.cuh"

namespace fastgen::cuda {
namespace {

constexpr int kTreeThreads = 256;

struct Deviation {
    float clamped[4], value[4];  // of the log-variance; exp(clamped / 2)
};

__device__ __forceinline__ Deviation deviation_of(const ReparameterizeParams& p,
                                                  const float logvar[4]) {
    Deviation deviation;
    for (int i = 0; i < 4; ++i) {
        const float raised = logvar[i] < p.clamp_low ? p.clamp_low : logvar[i];
        deviation.clamped[i] = raised > p.clamp_high ? p.clamp_high : raised;
        deviation.value[i] = exp_any(0.5f * deviation.clamped[i]);
    }
    return deviation;
}

template <bool kDraws, Layout kLayout>
__device__ __forceinline__ void noise_of(float z[4], const ReparameterizeParams& p,
                                         const Group<kLayout>& group, int64_t sample, int quad,
                                         const uint4& given, float4* exchange) {
    if (kDraws)
        Normals(p.key, sample).draw(z, group, quad, p.stream, exchange);
    else
        group.widen(z, given, p.given_noise, quad);
}

template <Layout kLayout, bool kDraws>
__global__ void __launch_bounds__(kLeafThreads<kLayout>)
    reparameterize_kernel(const __grid_constant__ ReparameterizeParams p,
                          const __grid_constant__ Walk walk) {
    constexpr bool kStrided = kLayout == Layout::kStrided;
    __shared__ float4 exchange[kDraws && kStrided ? kLeafThreads<kLayout> : 1];
    __shared__ float4 tile[kChunk / 4];
    float* divergence = reinterpret_cast<float*>(tile);
    const int first_unused = blockDim.x * Group<kLayout>::kElements;
    for (int64_t sample = blockIdx.y; sample < p.shape.batch; sample += gridDim.y) {
        const Group<kLayout> group(p.shape, walk, sample);
        uint4 raw_mean, raw_logvar, given;
        uint2 packed;
#pragma unroll 1
        for (int quad = 0; quad < Group<kLayout>::kQuads; ++quad) {
            const bool mine = kStrided || group.has();
            if (mine) {
                group.load(raw_mean, p.mean, quad);
                group.load(raw_logvar, p.logvar, quad);
                if (!kDraws && p.out.data) group.load(given, p.given_noise, quad);
                float mean[4], logvar[4];
                group.widen(mean, raw_mean, p.mean, quad);
                group.widen(logvar, raw_logvar, p.logvar, quad);
                const Deviation deviation = deviation_of(p, logvar);
                const float* s = deviation.value;
                if (p.kl)
                    for (int i = 0; i < 4; ++i)
                        divergence[group.place(quad, i)] =
                            !kStrided || group.has(i)
                                ? ((mean[i] * mean[i] + s[i] * s[i]) - 1.0f) - deviation.clamped[i]
                                : 0.0f;
                if (p.out.data) {
                    float z[4];
                    noise_of<kDraws>(z, p, group, sample, quad, given, exchange);
                    for (int i = 0; i < 4; ++i) z[i] = mean[i] + s[i] * z[i];
                    group.store(p.out, quad, z, packed);
                }
            } else if (p.kl) {
                for (int i = 0; i < 4; ++i) divergence[group.place(quad, i)] = 0.0f;
            }
        }
        if (!p.kl) continue;
        for (int i = first_unused + threadIdx.x; i < kChunk; i += blockDim.x) divergence[i] = 0.0f;
        __syncthreads();
        if (threadIdx.x < kWarp) {
            const float sum = sum_chunk(divergence);
            if (threadIdx.x == 0) {
                if (gridDim.x == 1)  // the tree above adds a zero
                    p.kl[sample] = 0.5f * (sum + 0.0f);
                else
                    p.partials[sample * gridDim.x + blockIdx.x] = sum;
            }
        }
        __syncthreads();  // before the next sample's divergences
    }
}

__global__ void __launch_bounds__(kTreeThreads)
    divergence_kernel(const __grid_constant__ ReparameterizeParams p, int64_t chunks) {
    __shared__ float4 tile[kChunk / 4];
    for (int64_t sample = blockIdx.x; sample < p.shape.batch; sample += gridDim.x) {
        float* partials = p.partials + sample * chunks;
        const auto read = [=](int64_t i) { return partials[i]; };
        float sum = 0.0f;
        if (chunks > 0) sum = sum_tree(chunks, read, partials, reinterpret_cast<float*>(tile));
        if (threadIdx.x == 0) p.kl[sample] = 0.5f * sum;
    }
}

template <Layout kLayout, bool kDraws>
__global__ void __launch_bounds__(kLeafThreads<kLayout>, 768 / kLeafThreads<kLayout>)
    backward_kernel(const __grid_constant__ ReparameterizeParams p,
                    const __grid_constant__ Walk walk) {
    constexpr bool kStrided = kLayout == Layout::kStrided;
    __shared__ float4 exchange[kDraws && kStrided ? kLeafThreads<kLayout> : 1];
    for (int64_t sample = blockIdx.y; sample < p.shape.batch; sample += gridDim.y) {
        const Group<kLayout> group(p.shape, walk, sample);
        if (!kStrided && !group.has()) continue;
        const bool has_grad = p.grad_out.data;
        const float grad_kl = p.grad_kl ? p.grad_kl[sample] : 0.0f;
        uint4 raw_mean, raw_logvar, raw_grad, given;
        uint2 packed_mean, packed_logvar, packed_noise;
#pragma unroll 1
        for (int quad = 0; quad < Group<kLayout>::kQuads; ++quad) {
            group.load(raw_mean, p.mean, quad);
            group.load(raw_logvar, p.logvar, quad);
            if (has_grad) group.load(raw_grad, p.grad_out, quad);
            if (!kDraws && p.given_noise.data) group.load(given, p.given_noise, quad);
            float mean[4], logvar[4], grad[4], y[4];
            group.widen(mean, raw_mean, p.mean, quad);
            group.widen(logvar, raw_logvar, p.logvar, quad);
            if (has_grad) group.widen(grad, raw_grad, p.grad_out, quad);
            const Deviation deviation = deviation_of(p, logvar);
            const float* s = deviation.value;
            if (p.grad_logvar.data) {
                for (int i = 0; i < 4; ++i) y[i] = 0.0f;
                if (has_grad) {
                    float z[4];
                    noise_of<kDraws>(z, p, group, sample, quad, given, exchange);
                    for (int i = 0; i < 4; ++i) y[i] = 0.5f * (grad[i] * (s[i] * z[i]));
                }
                if (p.grad_kl)
                    for (int i = 0; i < 4; ++i)
                        y[i] = y[i] + (0.5f * grad_kl) * (s[i] * s[i] - 1.0f);
                for (int i = 0; i < 4; ++i) {
                    const float bounded = deviation.clamped[i];
                    if (bounded < logvar[i] || bounded > logvar[i]) y[i] = 0.0f;
                }
                group.store(p.grad_logvar, quad, y, packed_logvar);
            }
            if (p.grad_noise.data) {
                for (int i = 0; i < 4; ++i) y[i] = grad[i] * s[i];
                group.store(p.grad_noise, quad, y, packed_noise);
            }
            if (p.grad_mean.data) {
                for (int i = 0; i < 4; ++i) {
                    y[i] = has_grad ? grad[i] : 0.0f;
                    if (p.grad_kl) y[i] = y[i] + grad_kl * mean[i];
                }
                group.store(p.grad_mean, quad, y, packed_mean);
            }
        }
    }
}

Layout layout_of(const ReparameterizeParams& p) {
    Operands operands;
    for (const Tensor* tensor : {&p.mean, &p.logvar, &p.given_noise, &p.out, &p.grad_out,
                                 &p.grad_mean, &p.grad_logvar, &p.grad_noise})
        operands.add(*tensor);
    return choose_layout(p.shape, operands);
}

}  // namespace

int reparameterize(const ReparameterizeParams& p, void* stream) {
    if (p.shape.batch <= 0) return cudaSuccess;
    const int64_t chunks = (p.shape.elements + kChunk - 1) / kChunk;
    if (chunks > 0) {
        const Layout layout = layout_of(p);
        const unsigned block =
            block_size(p.shape, layout, int(kChunk / elements_per_thread(layout)));
        const dim3 grid = grid_size(p.shape, layout, block);
        const bool draws = p.out.data && !p.given_noise.data;
        const int error = with_layout(layout, [&](auto layout_tag) {
            return with_bool(draws, [&](auto draws_tag) {
                return launch(
                    reparameterize_kernel<decltype(layout_tag)::value, decltype(draws_tag)::value>,
                    grid, dim3(block), stream, p, walk_of(p.shape));
            });
        });
        if (error) return error;
    }
    if (!p.kl || chunks == 1) return cudaSuccess;
    return launch(divergence_kernel, rows_of(p.shape), dim3(kTreeThreads), stream, p, chunks);
}

int reparameterize_backward(const ReparameterizeParams& p, void* stream) {
    if (p.shape.batch <= 0 || p.shape.elements <= 0) return cudaSuccess;
    const Layout layout = layout_of(p);
    const unsigned block = block_size(p.shape, layout, int(kChunk / elements_per_thread(layout)));
    const dim3 grid = grid_size(p.shape, layout, block);
    const bool draws = p.grad_out.data && p.grad_logvar.data && !p.given_noise.data;
    return with_layout(layout, [&](auto layout_tag) {
        return with_bool(draws, [&](auto draws_tag) {
            return launch(backward_kernel<decltype(layout_tag)::value, decltype(draws_tag)::value>,
                          grid, dim3(block), stream, p, walk_of(p.shape));
        });
    });
}

}  // namespace fastgen::cuda

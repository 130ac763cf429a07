// Per-sample factor of guidance rescale: the twin of csrc/cpu/guidance.cpp.
#include "launch.cuh"
#include "launch.h"
#include "reduce.cuh"

namespace fastgen::cuda {
namespace {

constexpr int kTreeThreads = 256;

// Sum and centred square sum of each tile; warp 0 adds up cond's, warp 1 guided's.
template <Layout kLayout>
__global__ void __launch_bounds__(kLeafThreads<kLayout>)
    moments_kernel(const __grid_constant__ RescaleParams p, const __grid_constant__ Walk walk) {
    __shared__ float4 tiles[2][kChunk / 4];
    __shared__ float mean[2];
    float* cond_tile = reinterpret_cast<float*>(tiles[0]);
    float* guided_tile = reinterpret_cast<float*>(tiles[1]);
    const int64_t left = p.shape.elements - blockIdx.x * kChunk;
    const int count = left < kChunk ? left : kChunk;
    const int warp = threadIdx.x / kWarp;
    const bool leads = threadIdx.x % kWarp == 0;
    for (int64_t sample = blockIdx.y; sample < p.shape.batch; sample += gridDim.y) {
        const Group<kLayout> group(p.shape, walk, sample);
        const float g = p.guidance ? p.guidance[sample * p.guidance_stride] : p.guidance_scale;
        uint4 raw_cond, raw_uncond;
#pragma unroll 1
        for (int quad = 0; quad < Group<kLayout>::kQuads; ++quad) {
            float c[4], u[4];
            for (int i = 0; i < 4; ++i) c[i] = u[i] = 0.0f;
            if (kLayout == Layout::kStrided || group.has()) {
                group.load(raw_cond, p.cond, quad);
                group.load(raw_uncond, p.uncond, quad);
                group.widen(c, raw_cond, p.cond, quad);
                group.widen(u, raw_uncond, p.uncond, quad);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int at = group.place(quad, i);
                cond_tile[at] = at < count ? c[i] : 0.0f;
                const float guided = g == 1.0f ? c[i] : u[i] + g * (c[i] - u[i]);
                guided_tile[at] = at < count ? guided : 0.0f;
            }
        }
        __syncthreads();
        float* partials = p.partials + sample * 5 * gridDim.x + blockIdx.x;
        if (warp < 2) {
            const float sum = sum_chunk(reinterpret_cast<const float*>(tiles[warp]));
            if (leads) {
                partials[2 * warp * gridDim.x] = sum;
                mean[warp] = sum / float(count);
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += blockDim.x) {
            const float of_cond = cond_tile[i] - mean[0], of_guided = guided_tile[i] - mean[1];
            cond_tile[i] = of_cond * of_cond;
            guided_tile[i] = of_guided * of_guided;
        }
        __syncthreads();
        if (warp < 2) {
            const float centred = sum_chunk(reinterpret_cast<const float*>(tiles[warp]));
            if (leads) partials[(2 * warp + 1) * gridDim.x] = centred;
        }
        __syncthreads();  // before the next sample's values
    }
}

// Chan et al. (1983), as in the CPU kernel; every thread has the result.
__device__ __forceinline__ float standard_deviation(const float* sums, const float* centred,
                                                    int64_t chunks, int64_t elements,
                                                    float* scratch, float* tile) {
    const float mean =
        sum_tree(chunks, [=](int64_t c) { return sums[c]; }, scratch, tile) / float(elements);
    const auto between = [=](int64_t c) {
        const int64_t left = elements - c * kChunk;
        const float count = float(left < kChunk ? left : kChunk);
        const float distance = sums[c] / count - mean;
        return count * (distance * distance);
    };
    const float within = sum_tree(chunks, [=](int64_t c) { return centred[c]; }, scratch, tile);
    const float total = within + sum_tree(chunks, between, scratch, tile);
    return sqrtf(total / float(elements - 1));
}

__global__ void __launch_bounds__(kTreeThreads)
    rescale_kernel(const __grid_constant__ RescaleParams p, int64_t chunks) {
    __shared__ float4 tile[kChunk / 4];
    float* values = reinterpret_cast<float*>(tile);
    const int64_t elements = p.shape.elements;
    for (int64_t sample = blockIdx.x; sample < p.shape.batch; sample += gridDim.x) {
        float* partials = p.partials + sample * 5 * chunks;
        float* scratch = partials + 4 * chunks;
        const float of_cond =
            standard_deviation(partials, partials + chunks, chunks, elements, scratch, values);
        const float of_guided = standard_deviation(partials + 2 * chunks, partials + 3 * chunks,
                                                   chunks, elements, scratch, values);
        if (threadIdx.x == 0)
            p.scale[sample] = p.rescale * (of_cond / of_guided) + (1.0f - p.rescale);
    }
}

}  // namespace

int rescale(const RescaleParams& p, void* stream) {
    if (p.shape.batch <= 0 || p.shape.elements <= 0) return cudaSuccess;
    Operands operands;
    operands.add(p.cond);
    operands.add(p.uncond);
    const Layout layout = choose_layout(p.shape, operands);
    const unsigned block = int(kChunk / elements_per_thread(layout));
    const int64_t chunks = (p.shape.elements + kChunk - 1) / kChunk;
    const int error = with_layout(layout, [&](auto layout_tag) {
        return launch(moments_kernel<decltype(layout_tag)::value>,
                      grid_size(p.shape, layout, block), dim3(block), stream, p, walk_of(p.shape));
    });
    if (error) return error;
    return launch(rescale_kernel, rows_of(p.shape), dim3(kTreeThreads), stream, p, chunks);
}

const char* error_string(int error) { return cudaGetErrorString(cudaError_t(error)); }

int current_device() {
    int device;
    if (cudaGetDevice(&device) == cudaSuccess) return device;
    cudaGetLastError();
    return -1;
}

int probe() {
    cudaFuncAttributes attributes;
    const cudaError_t error =
        cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(rescale_kernel));
    if (error != cudaSuccess) cudaGetLastError();
    return error;
}

}  // namespace fastgen::cuda

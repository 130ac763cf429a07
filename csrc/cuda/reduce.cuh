// The reduction tree of csrc/cpu/tile.h: leaves of kChunk values added by halves, and the same
// above them, padded with zeros.
#pragma once

#include "group.cuh"

namespace fastgen::cuda {

__device__ __forceinline__ float4 add(const float4& a, const float4& b) {
    return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// One whole warp; the sum is lane 0's. values: kChunk of them, in shared memory.
__device__ __forceinline__ float sum_chunk(const float* values) {
    constexpr int kRows = kChunk / (4 * kWarp);
    const int lane = threadIdx.x & (kWarp - 1);
    float4 v[kRows];
    for (int row = 0; row < kRows; ++row)
        v[row] = reinterpret_cast<const float4*>(values)[lane + kWarp * row];
#pragma unroll
    for (int half = kRows / 2; half >= 1; half /= 2)
        for (int row = 0; row < half; ++row) v[row] = add(v[row], v[row + half]);
    float4 sum = v[0];
#pragma unroll
    for (int half = kWarp / 2; half >= 1; half /= 2)
        sum = add(sum, {__shfl_down_sync(~0u, sum.x, half), __shfl_down_sync(~0u, sum.y, half),
                        __shfl_down_sync(~0u, sum.z, half), __shfl_down_sync(~0u, sum.w, half)});
    return (sum.x + sum.z) + (sum.y + sum.w);
}

// The whole thread block; every thread has the sum. read(i): value i of `count`, at least one.
// scratch: room for a value a leaf. values: kChunk floats of shared memory, aligned to 16 bytes.
template <typename Read>
__device__ __forceinline__ float sum_tree(int64_t count, const Read& read, float* scratch,
                                          float* values) {
    for (bool leaves = true;; leaves = false) {
        const int64_t chunks = (count + kChunk - 1) / kChunk;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            __syncthreads();  // the last chunk's values have been read
            for (int64_t i = threadIdx.x; i < kChunk; i += blockDim.x) {
                const int64_t at = chunk * kChunk + i;
                values[i] = at < count ? (leaves ? read(at) : scratch[at]) : 0.0f;
            }
            __syncthreads();
            if (threadIdx.x < kWarp) {
                const float sum = sum_chunk(values);
                if (threadIdx.x == 0) scratch[chunk] = sum;
            }
        }
        __syncthreads();
        if (chunks == 1) return scratch[0];
        count = chunks;
    }
}

}  // namespace fastgen::cuda

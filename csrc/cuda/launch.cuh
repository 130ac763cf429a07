// The host's side of a launch: which layout the tensors allow, the grid, the error.
#pragma once

#include <cuda_runtime.h>

#include "group.cuh"

namespace fastgen::cuda {

constexpr int64_t kMaxGridRows = 65535;

#if defined(__CUDACC__)
extern __shared__ float4 dynamic_shared[];  // as many bytes as the launch says
#endif

// The tensors of a call that are there.
struct Operands {
    const Tensor* tensors[24];
    int count = 0;

    void add(const Tensor& tensor) {
        if (tensor.data) tensors[count++] = &tensor;
    }
    template <int kCount>
    void add(const Tensor (&several)[kCount]) {
        for (const Tensor& tensor : several) add(tensor);
    }
};

// Every thread's elements start at a multiple of 16 bytes in every tensor, and none are missing.
inline Layout choose_layout(const Shape& shape, const Operands& operands) {
    bool float32 = true, dense = shape.ndim == 1;
    for (int t = 0; t < operands.count; ++t) float32 &= operands.tensors[t]->dtype == kFloat32;
    dense &= shape.elements % (float32 ? 4 : 8) == 0;
    for (int t = 0; t < operands.count; ++t) {
        const Tensor& tensor = *operands.tensors[t];
        const int64_t bytes = tensor.dtype == kFloat32 ? 4 : 2;
        dense &= tensor.stride[0] == 1 || shape.elements == 1;
        dense &= reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0;
        dense &= shape.batch == 1 || tensor.batch_stride * bytes % 16 == 0;
    }
    if (!dense) return Layout::kStrided;
    return float32 ? Layout::kFloat32 : Layout::kMixed;
}

inline Divider divider_of(uint64_t size) {
    Divider by{};
    while ((uint64_t{1} << by.shift) < size) ++by.shift;
    const unsigned __int128 excess = (uint64_t{1} << by.shift) - size;
    by.multiplier = uint64_t((excess << 64) / size + 1);
    return by;
}

inline Walk walk_of(const Shape& shape) {
    Walk walk{};
    for (int dim = 0; dim < shape.ndim; ++dim)
        walk.divider[dim] = divider_of(uint64_t(shape.size[dim]));
    return walk;
}

inline int64_t elements_per_thread(Layout layout) { return layout == Layout::kMixed ? 8 : 4; }

// Threads that cover one leaf of the reduction tree.
template <Layout kLayout>
constexpr int kLeafThreads = int(kChunk) / Group<kLayout>::kElements;

// Whole warps, no more than `most` threads and no more than a sample needs.
inline unsigned block_size(const Shape& shape, Layout layout, int most) {
    const int64_t width = elements_per_thread(layout);
    const int64_t threads = (shape.elements + width - 1) / width;
    return unsigned(threads >= most ? most : (threads + kWarp - 1) / kWarp * kWarp);
}

// Columns cover a sample's elements; rows walk over the samples.
inline dim3 grid_size(const Shape& shape, Layout layout, unsigned block) {
    const int64_t tile = int64_t{block} * elements_per_thread(layout);
    return dim3(unsigned((shape.elements + tile - 1) / tile),
                unsigned(shape.batch < kMaxGridRows ? shape.batch : kMaxGridRows));
}

// A thread block a sample, as far as the grid goes.
inline dim3 rows_of(const Shape& shape) {
    return dim3(unsigned(shape.batch < INT32_MAX ? shape.batch : INT32_MAX));
}

// The launch's own error, and nothing left behind for whoever asks the runtime next.
template <typename... Parameters>
int launch_sharing(size_t bytes, void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream,
                   const Parameters&... parameters) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, parameters...);
    if (error != cudaSuccess) cudaGetLastError();
    return error;
}

template <typename... Parameters>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream,
           const Parameters&... parameters) {
    return launch_sharing(0, kernel, grid, block, stream, parameters...);
}

template <Layout kLayout>
struct LayoutTag {
    static constexpr Layout value = kLayout;
};

template <bool kValue>
struct BoolTag {
    static constexpr bool value = kValue;
};

// Calls body with the run-time choices as types.
template <typename Body>
int with_layout(Layout layout, const Body& body) {
    switch (layout) {
        case Layout::kFloat32:
            return body(LayoutTag<Layout::kFloat32>{});
        case Layout::kMixed:
            return body(LayoutTag<Layout::kMixed>{});
        default:
            return body(LayoutTag<Layout::kStrided>{});
    }
}

template <typename Body>
int with_bool(bool value, const Body& body) {
    return value ? body(BoolTag<true>{}) : body(BoolTag<false>{});
}

}  // namespace fastgen::cuda

// What every pointwise CPU kernel is made of: tiles of logically consecutive elements (at most
// kChunk, where they pass through buffers) of one sample, read from any strides into float32, and
// written back rounded once.
#pragma once

#include "../math/convert.h"
#include "../params.h"
#include "parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastgen::FASTGEN_ISA {

// Round to nearest, denormals kept, whatever the caller set (torch.set_flush_denormal, say).
class IeeeMode {
   public:
#if defined(__x86_64__)
    IeeeMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80u); }
    ~IeeeMode() { _mm_setcsr(saved_); }

   private:
    unsigned saved_;
#elif defined(__aarch64__)
    IeeeMode() {
        asm volatile("mrs %0, fpcr" : "=r"(saved_));
        asm volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
    }
    ~IeeeMode() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

   private:
    uint64_t saved_;
#endif
};

// One tile: `count` elements of sample `sample` from its element `start` on.
struct Tile {
    int64_t sample;
    int64_t start;
    int64_t count;
};

// The tiles of a shape, in an order that keeps the cache lines of channels-last tensors warm: where
// a row of the last dim is whole tiles, the rows of one tile column follow each other.
class Tiling {
   public:
    explicit Tiling(const Shape& shape, int64_t most = kChunk)
        : elements_(shape.elements), most_(most), per_sample_((shape.elements + most - 1) / most) {
        const int64_t row = shape.ndim > 0 ? shape.size[shape.ndim - 1] : 1;
        columns_ = shape.ndim > 1 && row % most == 0 ? row / most : 1;
        rows_ = per_sample_ / columns_;
        total_ = shape.batch * per_sample_;
    }
    int64_t total() const { return total_; }
    int64_t per_sample() const { return per_sample_; }
    Tile operator[](int64_t index) const {
        const int64_t sample = index / per_sample_;
        int64_t chunk = index % per_sample_;
        if (columns_ > 1) chunk = chunk % rows_ * columns_ + chunk / rows_;
        const int64_t start = chunk * most_;
        const int64_t left = elements_ - start;
        return {sample, start, left < most_ ? left : most_};
    }

   private:
    int64_t elements_, most_, per_sample_, columns_, rows_, total_;
};

// Calls visit(offset in elements, done so far, run length, stride) for each run of a tile.
template <typename Visit>
FASTGEN_INLINE void for_each_run(const Shape& shape, const Tensor& tensor, const Tile& tile,
                                 const Visit& visit) {
    const int last = shape.ndim - 1;
    int64_t index[kMaxDims];
    int64_t rest = tile.start;
    int64_t offset = tile.sample * tensor.batch_stride;
    for (int dim = last; dim >= 0; --dim) {
        index[dim] = rest % shape.size[dim];
        rest /= shape.size[dim];
        offset += index[dim] * tensor.stride[dim];
    }
    for (int64_t done = 0; done < tile.count;) {
        const int64_t room = shape.size[last] - index[last];
        const int64_t left = tile.count - done;
        const int64_t run = room < left ? room : left;
        visit(offset, done, run, tensor.stride[last]);
        done += run;
        if (done == tile.count) break;
        index[last] += run;
        offset += run * tensor.stride[last];
        for (int dim = last; dim > 0 && index[dim] == shape.size[dim]; --dim) {
            offset += tensor.stride[dim - 1] - shape.size[dim] * tensor.stride[dim];
            index[dim] = 0;
            ++index[dim - 1];
        }
    }
}

template <typename Element>
static void load_as(const Shape& shape, const Tensor& tensor, const Tile& tile, float* out) {
    const Element* data = static_cast<const Element*>(tensor.data);
    for_each_run(shape, tensor, tile,
                 [=](int64_t offset, int64_t done, int64_t run, int64_t stride) {
                     const Element* from = data + offset;
                     float* to = out + done;
                     if (stride == 1)
                         for (int64_t i = 0; i < run; ++i) to[i] = to_float(from[i]);
                     else
                         for (int64_t i = 0; i < run; ++i) to[i] = to_float(from[i * stride]);
                 });
}

FASTGEN_INLINE bool is_dense(const Shape& shape, const Tensor& tensor) {
    return shape.ndim == 1 && tensor.stride[0] == 1;
}

// Fetches a tile into the first cache, while something else is computed: between tiles of long
// computation the processor has forgotten which addresses come next.
static inline void prefetch(const Shape& shape, const Tensor& tensor, const Tile& tile) {
    if (!tensor.data || !is_dense(shape, tensor)) return;
    const int64_t width = tensor.dtype == kFloat32 ? 4 : 2;
    const char* from = static_cast<const char*>(tensor.data) +
                       (tile.sample * tensor.batch_stride + tile.start) * width;
    for (int64_t byte = 0; byte < tile.count * width; byte += 64) __builtin_prefetch(from + byte);
}

// The tile as float32: in place where it lies so in memory, else through `buffer`.
static inline const float* load(const Shape& shape, const Tensor& tensor, const Tile& tile,
                                float* buffer) {
    if (tensor.dtype == kFloat32) {
        if (is_dense(shape, tensor))
            return static_cast<const float*>(tensor.data) + tile.sample * tensor.batch_stride +
                   tile.start;
        load_as<float>(shape, tensor, tile, buffer);
    } else if (tensor.dtype == kBFloat16) {
        load_as<bfloat16>(shape, tensor, tile, buffer);
    } else {
        load_as<float16>(shape, tensor, tile, buffer);
    }
    return buffer;
}

template <typename Element>
static void store_as(const Shape& shape, const Tensor& tensor, const Tile& tile,
                     const float* values) {
    Element* data = static_cast<Element*>(tensor.data);
    for_each_run(shape, tensor, tile,
                 [=](int64_t offset, int64_t done, int64_t run, int64_t stride) {
                     Element* to = data + offset;
                     const float* from = values + done;
                     if (stride == 1)
                         for (int64_t i = 0; i < run; ++i) from_float(from[i], to[i]);
                     else
                         for (int64_t i = 0; i < run; ++i) from_float(from[i], to[i * stride]);
                 });
}

// Where a kernel may write a tile's float32 values: the tensor itself, or `buffer` to be stored.
static inline float* destination(const Shape& shape, const Tensor& tensor, const Tile& tile,
                                 float* buffer) {
    if (tensor.dtype == kFloat32 && is_dense(shape, tensor))
        return static_cast<float*>(tensor.data) + tile.sample * tensor.batch_stride + tile.start;
    return buffer;
}

static inline void store(const Shape& shape, const Tensor& tensor, const Tile& tile,
                         const float* values) {
    if (tensor.dtype == kFloat32)
        store_as<float>(shape, tensor, tile, values);
    else if (tensor.dtype == kBFloat16)
        store_as<bfloat16>(shape, tensor, tile, values);
    else
        store_as<float16>(shape, tensor, tile, values);
}

// Writes past the caches, for outputs that would not stay in them anyway.
static inline void stream_copy(float* to, const float* from, int64_t count) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i < count && (reinterpret_cast<uintptr_t>(to + i) & 63); ++i) to[i] = from[i];
    for (; i + 16 <= count; i += 16) _mm512_stream_ps(to + i, _mm512_loadu_ps(from + i));
#elif defined(__AVX2__)
    for (; i < count && (reinterpret_cast<uintptr_t>(to + i) & 31); ++i) to[i] = from[i];
    for (; i + 8 <= count; i += 8) _mm256_stream_ps(to + i, _mm256_loadu_ps(from + i));
#elif defined(__x86_64__)
    for (; i < count && (reinterpret_cast<uintptr_t>(to + i) & 15); ++i) to[i] = from[i];
    for (; i + 4 <= count; i += 4) _mm_stream_ps(to + i, _mm_loadu_ps(from + i));
#endif
    for (; i < count; ++i) to[i] = from[i];
}

static inline void stream_fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// Runs body(tile) for every tile, in the arithmetic mode that the bits are promised for.
template <typename Body>
static void for_each_tile(const Shape& shape, int threads, const Body& body,
                          int64_t most = kChunk) {
    if (shape.batch <= 0 || shape.elements <= 0) return;
    const Tiling tiling(shape, most);
    parallel_for(tiling.total(), threads, [&](int64_t begin, int64_t end) {
        IeeeMode ieee;
        for (int64_t index = begin; index < end; ++index) body(tiling[index]);
    });
}

// Three levels of the tree at once: from 8 Eighth values to Eighth.
template <int64_t Eighth>
static inline void halve_thrice(float* v) {
    for (int64_t i = 0; i < Eighth; ++i) {
        const float a = v[i] + v[i + 4 * Eighth], b = v[i + 2 * Eighth] + v[i + 6 * Eighth];
        const float c = v[i + Eighth] + v[i + 5 * Eighth],
                    d = v[i + 3 * Eighth] + v[i + 7 * Eighth];
        v[i] = (a + b) + (c + d);
    }
}

// The sum of kChunk values by halves: the leaf of the reduction tree. `values` is overwritten.
static inline float sum_chunk(float* values) {
    halve_thrice<kChunk / 8>(values);
    halve_thrice<kChunk / 64>(values);
    for (int64_t half = kChunk / 128; half >= 1; half /= 2)
        for (int64_t i = 0; i < half; ++i) values[i] = values[i] + values[i + half];
    return values[0];
}

// The tree above the leaves: chunks of kChunk, padded with zeros, until one value is left.
static inline float sum_tree(float* values, int64_t count) {
    float chunk[kChunk];
    do {
        const int64_t chunks = (count + kChunk - 1) / kChunk;
        for (int64_t c = 0; c < chunks; ++c) {
            const int64_t left = count - c * kChunk;
            for (int64_t i = 0; i < kChunk; ++i)
                chunk[i] = i < left ? values[c * kChunk + i] : 0.0f;
            values[c] = sum_chunk(chunk);
        }
        count = chunks;
    } while (count > 1);
    return values[0];
}

}  // namespace fastgen::FASTGEN_ISA

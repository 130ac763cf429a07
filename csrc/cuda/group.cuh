// What every CUDA kernel is made of: a thread's four or eight elements of one sample, loaded as raw
// bits (all operands first, so that their latencies overlap), computed in quads of float32, and
// stored rounded once.
#pragma once

#define FASTGEN_ISA cuda
#include "../math/convert.h"
#include "../params.h"

namespace fastgen::cuda {

constexpr int kWarp = 32;

// kFloat32: dense float32, four neighbours a thread. kMixed: dense, any dtypes, eight neighbours.
// kStrided: any strides; four elements 32 apart, so that a warp's lanes are neighbours.
enum class Layout { kFloat32, kMixed, kStrided };

// n / size for 0 <= n < 2^63 is (high(n multiplier) + n) >> shift: Granlund & Montgomery, "Division
// by invariant integers using multiplication" (1994).
struct Divider {
    uint64_t multiplier;
    uint32_t shift;
};

// How an element's logical index becomes an offset; read by kStrided alone.
struct Walk {
    Divider divider[kMaxDims];
};

template <Layout kLayout>
class Group {
   public:
    static constexpr bool kStrided = kLayout == Layout::kStrided;
    static constexpr int kQuads = kLayout == Layout::kMixed ? 2 : 1;
    static constexpr int kElements = 4 * kQuads;

    __device__ __forceinline__ Group(const Shape& shape, const Walk& walk, int64_t sample)
        : shape_(shape), walk_(walk), sample_(sample) {
        const int64_t tile = int64_t(blockIdx.x) * blockDim.x;
        const uint32_t thread = threadIdx.x;
        first_ = kStrided ? (tile + (thread & ~(kWarp - 1u))) * 4 + (thread & (kWarp - 1u))
                          : (tile + thread) * kElements;
    }

    // The host gives dense layouts only where every thread has all of its elements or none.
    __device__ __forceinline__ bool has(int i = 0) const {
        return first_ + (kStrided ? kWarp * i : 0) < shape_.elements;
    }

    // The Philox block of this thread's quad; kStrided: of the lane's share of the warp's elements.
    __device__ __forceinline__ uint32_t block(int quad) const {
        if (kStrided) {
            const uint32_t lane = threadIdx.x & (kWarp - 1u);
            return uint32_t((first_ - lane) / 4) + lane;
        }
        return uint32_t(first_ / 4) + quad;
    }

    // Position of element i of a quad among those of the thread block.
    __device__ __forceinline__ int place(int quad, int i) const {
        const int thread = threadIdx.x;
        return kStrided ? (thread & ~(kWarp - 1)) * 4 + (thread & (kWarp - 1)) + kWarp * i
                        : thread * kElements + 4 * quad + i;
    }

    // Fills `raw` with what quad `quad` needs: 16-bit dense tensors are read once for both quads.
    __device__ __forceinline__ void load(uint4& raw, const Tensor& tensor, int quad) const {
        if constexpr (kStrided) {
            int64_t at[4];
            offsets(at, tensor);
            raw = {fetch(tensor, at, 0), fetch(tensor, at, 1), fetch(tensor, at, 2),
                   fetch(tensor, at, 3)};
        } else if (is_float32(tensor)) {
            raw = *reinterpret_cast<const uint4*>(static_cast<const float*>(tensor.data) +
                                                  offset(tensor) + 4 * quad);
        } else if (quad == 0) {
            raw = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(tensor.data) +
                                                  offset(tensor));
        }
    }

    __device__ __forceinline__ void widen(float v[4], const uint4& raw, const Tensor& tensor,
                                          int quad) const {
        if (is_float32(tensor)) {
            v[0] = bits_float(raw.x);
            v[1] = bits_float(raw.y);
            v[2] = bits_float(raw.z);
            v[3] = bits_float(raw.w);
            return;
        }
        uint32_t low = raw.x, high = raw.y;
        if constexpr (kStrided) {
            low |= raw.y << 16;
            high = raw.z | raw.w << 16;
        } else if (quad == 1) {
            low = raw.z;
            high = raw.w;
        }
        if (tensor.dtype == kBFloat16) {
            widen_pair<bfloat16>(v, low);
            widen_pair<bfloat16>(v + 2, high);
        } else {
            widen_pair<float16>(v, low);
            widen_pair<float16>(v + 2, high);
        }
    }

    // `packed` keeps the first quad of a 16-bit dense tensor until the second completes 16 bytes.
    __device__ __forceinline__ void store(const Tensor& tensor, int quad, const float v[4],
                                          uint2& packed) const {
        if constexpr (kStrided) {
            int64_t at[4];
            offsets(at, tensor);
            if (tensor.dtype == kFloat32)
                scatter<float>(tensor, at, v);
            else if (tensor.dtype == kBFloat16)
                scatter<bfloat16>(tensor, at, v);
            else
                scatter<float16>(tensor, at, v);
        } else if (is_float32(tensor)) {
            float* to = static_cast<float*>(tensor.data) + offset(tensor) + 4 * quad;
            *reinterpret_cast<float4*>(to) = {v[0], v[1], v[2], v[3]};
        } else {
            const uint2 words = tensor.dtype == kBFloat16
                                    ? uint2{pack_bfloat16(v), pack_bfloat16(v + 2)}
                                    : uint2{pack_float16(v), pack_float16(v + 2)};
            uint16_t* to = static_cast<uint16_t*>(tensor.data) + offset(tensor);
            if (quad == 0)
                packed = words;
            else
                *reinterpret_cast<uint4*>(to) = {packed.x, packed.y, words.x, words.y};
        }
    }

   private:
    static __device__ __forceinline__ bool is_float32(const Tensor& tensor) {
        return kLayout == Layout::kFloat32 || tensor.dtype == kFloat32;
    }

    __device__ __forceinline__ int64_t offset(const Tensor& tensor) const {  // dense
        return sample_ * tensor.batch_stride + first_;
    }

    __device__ __forceinline__ void offsets(int64_t at[4], const Tensor& tensor) const {
        uint64_t rest[4];
        for (int i = 0; i < 4; ++i) {
            rest[i] = first_ + kWarp * i;
            at[i] = sample_ * tensor.batch_stride;
        }
#pragma unroll 1
        for (int dim = shape_.ndim - 1; dim > 0; --dim) {
            const Divider by = walk_.divider[dim];
            const int64_t size = shape_.size[dim], stride = tensor.stride[dim];
            for (int i = 0; i < 4; ++i) {
                const uint64_t quotient =
                    (__umul64hi(rest[i], by.multiplier) + rest[i]) >> by.shift;
                at[i] += int64_t(rest[i] - quotient * size) * stride;
                rest[i] = quotient;
            }
        }
        for (int i = 0; i < 4; ++i) at[i] += int64_t(rest[i]) * tensor.stride[0];
    }

    __device__ __forceinline__ uint32_t fetch(const Tensor& tensor, const int64_t at[4],
                                              int i) const {
        if (!has(i)) return 0;
        if (tensor.dtype == kFloat32) return static_cast<const uint32_t*>(tensor.data)[at[i]];
        return static_cast<const uint16_t*>(tensor.data)[at[i]];
    }

    template <typename Element>
    __device__ __forceinline__ void scatter(const Tensor& tensor, const int64_t at[4],
                                            const float v[4]) const {
        for (int i = 0; i < 4; ++i)
            if (has(i)) from_float(v[i], static_cast<Element*>(tensor.data)[at[i]]);
    }

    template <typename Half>
    static __device__ __forceinline__ void widen_pair(float v[2], uint32_t word) {
        v[0] = to_float(Half{uint16_t(word)});
        v[1] = to_float(Half{uint16_t(word >> 16)});
    }

    // As from_float, but two at once: one instruction.
    static __device__ __forceinline__ uint32_t pack_bfloat16(const float v[2]) {
#if defined(__CUDA_ARCH__)
        const __nv_bfloat162 pair = __floats2bfloat162_rn(v[0], v[1]);
        return __bfloat16_as_ushort(pair.x) | uint32_t(__bfloat16_as_ushort(pair.y)) << 16;
#else
        return pack<bfloat16>(v);
#endif
    }

    static __device__ __forceinline__ uint32_t pack_float16(const float v[2]) {
#if defined(__CUDA_ARCH__)
        const __half2 pair = __floats2half2_rn(v[0], v[1]);
        return __half_as_ushort(pair.x) | uint32_t(__half_as_ushort(pair.y)) << 16;
#else
        return pack<float16>(v);
#endif
    }

    template <typename Half>
    static __device__ __forceinline__ uint32_t pack(const float v[2]) {
        Half low, high;
        from_float(v[0], low);
        from_float(v[1], high);
        return low.bits | uint32_t(high.bits) << 16;
    }

    const Shape& shape_;
    const Walk& walk_;
    int64_t sample_, first_;
};

}  // namespace fastgen::cuda

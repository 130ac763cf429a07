// Transposed convolution by plain sums, for layers that would leave a matrix product's tiles empty:
// few channels a group, or few output channels. Of each dim an output reads every step-th tap of
// the kernel, at inputs that lie evenly apart, and nothing else. No bits are promised across
// backends, so products are fused with their sums.
#pragma once

#include <type_traits>

#include "launch.cuh"
// behind FASTGEN_ISA
#include "../cpu/epilogue.h"

namespace fastgen::cuda {

constexpr int kThreads = 256;
constexpr int kPartial = 128;  // products of a partial sum, whose error grows with them

__device__ __forceinline__ uint64_t quotient(uint64_t n, const Divider& by) {
    return (__umul64hi(n, by.multiplier) + n) >> by.shift;
}

// As Divider, for 0 <= n < 2^31.
struct Quotient {
    uint32_t size, multiplier, shift;

    __device__ __forceinline__ uint32_t of(uint32_t n) const {
        return (__umulhi(n, multiplier) + n) >> shift;
    }
};

// One dim: output o and tap k meet at input i = (o + padding - k dilation) / stride. With g the
// common divisor of stride and dilation, k goes on by stride / g while i goes back by dilation / g.
struct Axis {
    int32_t in, kernel, padding, dilation;
    uint32_t inverse;  // of dilation / g modulo stride / g
    Quotient stride, common, step, back;
    Divider step_of_products;                     // k inverse has 60 bits
    int64_t in_step, weight_stride, weight_step;  // elements from one tap, or one of the kernel, on
};

// How a call is cut. A column is a tile of output channels of one group; an item is a position of
// kSamples samples. Of a block's threads 2^lane_bits neighbours go along columns, the others along
// items; a slab is the columns whose weights are staged together.
struct Cut {
    Axis axis[3];
    Divider positions, height, width;  // of the output
    int64_t out_positions, out_height, out_width, items;
    Quotient tiles, taps, kernel_height, kernel_width;  // tiles of a group
    Quotient chunk;                                     // input channels staged together
    int32_t all_columns, columns, slabs;                // columns of one slab
    int32_t line;                                       // staged floats of a tap and column
    int32_t lane_bits, in_channels, out_channels;
};

// Of one output in one dim.
struct Taps {
    int32_t first, input, count;  // negative: none
};

__device__ __forceinline__ Taps taps_of(const Axis& axis, uint32_t output) {
    const uint32_t place = output + axis.padding, whole = axis.stride.of(place);
    const uint32_t residue = place - whole * axis.stride.size, reduced = axis.common.of(residue);
    uint32_t k = reduced;  // the first tap of this residue
    if (axis.inverse != 1) {
        const uint64_t multiple = uint64_t{k} * axis.inverse;
        k = uint32_t(multiple) -
            uint32_t(quotient(multiple, axis.step_of_products)) * axis.step.size;
    }
    if (reduced * axis.common.size != residue || int32_t(k) >= axis.kernel) return {0, 0, 0};
    const int32_t input = int32_t(whole - axis.stride.of(k * axis.dilation - residue));
    const int32_t back = axis.back.size;
    const int32_t in_kernel = axis.step.of(axis.kernel - 1 - k) + 1;
    const int32_t in_input = input < 0 ? 0 : axis.back.of(input) + 1;
    const int32_t skipped = input < axis.in ? 0 : axis.back.of(input - axis.in + back);
    const int32_t end = in_kernel < in_input ? in_kernel : in_input;
    return {int32_t(k + skipped * axis.step.size), input - skipped * back, end - skipped};
}

struct Item {
    int64_t sample;           // the first
    int64_t in, weight, out;  // offsets, of the first taps
    int32_t count[3];         // of taps
};

__device__ __forceinline__ Item item_of(const DirectConvTransposeParams& p, const Cut& cut,
                                        uint64_t index, int samples) {
    const uint64_t images = quotient(index, cut.positions);
    const uint64_t position = index - images * cut.out_positions;
    const uint64_t line = quotient(position, cut.width), depth = quotient(line, cut.height);
    const uint32_t output[3] = {uint32_t(depth), uint32_t(line - depth * cut.out_height),
                                uint32_t(position - line * cut.out_width)};
    Item item{int64_t(images) * samples, 0, 0, 0, {}};
#pragma unroll
    for (int dim = 0; dim < 3; ++dim) {
        const Taps taps = taps_of(cut.axis[dim], output[dim]);
        item.count[dim] = taps.count > 0 ? taps.count : 0;
        item.in += taps.input * p.in.stride[1 + dim];
        item.weight += taps.first * cut.axis[dim].weight_stride;
        item.out += output[dim] * p.out.stride[1 + dim];
    }
    return item;
}

FASTGEN_INLINE constexpr int padded(int channels) { return channels == 3 ? 4 : channels; }

// Puts a slab's weights, of the input channels from first_in on, as (tap, column, input channel,
// output channel) and zero where a tile is wider than its group: in the order they are read.
// Threads run along taps, as the weights of PyTorch's layers lie.
template <typename Element, int kChannels>
__device__ __forceinline__ void stage(const DirectConvTransposeParams& p, const Cut& cut,
                                      int first_column, int first_in) {
    constexpr int kPadded = padded(kChannels);
    float* staged = reinterpret_cast<float*>(dynamic_shared);
    const int count = cut.taps.size * kPadded * cut.chunk.size * cut.columns;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const int rest = cut.taps.of(i), tap = i - rest * cut.taps.size, c = rest % kPadded;
        const int slot = cut.chunk.of(rest / kPadded);
        const int in = rest / kPadded - slot * cut.chunk.size;
        const int column = first_column + slot, group = cut.tiles.of(column);
        const int channel = (column - group * cut.tiles.size) * kChannels + c;
        float value = 0.0f;
        if (c < kChannels && column < cut.all_columns && channel < cut.out_channels &&
            first_in + in < cut.in_channels) {
            const int line = cut.kernel_width.of(tap), depth = cut.kernel_height.of(line);
            const int64_t at[5] = {int64_t{group} * cut.in_channels + first_in + in, channel, depth,
                                   line - depth * int(cut.kernel_height.size),
                                   tap - line * int(cut.kernel_width.size)};
            int64_t offset = 0;
            for (int dim = 0; dim < 5; ++dim) offset += at[dim] * p.weight.stride[dim];
            value = to_float(static_cast<const Element*>(p.weight.data)[offset]);
        }
        staged[(tap * cut.columns + slot) * cut.line + in * kPadded + c] = value;
    }
}

template <typename Value, int kCount>
struct alignas(sizeof(Value) * kCount) Pack {  // moved by one instruction
    Value v[kCount];
};

// A weight read serves kSamples products, an input kChannels. kVector: inputs come by 16 bytes of
// neighbouring channels. Without kStaged, weights are read from where they are.
template <typename Element, int kChannels, int kSamples, bool kVector, bool kStaged>
struct Sums {
    static constexpr int kPadded = padded(kChannels);
    static constexpr int kWidth = kVector ? 16 / sizeof(Element) : 1;
    static constexpr int kUnit = kVector ? 4 : kPadded;  // weights of one load
    static constexpr int kOutputs = kSamples * kChannels;
    using Weight = std::conditional_t<kStaged, float, Element>;
    using Offset = std::conditional_t<kStaged, int, int64_t>;

    const Element* x[kSamples];
    const Weight* weights;
    int64_t in_stride, weight_stride;  // of kWidth input channels
    float v[kOutputs];

    // Of all taps, in `channels` input channels.
    __device__ __forceinline__ void add(const Cut& cut, const Item& item, Offset weight,
                                        int channels) {
        int64_t in = item.in;
#pragma unroll 1
        for (int d = 0; d < item.count[0]; ++d) {
#pragma unroll 1
            for (int h = 0; h < item.count[1]; ++h) {
                const auto go_on = [&] {
                    in -= cut.axis[2].in_step;
                    weight += Offset(cut.axis[2].weight_step);
                };
                if (kVector || channels > 1) {
#pragma unroll 1
                    for (int w = 0; w < item.count[2]; ++w, go_on()) add_tap(in, weight, channels);
                } else {
#pragma unroll 2
                    for (int w = 0; w < item.count[2]; ++w, go_on()) multiply(v, in, weight);
                }
                // Back to the row's first tap: three pairs of offsets would not fit the registers.
                in += item.count[2] * cut.axis[2].in_step - cut.axis[1].in_step;
                weight += Offset(cut.axis[1].weight_step) -
                          item.count[2] * Offset(cut.axis[2].weight_step);
            }
            in += item.count[1] * cut.axis[1].in_step - cut.axis[0].in_step;
            weight +=
                Offset(cut.axis[0].weight_step) - item.count[1] * Offset(cut.axis[1].weight_step);
        }
    }

   private:
    __device__ __forceinline__ void add_tap(int64_t in, Offset weight, int channels) {
        while (channels > 0) {
            float partial[kOutputs] = {};
#pragma unroll(kVector ? 1 : 4)
            for (int left = channels < kPartial ? channels : kPartial; left > 0; left -= kWidth) {
                multiply(partial, in, weight);
                in += in_stride;
                weight += Offset(weight_stride);
            }
            channels -= kPartial;
#pragma unroll
            for (int n = 0; n < kOutputs; ++n) v[n] += partial[n];
        }
    }

    __device__ __forceinline__ void multiply(float (&sums)[kOutputs], int64_t in,
                                             Offset weight) const {
        float a[kSamples][kWidth];
#pragma unroll
        for (int s = 0; s < kSamples; ++s) load(a[s], x[s] + in);
#pragma unroll
        for (int n = 0; n < kWidth * kPadded; n += kUnit) {
            const auto b = *reinterpret_cast<const Pack<Weight, kUnit>*>(weights + weight + n);
#pragma unroll
            for (int i = 0; i < kUnit * kSamples; ++i) {
                const int s = i / kUnit, at = n + i % kUnit, c = at % kPadded;
                float& sum = sums[s * kChannels + (c < kChannels ? c : 0)];
                if (c < kChannels) sum = fmaf(a[s][at / kPadded], to_float(b.v[i % kUnit]), sum);
            }
        }
    }

    static __device__ __forceinline__ void load(float (&a)[kWidth], const Element* from) {
        using Word = std::conditional_t<sizeof(Element) == 4, float, uint32_t>;
        if constexpr (kVector) {
            const auto raw = *reinterpret_cast<const Pack<Word, 4>*>(from);
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                if constexpr (sizeof(Element) == 4)
                    a[i] = raw.v[i];
                else
                    a[i] = to_float(Element{uint16_t(raw.v[i / 2] >> (16 * (i % 2)))});
            }
        } else {
            a[0] = to_float(*from);
        }
    }
};

// One output at a time: the activation's code is there once.
template <typename Element, int kChannels, int kOutputs>
__device__ __forceinline__ void store(float (&v)[kOutputs], const DirectConvTransposeParams& p,
                                      const Item& item, int first_channel, int channels) {
#pragma unroll 1
    for (int n = 0; n < kOutputs; ++n) {
        const int c = n % kChannels, channel = first_channel + c;
        const int64_t sample = item.sample + n / kChannels;
        const float sum = v[0];
#pragma unroll
        for (int i = 1; i < kOutputs; ++i) v[i - 1] = v[i];
        if (c >= channels || sample >= p.batch) continue;
        const Epilogue& e = p.epilogue;
        const float bias = e.bias ? e.bias[channel] : -0.0f;
        const float scale = e.scale ? e.scale[channel] : 1.0f;
        const float shift = e.shift ? e.shift[channel] : -0.0f;
        Element* to = static_cast<Element*>(p.out.data) + sample * p.out.batch_stride +
                      channel * p.out.stride[0] + item.out;
        with_activation(
            e, [=](const auto& act) { from_float(act(scale * (sum + bias) + shift), *to); });
    }
}

template <typename Element, int kChannels, int kSamples, bool kVector, bool kStaged>
__global__ void __launch_bounds__(kThreads, kVector ? 2 : 3)
    conv_transpose_kernel(const __grid_constant__ DirectConvTransposeParams p,
                          const __grid_constant__ Cut cut) {
    const int lane = threadIdx.x & ((1 << cut.lane_bits) - 1), row = threadIdx.x >> cut.lane_bits;
    const int rows = blockDim.x >> cut.lane_bits, chunk = cut.chunk.size;
    const bool restages = kStaged && chunk < cut.in_channels;
    for (int slab = blockIdx.y; slab < cut.slabs; slab += gridDim.y) {
        const int first_column = slab * cut.columns;
        if (kStaged && !restages) {
            __syncthreads();  // the last slab's are still being read
            stage<Element, kChannels>(p, cut, first_column, 0);
            __syncthreads();
        }
        // Threads without an item or a column do the last one again: all meet at the barriers.
        for (int64_t first = int64_t{blockIdx.x} * rows; first < cut.items;
             first += int64_t{gridDim.x} * rows) {
            const bool has_item = first + row < cut.items;
            const Item item = item_of(p, cut, has_item ? first + row : cut.items - 1, kSamples);
            for (int slot = lane; slot < cut.columns; slot += 1 << cut.lane_bits) {
                const bool has_column = first_column + slot < cut.all_columns;
                const int column = has_column ? first_column + slot : cut.all_columns - 1;
                const int group = cut.tiles.of(column);
                const int channel = (column - group * cut.tiles.size) * kChannels;  // of the group
                const int64_t first_in = int64_t{group} * cut.in_channels;
                Sums<Element, kChannels, kSamples, kVector, kStaged> sums{};
                sums.in_stride = kVector ? sums.kWidth : p.in.stride[0];
#pragma unroll
                for (int s = 0; s < kSamples; ++s) {
                    const int64_t sample =
                        item.sample + s < p.batch ? item.sample + s : p.batch - 1;
                    sums.x[s] = static_cast<const Element*>(p.in.data) +
                                sample * p.in.batch_stride + first_in * p.in.stride[0];
                }
                int64_t weight = item.weight;
                if constexpr (kStaged) {
                    sums.weights = reinterpret_cast<const float*>(dynamic_shared);
                    sums.weight_stride = sums.kWidth * sums.kPadded;
                    weight += slot * cut.line;
                } else {
                    sums.weights = static_cast<const Element*>(p.weight.data);
                    sums.weight_stride = p.weight.stride[0];
                    weight += first_in * p.weight.stride[0] + channel * p.weight.stride[1];
                }
                for (int in = 0; in < cut.in_channels; in += chunk) {
                    if (restages) {
                        __syncthreads();
                        stage<Element, kChannels>(p, cut, first_column, in);
                        __syncthreads();
                    }
                    const int left = cut.in_channels - in;
                    sums.add(cut, item, weight, left < chunk ? left : chunk);
#pragma unroll
                    for (int s = 0; s < kSamples; ++s)
                        sums.x[s] += chunk / sums.kWidth * sums.in_stride;
                }
                if (has_item && has_column)
                    store<Element, kChannels>(sums.v, p, item, group * cut.out_channels + channel,
                                              cut.out_channels - channel);
            }
        }
    }
}

}  // namespace fastgen::cuda

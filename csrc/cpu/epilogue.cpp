// Bias, folded normalisation and activation alone, over a dense tensor.
#include "epilogue.h"

#include "kernels.h"
#include "tile.h"

namespace fastgen::FASTGEN_ISA {
namespace {

// v = act(scale (v + bias) + shift); an absent bias or shift is the neutral element, -0.
void finish(const Epilogue& e, int64_t channel, float* v, int64_t count) {
    const float bias = e.bias ? e.bias[channel] : -0.0f;
    const float scale = e.scale ? e.scale[channel] : 1.0f;
    const float shift = e.shift ? e.shift[channel] : -0.0f;
    with_activation(e, [=](const auto& act) {
        for (int64_t i = 0; i < count; ++i) v[i] = act(scale * (v[i] + bias) + shift);
    });
}

template <typename Element>
void load_dense(const Tensor& tensor, int64_t start, int64_t count, float* v) {
    const Element* from = static_cast<const Element*>(tensor.data) + start;
    for (int64_t i = 0; i < count; ++i) v[i] = to_float(from[i]);
}

template <typename Element>
void store_dense(const Tensor& tensor, int64_t start, int64_t count, const float* v) {
    Element* to = static_cast<Element*>(tensor.data) + start;
    for (int64_t i = 0; i < count; ++i) from_float(v[i], to[i]);
}

void load_dense(const Tensor& tensor, int64_t start, int64_t count, float* v) {
    if (tensor.dtype == kFloat32) return load_dense<float>(tensor, start, count, v);
    if (tensor.dtype == kBFloat16) return load_dense<bfloat16>(tensor, start, count, v);
    load_dense<float16>(tensor, start, count, v);
}

void store_dense(const Tensor& tensor, int64_t start, int64_t count, const float* v) {
    if (tensor.dtype == kFloat32) return store_dense<float>(tensor, start, count, v);
    if (tensor.dtype == kBFloat16) return store_dense<bfloat16>(tensor, start, count, v);
    store_dense<float16>(tensor, start, count, v);
}

// Channels outside: runs of one channel each.
void finish_planes(const ChannelEpilogueParams& p, int64_t begin, int64_t end) {
    alignas(64) float v[kChunk];
    const int64_t chunks = (p.inner + kChunk - 1) / kChunk;
    for (int64_t index = begin; index < end; ++index) {
        const int64_t row = index / chunks, first = index % chunks * kChunk;
        const int64_t count = p.inner - first < kChunk ? p.inner - first : kChunk;
        load_dense(p.in, row * p.inner + first, count, v);
        finish(p.epilogue, row % p.channels, v, count);
        store_dense(p.out, row * p.inner + first, count, v);
    }
}

// Elements of one pass over pixels: whole pixels where they fit, so that coefficients are laid out
// once.
int64_t pixel_run(const ChannelEpilogueParams& p) {
    return p.channels <= kChunk ? kChunk / p.channels * p.channels : kChunk;
}

// Channels innermost: the coefficients repeat with their number.
void finish_pixels(const ChannelEpilogueParams& p, int64_t begin, int64_t end) {
    alignas(64) float v[kChunk], bias[kChunk], scale[kChunk], shift[kChunk];
    const Epilogue& e = p.epilogue;
    const int64_t total = p.outer * p.channels, run = pixel_run(p);
    for (int64_t index = begin; index < end; ++index) {
        const int64_t start = index * run;
        const int64_t count = total - start < run ? total - start : run;
        if (index == begin || p.channels > kChunk) {
            int64_t channel = start % p.channels;
            for (int64_t i = 0; i < run; ++i) {
                bias[i] = e.bias ? e.bias[channel] : -0.0f;
                scale[i] = e.scale ? e.scale[channel] : 1.0f;
                shift[i] = e.shift ? e.shift[channel] : -0.0f;
                channel = channel + 1 == p.channels ? 0 : channel + 1;
            }
        }
        load_dense(p.in, start, count, v);
        with_activation(e, [&](const auto& act) {
            for (int64_t i = 0; i < count; ++i) v[i] = act(scale[i] * (v[i] + bias[i]) + shift[i]);
        });
        store_dense(p.out, start, count, v);
    }
}

}  // namespace

void channel_epilogue(const ChannelEpilogueParams& p, int threads) {
    const bool pixels = p.inner == 1;
    const int64_t run = pixels ? pixel_run(p) : kChunk;
    const int64_t chunks = pixels ? (p.outer * p.channels + run - 1) / run
                                  : p.outer * p.channels * ((p.inner + run - 1) / run);
    parallel_for(chunks, threads, [&](int64_t begin, int64_t end) {
        IeeeMode ieee;
        pixels ? finish_pixels(p, begin, end) : finish_planes(p, begin, end);
    });
}

}  // namespace fastgen::FASTGEN_ISA

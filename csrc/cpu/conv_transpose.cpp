// Transposed convolution after its matrix product: col2im by gathering, so that every output
// element is written once, with bias, folded normalisation and activation on the way out.
// Dumoulin & Visin, "A guide to convolution arithmetic for deep learning" (2016), chapter 4.
#include "../math/activation.h"
#include "kernels.h"
#include "tile.h"

namespace fastgen::FASTGEN_ISA {
namespace {

constexpr int kChannels = 16;  // whose rows share one walk over the taps
constexpr int kRun = 128;      // elements of one phase of an output row
constexpr int kPhases = 2;     // phases side by side: a stride of 2 is written in order

// Functions as arguments: a switch outside the loop, and a loop that vectorises inside.
template <typename Body>
FASTGEN_INLINE void with_activation(const Epilogue& e, const Body& body) {
    const float slope = e.negative_slope;
    switch (e.activation) {
        case kIdentity:
            return body([](float x) { return x; });
        case kRelu:
            return body([](float x) { return x < 0.0f ? 0.0f : x; });
        case kLeakyRelu:
            return body([=](float x) { return x < 0.0f ? x * slope : x; });
        case kTanh:
            return body([](float x) { return tanh_any(x); });
        case kSigmoid:
            return body([](float x) { return sigmoid(x); });
        case kSilu:
            return body([](float x) { return silu(x); });
        case kGelu:
            return body([](float x) { return gelu(x); });
    }
}

// v = act(scale (v + bias) + shift); an absent bias or shift is the neutral element, -0.
void finish(const Epilogue& e, int64_t channel, float* v, int64_t count) {
    const float bias = e.bias ? e.bias[channel] : -0.0f;
    const float scale = e.scale ? e.scale[channel] : 1.0f;
    const float shift = e.shift ? e.shift[channel] : -0.0f;
    with_activation(e, [=](const auto& act) {
        for (int64_t i = 0; i < count; ++i) v[i] = act(scale * (v[i] + bias) + shift);
    });
}

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

// Where output coordinate `o` reads tap `k` of one dim: the input coordinate, or -1.
int64_t source(const FoldParams& p, int dim, int64_t o, int64_t k) {
    const int64_t reach = o + p.padding[dim] - k * p.dilation[dim];
    if (reach < 0 || reach % p.stride[dim] != 0) return -1;
    const int64_t i = reach / p.stride[dim];
    return i < p.in_size[dim] ? i : -1;
}

// Output elements w = stride * q + phase for q in [first, first + count), of one row: one channel
// block, one (d, h). They come from inputs q - m, with stride * m + phase = k * dilation - padding.
struct Piece {
    int64_t sample, channel, channels, d, h;
    int64_t phase, phases, first, count;
};

using Rows = float[kChannels][kPhases][kRun];

void gather_tap_row(const FoldParams& p, const Piece& piece, const float* from, int64_t tap,
                    Rows& rows) {
    const int64_t stride = p.stride[2];
    for (int64_t k = 0; k < p.kernel[2]; ++k) {
        const int64_t reach = k * p.dilation[2] - p.padding[2];
        const int64_t m = floor_div(reach, stride);
        const int64_t part = reach - m * stride - piece.phase;
        if (part < 0 || part >= piece.phases) continue;
        int64_t begin = piece.first, end = piece.first + piece.count;  // of q
        if (begin < m) begin = m;
        if (end > m + p.in_size[2]) end = m + p.in_size[2];
        const int64_t count = end - begin;
        if (count <= 0) continue;
        const float* source = from + (tap + k) * p.tap_stride + (begin - m);
        for (int64_t c = 0; c < piece.channels; ++c) {
            float* __restrict to = rows[c][part] + (begin - piece.first);
            const float* __restrict column = source + c * p.channel_stride;
            for (int64_t i = 0; i < count; ++i) to[i] = to[i] + column[i];
        }
    }
}

template <typename Element>
void store_rows(const FoldParams& p, const Piece& piece, const Rows& rows) {
    const Tensor& out = p.out;
    Element* data = static_cast<Element*>(out.data) + piece.sample * out.batch_stride +
                    piece.channel * out.stride[0] + piece.d * out.stride[1] +
                    piece.h * out.stride[2] +
                    (piece.first * p.stride[2] + piece.phase) * out.stride[3];
    const int64_t step = out.stride[3], row = p.stride[2] * step;
    const int64_t left = p.out_size[2] - piece.phase - p.stride[2] * piece.first;  // of w
    if (out.stride[0] == 1) {  // channels last: all channels of a pixel together
        for (int64_t i = 0; i < piece.count; ++i)
            for (int64_t part = 0; part < piece.phases; ++part) {
                if (i * p.stride[2] + part >= left) continue;
                Element* to = data + i * row + part * step;
                for (int64_t c = 0; c < piece.channels; ++c) from_float(rows[c][part][i], to[c]);
            }
        return;
    }
    for (int64_t c = 0; c < piece.channels; ++c) {
        Element* to = data + c * out.stride[0];
        const float *first = rows[c][0], *second = rows[c][1];
        if (step == 1 && p.stride[2] == 2 && piece.phases == 2) {
            const int64_t pairs = left / 2 < piece.count ? left / 2 : piece.count;
            for (int64_t i = 0; i < pairs; ++i) {
                from_float(first[i], to[2 * i]);
                from_float(second[i], to[2 * i + 1]);
            }
            if (pairs < piece.count) from_float(first[pairs], to[2 * pairs]);
        } else if (step == 1 && p.stride[2] == 1) {
            for (int64_t i = 0; i < piece.count; ++i) from_float(first[i], to[i]);
        } else {
            for (int64_t i = 0; i < piece.count; ++i)
                for (int64_t part = 0; part < piece.phases; ++part)
                    if (i * p.stride[2] + part < left)
                        from_float(rows[c][part][i], to[i * row + part * step]);
        }
    }
}

void fold_piece(const FoldParams& p, const Piece& piece) {
    alignas(64) Rows rows;
    for (int64_t c = 0; c < piece.channels; ++c)
        for (int64_t part = 0; part < piece.phases; ++part)
            for (int64_t i = 0; i < piece.count; ++i) rows[c][part][i] = 0.0f;
    const float* columns =
        p.columns + piece.sample * p.sample_stride + piece.channel * p.channel_stride;
    for (int64_t kd = 0; kd < p.kernel[0]; ++kd) {
        const int64_t d = source(p, 0, piece.d, kd);
        if (d < 0) continue;
        for (int64_t kh = 0; kh < p.kernel[1]; ++kh) {
            const int64_t h = source(p, 1, piece.h, kh);
            if (h < 0) continue;
            gather_tap_row(p, piece, columns + (d * p.in_size[1] + h) * p.in_size[2],
                           (kd * p.kernel[1] + kh) * p.kernel[2], rows);
        }
    }
    for (int64_t c = 0; c < piece.channels; ++c)
        for (int64_t part = 0; part < piece.phases; ++part)
            finish(p.epilogue, piece.channel + c, rows[c][part], piece.count);
    if (p.out.dtype == kFloat32)
        store_rows<float>(p, piece, rows);
    else if (p.out.dtype == kBFloat16)
        store_rows<bfloat16>(p, piece, rows);
    else
        store_rows<float16>(p, piece, rows);
}

void fold_row(const FoldParams& p, Piece piece) {
    const int64_t stride = p.stride[2];
    const int64_t phases = stride < p.out_size[2] ? stride : p.out_size[2];  // with any output
    piece.phases = stride == 2 ? 2 : 1;
    for (piece.phase = 0; piece.phase < phases; piece.phase += piece.phases) {
        const int64_t total = (p.out_size[2] - piece.phase + stride - 1) / stride;
        for (piece.first = 0; piece.first < total; piece.first += kRun) {
            piece.count = total - piece.first < kRun ? total - piece.first : kRun;
            fold_piece(p, piece);
        }
    }
}

// ---- an epilogue alone, over a dense tensor --------------------------------------------------

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

void conv_transpose_fold(const FoldParams& p, int threads) {
    const int64_t blocks = (p.channels + kChannels - 1) / kChannels;
    const int64_t depth = p.out_size[0], height = p.out_size[1];
    parallel_for(p.batch * blocks * depth * height, threads, [&](int64_t begin, int64_t end) {
        IeeeMode ieee;
        for (int64_t index = begin; index < end; ++index) {
            Piece piece{};
            piece.h = index % height;
            piece.d = index / height % depth;
            const int64_t block = index / (height * depth);
            piece.sample = block / blocks;
            piece.channel = block % blocks * kChannels;
            const int64_t left = p.channels - piece.channel;
            piece.channels = left < kChannels ? left : kChannels;
            fold_row(p, piece);
        }
    });
}

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

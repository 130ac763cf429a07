// What crosses from Python to a kernel: one struct per op, with strides beside each pointer.
// Plain data only: it is passed by value to CUDA kernels and shared by every instruction set.
#pragma once

#include <stdint.h>

namespace fastgen {

constexpr int kMaxDims = 8;
constexpr int64_t kChunk = 1024;  // elements of one leaf of the reduction tree, and of a CPU tile

constexpr int64_t kMaxNoiseElements = int64_t{1} << 34;  // of one sample: the counter's 32 bits

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// The logical shape that all tensors of a call share: `batch` samples of `elements` each, walked
// row-major over size[0..ndim). Strides (in elements) follow the same dims.
struct Shape {
    int64_t batch;
    int64_t elements;
    int32_t ndim;
    int64_t size[kMaxDims];
};

struct Tensor {
    void* data;  // null: absent
    DType dtype;
    int64_t batch_stride;
    int64_t stride[kMaxDims];
};

// ---- noise ----------------------------------------------------------------------------------
// Where a sample's normals come from: key = seed, counter = (block, step << 8 | stream, sample id).
struct NoiseKey {
    const int64_t* seeds;         // null: `seed` for every sample
    int64_t seed_stride;          // 0 or 1
    const int64_t* sample_ids;    // null: first_sample_id + slot
    const int64_t* step_pointer;  // null, or added to `step`
    uint64_t seed;
    int64_t first_sample_id;
    uint32_t step;
};

// ---- step -----------------------------------------------------------------------------------
constexpr int kHistory = 7;
constexpr int kInputs = 5 + kHistory;  // x, e, u, denoised, known, history
constexpr int kOutputs = 4;
constexpr int kNoises = 4;
enum Input : int32_t { kX = 0, kE = 1, kU = 2, kDenoised = 3, kKnown = 4, kFirstHistory = 5 };

// One row of a Plan, as fastgen/plan.py packs it:
//     e   = scale (u + g (c - u))
//     d   = clip(denoise_x x + denoise_e e)
//     y_j = sum_k weights[j][k] in_k + sum_m noise[j][m] z_m
// A zero weight means that its term is neither read nor multiplied; so does an absent tensor.
struct StepRow {
    float denoise_x, denoise_e;
    float clip_low, clip_high;          // -inf, inf: no clip
    float logvar_scale, logvar_offset;  // z_0 is multiplied by exp((scale logvar + offset) / 2)
    float reserved[2];
    float weights[kOutputs][kInputs];
    float noise[kOutputs][kNoises];
};
static_assert(sizeof(StepRow) == 72 * sizeof(float), "fastgen/plan.py packs 72 floats");

struct StepParams {
    Shape shape;
    Tensor x, cond, uncond, known, logvar;
    Tensor history[kHistory];
    Tensor given_noise[kNoises];  // in place of drawn normals
    Tensor out[kOutputs];
    const StepRow* rows;         // null: `row` below
    int64_t row_stride;          // rows per sample: 0 or 1
    const int64_t* row_pointer;  // null, or the first row to use
    const float* guidance;       // null: `guidance_scale` for every sample
    int64_t guidance_stride;     // 0 or 1
    const float* output_scale;   // null, or a factor of e per sample
    StepRow row;
    float guidance_scale;
    NoiseKey key;
    int32_t
        fresh;  // whether the output's memory is new: its first touch is best left in the caches
    int32_t draws;  // whether a seed was given: z_m that is not given is drawn
    int32_t stream[kNoises];
};

// ---- reparameterize -------------------------------------------------------------------------
struct ReparameterizeParams {
    Shape shape;
    Tensor mean, logvar, given_noise;
    Tensor out;       // absent where only the divergence is asked for
    Tensor grad_out;  // backward only, as what follows
    Tensor grad_mean, grad_logvar, grad_noise;
    const float* grad_kl;  // (batch,)
    float* kl;             // (batch,) or null
    float* partials;       // (batch, chunks) workspace where kl is asked for
    float clamp_low, clamp_high;
    NoiseKey key;
    int32_t stream;
};

// ---- guidance -------------------------------------------------------------------------------
// scale[b] = rescale * std(cond) / std(guided) + (1 - rescale), standard deviations unbiased.
struct RescaleParams {
    Shape shape;
    Tensor cond, uncond;
    const float* guidance;
    int64_t guidance_stride;
    float guidance_scale;
    float rescale;
    float* partials;  // (batch, 5, chunks): sum and centred square sum of cond, of guided; scratch
    float* scale;     // (batch,)
};

// ---- conv_transpose -------------------------------------------------------------------------
enum Activation : int32_t {
    kIdentity = 0,
    kRelu = 1,
    kLeakyRelu = 2,
    kTanh = 3,
    kSigmoid = 4,
    kSilu = 5,
    kGelu = 6
};

// y = activation(scale (v + bias) + shift) of one output channel
struct Epilogue {
    const float *bias, *scale, *shift;  // (channels,), null: 0, 1, 0
    Activation activation;
    float negative_slope;
};

// Sizes are (depth, height, width), 1 where a dim is absent. Channels are those of one group.
struct ConvTransposeGeometry {
    int64_t in_size[3], out_size[3], kernel[3], stride[3], padding[3], dilation[3];
    int64_t groups, in_channels, out_channels;
    int64_t planar;  // whether the output has its channels apart, instead of side by side
};

struct Phases;  // what follows from a geometry: cpu/phases.h

// Tensors have the strides (channel, depth, height, width).
struct ConvTransposeParams {
    Tensor in, out;
    const void* weight;  // packed
    int64_t batch;
    const Phases* phases;
    Epilogue epilogue;
};

// The same of a weight as it is, without panels: csrc/cuda/conv_transpose.cu. Its strides are
// (input channel, output channel, depth, height, width). One dtype for all; out overlaps no input.
struct DirectConvTransposeParams {
    Tensor in, weight, out;
    int64_t batch;
    ConvTransposeGeometry geometry;
    Epilogue epilogue;
};

// weight has the strides (input channel, output channel, depth, height, width).
struct PackParams {
    Tensor weight;
    void* packed;
    const Phases* phases;
};

// out = epilogue of in; both dense as (outer, channels, inner), strides unused. May be in place.
struct ChannelEpilogueParams {
    Tensor in, out;
    int64_t outer, channels, inner;
    Epilogue epilogue;
};

}  // namespace fastgen

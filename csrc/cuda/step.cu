// The step kernel: all operands of a thread's quad first, then the sums in the order of
// csrc/cpu/step.cpp. A term with a zero weight is a uniform branch around its load and multiply.
#include "launch.cuh"
#include "launch.h"
#include "noise.cuh"

namespace fastgen::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kFewHistory = 2;  // of a kernel that also has no known image and z_0 alone

// Bit k: in_k; bit kInputs + m: z_m. A term whose tensor is absent is dropped, as one with a zero
// weight is.
struct Terms {
    uint32_t present, needed;
    uint32_t of_output[kOutputs];
};

uint32_t present(const StepParams& p) {
    const Tensor* inputs[] = {&p.x, &p.cond, &p.uncond, nullptr, &p.known};
    uint32_t all = 1u << kDenoised;
    for (int k = 0; k < kFirstHistory; ++k) all |= uint32_t(inputs[k] && inputs[k]->data) << k;
    for (int k = 0; k < kHistory; ++k)
        all |= uint32_t(p.history[k].data != nullptr) << (kFirstHistory + k);
    for (int m = 0; m < kNoises; ++m)
        all |= uint32_t(p.draws || p.given_noise[m].data) << (kInputs + m);
    return all;
}

__host__ __device__ __forceinline__ uint32_t terms_of(const StepRow& row, int output) {
    uint32_t terms = 0;
    for (int k = 0; k < kInputs; ++k) terms |= uint32_t(row.weights[output][k] != 0.0f) << k;
    for (int m = 0; m < kNoises; ++m)
        terms |= uint32_t(row.noise[output][m] != 0.0f) << (kInputs + m);
    return terms;
}

__host__ __device__ __forceinline__ uint32_t needed(const StepRow& row, const Terms& terms) {
    uint32_t all = 0;
    for (int j = 0; j < kOutputs; ++j) all |= terms.of_output[j];
    if (all >> kDenoised & 1u)
        all |= uint32_t(row.denoise_x != 0.0f) << kX | uint32_t(row.denoise_e != 0.0f) << kE;
    return all & terms.present;
}

// The whole thread block fetches the sample's row.
__device__ __forceinline__ void fetch_row(const StepParams& p, uint32_t present, int64_t sample,
                                          StepRow& row, Terms& terms) {
    __syncthreads();  // the last sample's row is no longer read
    const StepRow* from = p.rows + ((p.row_pointer ? *p.row_pointer : 0) + sample * p.row_stride);
    for (int i = threadIdx.x; i < int(sizeof(StepRow) / sizeof(float)); i += blockDim.x)
        reinterpret_cast<float*>(&row)[i] = reinterpret_cast<const float*>(from)[i];
    __syncthreads();
    if (threadIdx.x < kOutputs)
        terms.of_output[threadIdx.x] =
            p.out[threadIdx.x].data ? terms_of(row, threadIdx.x) & present : 0;
    if (threadIdx.x == 0) terms.present = present;
    __syncthreads();
    if (threadIdx.x == 0) terms.needed = needed(row, terms);
    __syncthreads();
}

__device__ __forceinline__ void add_term(float sum[4], float weight, const float v[4]) {
    for (int i = 0; i < 4; ++i) sum[i] = sum[i] + weight * v[i];
}

// The neutral element of addition: what a sum of no terms is.
__device__ __forceinline__ void clear(float sum[4]) {
    for (int i = 0; i < 4; ++i) sum[i] = -0.0f;
}

template <Layout kLayout, bool kDraws, bool kMany>
__device__ __forceinline__ void run(const StepParams& p, const StepRow& row, const Terms& terms,
                                    const Walk& walk, int64_t sample, float4* exchange) {
    constexpr int kUsed = kMany ? kInputs : kFirstHistory + kFewHistory;
    constexpr int kNormals = kMany ? kNoises : 1;
    const Group<kLayout> group(p.shape, walk, sample);
    if (kLayout != Layout::kStrided && !group.has()) return;  // strided: lanes share their normals

    const uint32_t active = terms.needed;
    const float g = p.guidance ? p.guidance[sample * p.guidance_stride] : p.guidance_scale;
    const bool guided = p.uncond.data && g != 1.0f;
    const bool reads_u = (active >> kU & 1u) || (guided && (active >> kE & 1u));
    const bool scales_z0 = (active >> kInputs & 1u) && p.logvar.data;

    uint4 x, cond, uncond, known, logvar, history[kHistory], given[kNormals];
    uint2 packed[kOutputs];
#pragma unroll 1
    for (int quad = 0; quad < Group<kLayout>::kQuads; ++quad) {
        if (active >> kX & 1u) group.load(x, p.x, quad);
        if (active >> kE & 1u) group.load(cond, p.cond, quad);
        if (reads_u) group.load(uncond, p.uncond, quad);
        if (kMany && (active >> kKnown & 1u)) group.load(known, p.known, quad);
#pragma unroll
        for (int k = kFirstHistory; k < kUsed; ++k)
            if (active >> k & 1u)
                group.load(history[k - kFirstHistory], p.history[k - kFirstHistory], quad);
        if (scales_z0) group.load(logvar, p.logvar, quad);
#pragma unroll
        for (int m = 0; m < kNormals; ++m)
            if ((active >> (kInputs + m) & 1u) && p.given_noise[m].data)
                group.load(given[m], p.given_noise[m], quad);

        float e[4], d[4], z[kNormals][4];
        if (active >> kE & 1u) {  // e = scale (u + g (c - u))
            group.widen(e, cond, p.cond, quad);
            if (guided) {
                float u[4];
                group.widen(u, uncond, p.uncond, quad);
                for (int i = 0; i < 4; ++i) e[i] = u[i] + g * (e[i] - u[i]);
            }
            if (p.output_scale) {
                const float scale = p.output_scale[sample];
                for (int i = 0; i < 4; ++i) e[i] = scale * e[i];
            }
        }
        if (active >> kDenoised & 1u) {  // d = clip(a_x x + a_e e)
            clear(d);
            if (row.denoise_x != 0.0f && (active >> kX & 1u)) {
                float v[4];
                group.widen(v, x, p.x, quad);
                add_term(d, row.denoise_x, v);
            }
            if (row.denoise_e != 0.0f && (active >> kE & 1u)) add_term(d, row.denoise_e, e);
            for (int i = 0; i < 4; ++i) {
                const float raised = d[i] < row.clip_low ? row.clip_low : d[i];
                d[i] = raised > row.clip_high ? row.clip_high : raised;
            }
        }
#pragma unroll
        for (int m = 0; m < kNormals; ++m) {
            if (!(active >> (kInputs + m) & 1u)) continue;
            if (!kDraws || p.given_noise[m].data)
                group.widen(z[m], given[m], p.given_noise[m], quad);
            else
                Normals(p.key, sample).draw(z[m], group, quad, p.stream[m], exchange);
        }
        if (scales_z0) {
            float v[4];
            group.widen(v, logvar, p.logvar, quad);
            for (int i = 0; i < 4; ++i)
                z[0][i] = exp_any(0.5f * (row.logvar_scale * v[i] + row.logvar_offset)) * z[0][i];
        }

#pragma unroll
        for (int j = 0; j < kOutputs; ++j) {
            if (!p.out[j].data) continue;
            const uint32_t summed = terms.of_output[j];
            float y[4];
            clear(y);
#pragma unroll
            for (int k = 0; k < kUsed; ++k) {
                if ((k == kKnown && !kMany) || !(summed >> k & 1u)) continue;
                float v[4];
                if (k == kX) group.widen(v, x, p.x, quad);
                if (k == kU) group.widen(v, uncond, p.uncond, quad);
                if (k == kKnown) group.widen(v, known, p.known, quad);
                if (k >= kFirstHistory)
                    group.widen(v, history[k - kFirstHistory], p.history[k - kFirstHistory], quad);
                add_term(y, row.weights[j][k], k == kE ? e : k == kDenoised ? d : v);
            }
#pragma unroll
            for (int m = 0; m < kNormals; ++m)
                if (summed >> (kInputs + m) & 1u) add_term(y, row.noise[j][m], z[m]);
            group.store(p.out[j], quad, y, packed[j]);
        }
    }
}

// kDraws: a normal is drawn. kMany: more than kFewHistory and so on. kByPointer: `p.rows` is read.
template <Layout kLayout, bool kDraws, bool kMany, bool kByPointer>
__global__ void __launch_bounds__(kThreads, kMany                         ? 3
                                            : kLayout == Layout::kStrided ? 5
                                                                          : 6)
    step_kernel(const __grid_constant__ StepParams p, const __grid_constant__ Terms terms,
                const __grid_constant__ Walk walk) {
    __shared__ float4 exchange[kDraws && kLayout == Layout::kStrided ? kThreads : 1];
    for (int64_t sample = blockIdx.y; sample < p.shape.batch; sample += gridDim.y) {
        if constexpr (kByPointer) {
            __shared__ StepRow row_of_sample;
            __shared__ Terms terms_of_sample;
            fetch_row(p, terms.present, sample, row_of_sample, terms_of_sample);
            run<kLayout, kDraws, kMany>(p, row_of_sample, terms_of_sample, walk, sample, exchange);
        } else {
            run<kLayout, kDraws, kMany>(p, p.row, terms, walk, sample, exchange);
        }
    }
}

bool draws(const StepParams& p, uint32_t possible) {
    for (int m = 0; m < kNoises; ++m)
        if ((possible >> (kInputs + m) & 1u) && !p.given_noise[m].data) return true;
    return false;
}

bool has_many(uint32_t possible) {
    constexpr uint32_t kFew = (1u << (kFirstHistory + kFewHistory)) - 1u;
    return possible & ~(kFew & ~(1u << kKnown) | 1u << kInputs);
}

}  // namespace

int step(const StepParams& p, void* stream) {
    if (p.shape.batch <= 0 || p.shape.elements <= 0) return cudaSuccess;
    Operands operands;
    for (const Tensor* tensor : {&p.x, &p.cond, &p.uncond, &p.known, &p.logvar})
        operands.add(*tensor);
    operands.add(p.history);
    operands.add(p.given_noise);
    operands.add(p.out);
    const Layout layout = choose_layout(p.shape, operands);
    Terms terms{};
    terms.present = present(p);
    if (!p.rows) {
        for (int j = 0; j < kOutputs; ++j)
            terms.of_output[j] = p.out[j].data ? terms_of(p.row, j) & terms.present : 0;
        terms.needed = needed(p.row, terms);
    }
    // Of rows that are not known here, whatever the tensors allow.
    const uint32_t possible = p.rows ? terms.present : terms.needed;
    const unsigned block = block_size(p.shape, layout, kThreads);
    const dim3 grid = grid_size(p.shape, layout, block);
    return with_layout(layout, [&](auto layout_tag) {
        return with_bool(draws(p, possible), [&](auto draws_tag) {
            return with_bool(has_many(possible), [&](auto many_tag) {
                return with_bool(p.rows, [&](auto pointer_tag) {
                    return launch(
                        step_kernel<decltype(layout_tag)::value, decltype(draws_tag)::value,
                                    decltype(many_tag)::value, decltype(pointer_tag)::value>,
                        grid, dim3(block), stream, p, terms, walk_of(p.shape));
                });
            });
        });
    });
}

}  // namespace fastgen::cuda

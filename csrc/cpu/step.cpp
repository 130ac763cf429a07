// The step kernel: one tile at a time, each operand loaded once, one rounding at the store.
#include <math.h>

#include "kernels.h"
#include "noise.h"

namespace fastgen::FASTGEN_ISA {
namespace {

// Outputs larger than this would push everything else out of the caches.
constexpr int64_t kStreamBytes = int64_t{32} << 20;

// to = [to +] c0 in0 + c1 in1 + ..., summed left to right.
template <int Terms, bool Continue>
void sum_terms(float* __restrict to, const float* const* in, const float* c, int64_t count) {
    const float* in0 = in[0];
    const float* in1 = Terms > 1 ? in[1] : nullptr;
    const float* in2 = Terms > 2 ? in[2] : nullptr;
    const float* in3 = Terms > 3 ? in[3] : nullptr;
    const float c0 = c[0], c1 = Terms > 1 ? c[1] : 0, c2 = Terms > 2 ? c[2] : 0,
                c3 = Terms > 3 ? c[3] : 0;
    for (int64_t i = 0; i < count; ++i) {
        float sum = c0 * in0[i];
        if (Continue) sum = to[i] + sum;
        if (Terms > 1) sum = sum + c1 * in1[i];
        if (Terms > 2) sum = sum + c2 * in2[i];
        if (Terms > 3) sum = sum + c3 * in3[i];
        to[i] = sum;
    }
}

template <bool Continue>
void sum_up_to_four(float* to, const float* const* in, const float* c, int terms, int64_t count) {
    switch (terms) {
        case 1:
            return sum_terms<1, Continue>(to, in, c, count);
        case 2:
            return sum_terms<2, Continue>(to, in, c, count);
        case 3:
            return sum_terms<3, Continue>(to, in, c, count);
        default:
            return sum_terms<4, Continue>(to, in, c, count);
    }
}

void weighted_sum(float* to, const float* const* in, const float* c, int terms, int64_t count) {
    if (terms == 0) {  // the neutral element of addition
        for (int64_t i = 0; i < count; ++i) to[i] = -0.0f;
        return;
    }
    sum_up_to_four<false>(to, in, c, terms < 4 ? terms : 4, count);
    for (int done = 4; done < terms; done += 4)
        sum_up_to_four<true>(to, in + done, c + done, terms - done < 4 ? terms - done : 4, count);
}

// NaN passes.
FASTGEN_INLINE float clipped(float value, float low, float high) {
    const float raised = value < low ? low : value;
    return raised > high ? high : raised;
}

// to = clip(c0 in0 + c1 in1) of at most two terms.
void clipped_sum(float* __restrict to, const float* const* in, const float* c, int terms, float low,
                 float high, int64_t count) {
    const float *in0 = in[0], *in1 = in[1];
    const float c0 = c[0], c1 = c[1];
    if (terms == 2)
        for (int64_t i = 0; i < count; ++i) to[i] = clipped(c0 * in0[i] + c1 * in1[i], low, high);
    else if (terms == 1)
        for (int64_t i = 0; i < count; ++i) to[i] = clipped(c0 * in0[i], low, high);
    else
        for (int64_t i = 0; i < count; ++i) to[i] = clipped(-0.0f, low, high);
}

struct Buffers {
    alignas(64) float input[kInputs][kChunk];
    alignas(64) float noise[kNoises][kChunk];
    alignas(64) float scratch[kChunk];
    alignas(64) float out[kOutputs][kChunk];
};

// Straight into the output; by way of a buffer, since an output is also an input; past the caches.
enum class Writing { kDirect, kBuffered, kStream };

class StepTile {
   public:
    StepTile(const StepParams& p, Buffers& buffers, const Tile& tile, Writing writing)
        : p_(p), buffers_(buffers), tile_(tile), writing_(writing), row_(select_row(p, tile)) {}

    void run() {
        const int64_t count = tile_.count;
        for (int j = 0; j < kOutputs; ++j) {
            const Tensor& out = p_.out[j];
            if (!out.data) continue;
            if (is_denoised(j)) input(kDenoised);
            if (results_[j]) continue;
            const float* in[kInputs + kNoises];
            float c[kInputs + kNoises];
            int terms = 0;
            for (int k = 0; k < kInputs; ++k)
                if (row_.weights[j][k] != 0.0f && has(k)) {
                    in[terms] = input(k);
                    c[terms++] = row_.weights[j][k];
                }
            for (int m = 0; m < kNoises; ++m)
                if (row_.noise[j][m] != 0.0f && has_noise(m)) {
                    in[terms] = noise(m);
                    c[terms++] = row_.noise[j][m];
                }
            results_[j] = writing_ == Writing::kDirect
                              ? destination(p_.shape, out, tile_, buffers_.out[j])
                              : buffers_.out[j];
            weighted_sum(results_[j], in, c, terms, count);
        }
        for (int j = 0; j < kOutputs; ++j) {
            const Tensor& out = p_.out[j];
            if (!out.data) continue;
            float* place = destination(p_.shape, out, tile_, nullptr);
            if (place && writing_ == Writing::kStream)
                stream_copy(place, results_[j], count);
            else if (place != results_[j])
                store(p_.shape, out, tile_, results_[j]);
        }
    }

   private:
    static const StepRow& select_row(const StepParams& p, const Tile& tile) {
        if (!p.rows) return p.row;
        return p.rows[(p.row_pointer ? *p.row_pointer : 0) + tile.sample * p.row_stride];
    }

    // A term of a tensor that was not given is dropped, as one with a zero weight is.
    bool has(int k) const {
        switch (k) {
            case kX:
                return p_.x.data;
            case kE:
                return p_.cond.data;
            case kU:
                return p_.uncond.data;
            case kDenoised:
                return true;
            case kKnown:
                return p_.known.data;
            default:
                return p_.history[k - kFirstHistory].data;
        }
    }

    bool has_noise(int m) const { return p_.given_noise[m].data || p_.draws; }

    const float* input(int k) {
        const float*& known = inputs_[k];
        if (known) return known;
        switch (k) {
            case kX:
                return known = load_into(p_.x, k);
            case kE:
                return known = guided();
            case kU:
                return known = load_into(p_.uncond, k);
            case kDenoised:
                return known = denoised();
            case kKnown:
                return known = load_into(p_.known, k);
            default:
                return known = load_into(p_.history[k - kFirstHistory], k);
        }
    }

    const float* load_into(const Tensor& tensor, int k) {
        return load(p_.shape, tensor, tile_, buffers_.input[k]);
    }

    // e = scale (u + g (c - u))
    const float* guided() {
        const float* c = load(p_.shape, p_.cond, tile_, buffers_.input[kE]);
        const float g =
            p_.guidance ? p_.guidance[tile_.sample * p_.guidance_stride] : p_.guidance_scale;
        float* e = buffers_.input[kE];
        if (p_.uncond.data && g != 1.0f) {
            const float* u = input(kU);
            for (int64_t i = 0; i < tile_.count; ++i) e[i] = u[i] + g * (c[i] - u[i]);
            c = e;
        }
        if (p_.output_scale) {
            const float scale = p_.output_scale[tile_.sample];
            for (int64_t i = 0; i < tile_.count; ++i) e[i] = scale * c[i];
            c = e;
        }
        return c;
    }

    // d = clip(a_x x + a_e e)
    const float* denoised() {
        const float* in[2] = {};
        float c[2] = {};
        int terms = 0;
        if (row_.denoise_x != 0.0f && has(kX)) {
            in[terms] = input(kX);
            c[terms++] = row_.denoise_x;
        }
        if (row_.denoise_e != 0.0f && has(kE)) {
            in[terms] = input(kE);
            c[terms++] = row_.denoise_e;
        }
        float* d = place_of_denoised();
        const float low = row_.clip_low, high = row_.clip_high;
        if (low == -INFINITY && high == INFINITY)
            weighted_sum(d, in, c, terms, tile_.count);
        else
            clipped_sum(d, in, c, terms, low, high, tile_.count);
        return d;
    }

    // Where an output is d itself, that output's own memory.
    float* place_of_denoised() {
        float* buffer = buffers_.input[kDenoised];
        if (writing_ != Writing::kDirect) return buffer;
        for (int j = 0; j < kOutputs; ++j)
            if (p_.out[j].data && is_denoised(j))
                return results_[j] = destination(p_.shape, p_.out[j], tile_, buffer);
        return buffer;
    }

    bool is_denoised(int j) const {
        for (int k = 0; k < kInputs; ++k)
            if (row_.weights[j][k] != (k == kDenoised ? 1.0f : 0.0f)) return false;
        for (float scale : row_.noise[j])
            if (scale != 0.0f) return false;
        return true;
    }

    const float* noise(int m) {
        const float*& known = noises_[m];
        if (known) return known;
        float* z = buffers_.noise[m];
        if (p_.given_noise[m].data)
            known = load(p_.shape, p_.given_noise[m], tile_, z);
        else
            fill_normal(z, p_.key, p_.stream[m], tile_), known = z;
        if (m == 0 && p_.logvar.data) {
            const float* logvar = load(p_.shape, p_.logvar, tile_, buffers_.scratch);
            const float scale = row_.logvar_scale, offset = row_.logvar_offset;
            const float* from = known;
            for (int64_t i = 0; i < tile_.count; ++i)
                z[i] = exp_any(0.5f * (scale * logvar[i] + offset)) * from[i];
            known = z;
        }
        return known;
    }

    const StepParams& p_;
    Buffers& buffers_;
    const Tile tile_;
    const Writing writing_;
    const StepRow& row_;
    const float* inputs_[kInputs] = {};
    const float* noises_[kNoises] = {};
    float* results_[kOutputs] = {};
};

Writing choose_writing(const StepParams& p) {
    const Tensor* inputs[] = {&p.x, &p.cond, &p.uncond, &p.known, &p.logvar};
    int64_t bytes = 0;
    bool in_place = false;
    for (const Tensor& out : p.out) {
        if (!out.data) continue;
        bytes += p.shape.batch * p.shape.elements * (out.dtype == kFloat32 ? 4 : 2);
        for (const Tensor* in : inputs) in_place |= in->data == out.data;
        for (const Tensor& in : p.history) in_place |= in.data == out.data;
        for (const Tensor& in : p.given_noise) in_place |= in.data == out.data;
    }
    if (in_place) return Writing::kBuffered;
    return bytes >= kStreamBytes && !p.fresh ? Writing::kStream : Writing::kDirect;
}

// Elements of a tile: more than a buffer holds where none is used, from memory to memory, and there
// are tiles enough to share out.
int64_t tile_size(const StepParams& p, Writing writing, int threads) {
    constexpr int64_t kWide = 16 * kChunk;
    const bool few = threads > 1 && p.shape.batch * p.shape.elements < 8 * threads * kWide;
    if (few || writing != Writing::kDirect || p.draws || p.rows || p.uncond.data ||
        p.output_scale || p.logvar.data)
        return kChunk;
    const auto plain = [&](const Tensor& tensor) {
        return !tensor.data || (tensor.dtype == kFloat32 && is_dense(p.shape, tensor));
    };
    bool direct = plain(p.x) && plain(p.cond) && plain(p.known);
    for (const Tensor& tensor : p.history) direct &= plain(tensor);
    for (const Tensor& tensor : p.given_noise) direct &= plain(tensor);
    for (int j = 0; j < kOutputs; ++j)
        direct &= plain(p.out[j]) && p.row.weights[j][kDenoised] == 0.0f;
    return direct ? kWide : kChunk;
}

}  // namespace

void step(const StepParams& p, int threads) {
    const Writing writing = choose_writing(p);
    const auto run = [&](const Tile& tile) {
        Buffers buffers;
        StepTile(p, buffers, tile, writing).run();
        if (writing == Writing::kStream) stream_fence();
    };
    for_each_tile(p.shape, threads, run, tile_size(p, writing, threads));
}

}  // namespace fastgen::FASTGEN_ISA

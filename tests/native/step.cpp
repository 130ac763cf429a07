// The step kernel against the formula of csrc/params.h, one element at a time.
#include <math.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "math/elementary.h"
#include "testing.h"

namespace fastgen::testing {
namespace {

// Every operand of a step, each present or not, with the layout of its own.
struct Case {
    Sizes sizes;
    Array x, cond, uncond, known, logvar, history[kHistory], given_noise[kNoises], out[kOutputs];
    std::vector<StepRow> rows;
    std::vector<float> guidance, output_scale;
    std::vector<int64_t> seeds;
    std::vector<int64_t> row_start = {0};  // one number, at an address that stays
    StepParams p{};

    int64_t batch() const { return sizes[0]; }
};

float coefficient(Random& random) {
    const float values[] = {0, 0, 1, -1, 0.7310586f, -1.2499f, 3e-39f, 1e30f};
    return values[pick(random, 0, 7)];
}

StepRow any_row(Random& random) {
    StepRow row{};
    row.denoise_x = coefficient(random);
    row.denoise_e = coefficient(random);
    const bool clips = pick(random, 0, 1);
    row.clip_low = clips ? -1.0f : -INFINITY;
    row.clip_high = clips ? 0.5f : INFINITY;
    row.logvar_scale = 0.75f;
    row.logvar_offset = -0.3f;
    for (auto& weights : row.weights)
        for (float& weight : weights) weight = coefficient(random);
    for (auto& weights : row.noise)
        for (float& weight : weights) weight = coefficient(random);
    if (pick(random, 0, 2) == 0) {  // an output that is the estimate itself
        const int64_t j = pick(random, 0, kOutputs - 1);
        for (int k = 0; k < kInputs; ++k) row.weights[j][k] = k == kDenoised ? 1.0f : 0.0f;
        for (float& weight : row.noise[j]) weight = 0.0f;
    }
    return row;
}

Sizes any_sizes(Random& random) {
    Sizes sizes = {pick(random, 0, 3)};
    const int64_t rank = pick(random, 0, 4);
    for (int64_t dim = 0; dim < rank; ++dim) sizes.push_back(pick(random, 1, rank > 2 ? 9 : 60));
    return sizes;
}

Case any_case(Random& random) {
    Case c;
    c.sizes = any_sizes(random);
    auto maybe = [&](Array& array, bool output, int64_t one_in) {
        if (pick(random, 1, one_in) == 1)
            array = Array(c.sizes, any_dtype(random), any_layout(random, output), random);
    };
    for (Array* array : {&c.x, &c.cond, &c.uncond}) maybe(*array, false, 1 + pick(random, 0, 1));
    for (Array* array : {&c.known, &c.logvar}) maybe(*array, false, 2);
    for (Array& array : c.history) maybe(array, false, 3);
    for (Array& array : c.given_noise) maybe(array, false, 3);
    for (Array& array : c.out) maybe(array, true, 2);
    if (pick(random, 0, 2) == 0) {  // in place
        if (!c.x.given()) c.x = Array(c.sizes, any_dtype(random), any_layout(random, true), random);
        bool expanded = false;
        for (size_t dim = 0; dim < c.sizes.size(); ++dim)
            expanded |= c.x.strides()[dim] == 0 && c.sizes[dim] > 1;
        if (!expanded) c.out[0] = c.x;
    }
    const bool per_sample_rows = pick(random, 0, 2) == 0;
    c.row_start[0] = pick(random, 0, 2);
    for (int64_t i = 0; i < c.row_start[0] + (per_sample_rows ? 3 : 1); ++i)
        c.rows.push_back(any_row(random));
    c.guidance = {pick(random, 0, 1) ? 1.0f : 7.5f, 1.0f, -0.25f};
    if (pick(random, 0, 1)) c.output_scale = {0.5f, 1.75f, -2.0f};
    c.seeds = {pick(random, -99, 99), 12345, -1};

    StepParams& p = c.p;
    p.row = c.rows[c.row_start[0]];
    if (per_sample_rows || pick(random, 0, 1)) {
        p.rows = c.rows.data();
        p.row_stride = per_sample_rows;
        p.row_pointer = p.key.step_pointer = c.row_start.data();
    } else {
        c.row_start[0] = 0;
        c.rows = {p.row};
    }
    p.guidance_scale = c.guidance[0];
    if (pick(random, 0, 1)) {
        p.guidance = c.guidance.data();
        p.guidance_stride = pick(random, 0, 1);
    }
    if (!c.output_scale.empty()) p.output_scale = c.output_scale.data();
    p.draws = int32_t(pick(random, 0, 1));
    p.key.seeds = c.seeds.data();
    p.key.seed_stride = pick(random, 0, 1);
    p.key.first_sample_id = pick(random, 0, 5);
    p.key.step = 3;
    for (int m = 0; m < kNoises; ++m) p.stream[m] = m ? 7 + m : 2;
    return c;
}

// The inputs as the user sees them at one element.
struct Element {
    const Case& c;
    const StepRow& row;
    int64_t sample, index;  // index within the sample
    int64_t flat;           // over the whole batch

    float e() const {
        const StepParams& p = c.p;
        const float g = p.guidance ? p.guidance[sample * p.guidance_stride] : p.guidance_scale;
        float e = c.cond.at(flat);
        if (c.uncond.given() && g != 1.0f) {
            const float u = c.uncond.at(flat);
            e = u + g * (e - u);
        }
        return p.output_scale ? p.output_scale[sample] * e : e;
    }

    float denoised() const {
        float sum = -0.0f;
        if (row.denoise_x != 0 && c.x.given()) sum = sum + row.denoise_x * c.x.at(flat);
        if (row.denoise_e != 0 && c.cond.given()) sum = sum + row.denoise_e * e();
        if (sum < row.clip_low) sum = row.clip_low;
        if (sum > row.clip_high) sum = row.clip_high;
        return sum;
    }

    bool has(int k) const {
        const Array* arrays[] = {&c.x, &c.cond, &c.uncond, nullptr, &c.known};
        if (k >= kFirstHistory) return c.history[k - kFirstHistory].given();
        return k == kDenoised || arrays[k]->given();
    }

    float input(int k) const {
        switch (k) {
            case kX:
                return c.x.at(flat);
            case kE:
                return e();
            case kU:
                return c.uncond.at(flat);
            case kDenoised:
                return denoised();
            case kKnown:
                return c.known.at(flat);
            default:
                return c.history[k - kFirstHistory].at(flat);
        }
    }

    float noise(int m) const {
        const NoiseKey& key = c.p.key;
        const uint32_t step = key.step + uint32_t(key.step_pointer ? *key.step_pointer : 0);
        float z = c.given_noise[m].given()
                      ? c.given_noise[m].at(flat)
                      : normal(uint64_t(key.seeds[sample * key.seed_stride]),
                               key.first_sample_id + sample, step, c.p.stream[m], index);
        if (m == 0 && c.logvar.given()) {
            const float exponent = row.logvar_scale * c.logvar.at(flat) + row.logvar_offset;
            z = baseline::exp_any(0.5f * exponent) * z;
        }
        return z;
    }

    float output(int j) const {
        float sum = -0.0f;
        for (int k = 0; k < kInputs; ++k)
            if (row.weights[j][k] != 0 && has(k)) sum = sum + row.weights[j][k] * input(k);
        for (int m = 0; m < kNoises; ++m)
            if (row.noise[j][m] != 0 && (c.given_noise[m].given() || c.p.draws))
                sum = sum + row.noise[j][m] * noise(m);
        return sum;
    }
};

std::vector<Array> expected(const Case& c) {
    std::vector<Array> results;
    for (int j = 0; j < kOutputs; ++j) {
        if (!c.out[j].given()) {
            results.emplace_back();
            continue;
        }
        Array result = c.out[j].copy();
        const int64_t count = c.batch() ? result.elements() / c.batch() : 0;
        for (int64_t b = 0; b < c.batch(); ++b) {
            const StepRow& row = c.rows[c.row_start[0] + b * c.p.row_stride];
            for (int64_t i = 0; i < count; ++i)
                result.set(b * count + i, Element{c, row, b, i, b * count + i}.output(j));
        }
        results.push_back(result);
    }
    return results;
}

// Runs the kernel on copies of the outputs; an output that is x itself stays so.
std::vector<Array> computed(const Case& c, const CpuKernels& kernels, int threads) {
    StepParams p = c.p;
    std::vector<Array> results;
    for (const Array& out : c.out) results.push_back(out.given() ? out.copy() : Array());
    const bool in_place = c.out[0].given() && c.out[0].data() == c.x.data();
    const Array& x = in_place ? results[0] : c.x;
    std::vector<std::pair<Tensor*, const Array*>> arrays;
    auto add = [&](Tensor& tensor, const Array& array) {
        if (array.given()) arrays.emplace_back(&tensor, &array);
    };
    for (int j = 0; j < kOutputs; ++j) add(p.out[j], results[j]);
    add(p.x, x);
    add(p.cond, c.cond);
    add(p.uncond, c.uncond);
    add(p.known, c.known);
    add(p.logvar, c.logvar);
    for (int h = 0; h < kHistory; ++h) add(p.history[h], c.history[h]);
    for (int m = 0; m < kNoises; ++m) add(p.given_noise[m], c.given_noise[m]);
    const bool per_sample = p.output_scale || p.row_stride || (p.guidance && p.guidance_stride);
    CHECK(lay_out(p.shape, arrays, c.sizes, p.draws, p.draws || per_sample));
    kernels.step(p, threads);
    return results;
}

TEST(every_instruction_set_gives_the_bits_of_the_formula) {
    Random random(20);
    for (int trial = 0; trial < 400; ++trial) {
        const Case c = any_case(random);
        const std::vector<Array> right = expected(c);
        for_each_isa([&](const CpuKernels& kernels) {
            for (int threads : {1, 3}) {
                const std::vector<Array> got = computed(c, kernels, threads);
                for (int j = 0; j < kOutputs; ++j)
                    if (c.out[j].given()) CHECK(same(got[j], right[j]));
            }
        });
    }
}

// x = 0.5 x over so many elements that stores go past the caches, from an odd address.
TEST(large_outputs_have_the_same_bits) {
    const int64_t n = (int64_t{8} << 20) + 1027;
    std::vector<float> x(n), out(n + 1);
    for (int64_t i = 0; i < n; ++i) x[i] = float(i % 9973) - 5000.0f;
    StepParams p{};
    p.shape = {1, n, 1, {n}};
    p.x = {x.data(), kFloat32, 0, {1}};
    p.out[0] = {out.data() + 1, kFloat32, 0, {1}};
    p.row.weights[0][kX] = 0.5f;
    for_each_isa([&](const CpuKernels& kernels) {
        std::fill(out.begin(), out.end(), NAN);
        kernels.step(p, 2);
        for (int64_t i = 0; i < n; ++i) CHECK(out[i + 1] == 0.5f * x[i]);
    });
}

#if defined(__x86_64__)
TEST(flushing_denormals_changes_nothing_and_stays_as_it_was) {
    std::vector<float> x(2000, 0x1p-140f), out(2000);
    StepParams p{};
    p.shape = {1, 2000, 1, {2000}};
    p.x = {x.data(), kFloat32, 0, {1}};
    p.out[0] = {out.data(), kFloat32, 0, {1}};
    p.row.weights[0][kX] = 0.5f;
    const unsigned saved = _mm_getcsr(), flushing = saved | 0x8040u;
    for_each_isa([&](const CpuKernels& kernels) {
        for (int threads : {1, 2}) {
            _mm_setcsr(flushing);
            kernels.step(p, threads);
            const unsigned after = _mm_getcsr();
            _mm_setcsr(saved);
            CHECK((after & 0x8040u) == 0x8040u);
            for (float value : out) CHECK(value == 0x1p-141f);
        }
    });
}
#endif

}  // namespace
}  // namespace fastgen::testing

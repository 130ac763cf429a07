// z = mean + exp(logvar / 2) eps, its divergence and its gradients, one element at a time.
#include <math.h>

#include "math/elementary.h"
#include "testing.h"

namespace fastgen::testing {
namespace {

struct Case {
    Sizes sizes;
    Array mean, logvar, noise, out, grad_out, grad_mean, grad_logvar, grad_noise;
    std::vector<float> grad_kl;
    bool divergence = false;
    ReparameterizeParams p{};

    int64_t batch() const { return sizes[0]; }
    int64_t elements() const { return batch() ? mean.elements() / batch() : 0; }
};

Case any_case(Random& random) {
    Case c;
    c.sizes = {pick(random, 1, 3), pick(random, 1, 40), pick(random, 1, 90)};
    auto make = [&](Array& array, bool output) {
        array = Array(c.sizes, any_dtype(random), any_layout(random, output), random);
        if (!output) array.fill_ordinary(random);
    };
    make(c.mean, false);
    make(c.logvar, false);
    if (pick(random, 0, 1)) make(c.noise, false);
    if (pick(random, 0, 3)) make(c.out, true);
    if (pick(random, 0, 3)) make(c.grad_out, false);
    make(c.grad_mean, true);
    make(c.grad_logvar, true);
    if (c.noise.given() && c.grad_out.given()) make(c.grad_noise, true);
    c.divergence = !c.out.given() || pick(random, 0, 1);
    if (pick(random, 0, 1)) c.grad_kl = {0.5f, -2.0f, 1e-3f};
    const bool clamps = pick(random, 0, 1);
    c.p.clamp_low = clamps ? -0.5f : -INFINITY;
    c.p.clamp_high = clamps ? 0.75f : INFINITY;
    c.p.key.seed = 0xFEDCBA9876543210u;
    c.p.stream = 3;
    return c;
}

struct Element {
    const Case& c;
    int64_t sample, index, flat;

    float mean() const { return c.mean.at(flat); }
    float clamped() const {
        const float raised = c.logvar.at(flat) < c.p.clamp_low ? c.p.clamp_low : c.logvar.at(flat);
        return raised > c.p.clamp_high ? c.p.clamp_high : raised;
    }
    float deviation() const { return baseline::exp_any(0.5f * clamped()); }
    float noise() const {
        return c.noise.given() ? c.noise.at(flat) : normal(c.p.key.seed, sample, 0, 3, index);
    }
    float divergence() const {
        return ((mean() * mean() + deviation() * deviation()) - 1.0f) - clamped();
    }
    float grad_mean() const {
        float sum = c.grad_out.given() ? c.grad_out.at(flat) : 0.0f;
        if (!c.grad_kl.empty()) sum = sum + c.grad_kl[sample] * mean();
        return sum;
    }
    float grad_logvar() const {
        float sum = 0.0f;
        if (c.grad_out.given()) sum = 0.5f * (c.grad_out.at(flat) * (deviation() * noise()));
        if (!c.grad_kl.empty())
            sum = sum + (0.5f * c.grad_kl[sample]) * (deviation() * deviation() - 1.0f);
        return clamped() == c.logvar.at(flat) ? sum : 0.0f;
    }
};

// `array` with every element replaced by value(element).
template <typename Value>
Array filled(const Case& c, const Array& array, const Value& value) {
    if (!array.given()) return {};
    Array result = array.copy();
    for (int64_t flat = 0; flat < c.batch() * c.elements(); ++flat)
        result.set(flat, value(Element{c, flat / c.elements(), flat % c.elements(), flat}));
    return result;
}

void add(std::vector<std::pair<Tensor*, const Array*>>& arrays, Tensor& tensor,
         const Array& array) {
    if (array.given()) arrays.emplace_back(&tensor, &array);
}

void check_forward(const Case& c, const CpuKernels& kernels, int threads) {
    const Array right = filled(c, c.out, [](const Element& element) {
        return element.mean() + element.deviation() * element.noise();
    });
    ReparameterizeParams p = c.p;
    const Array out = c.out.given() ? c.out.copy() : Array();
    std::vector<std::pair<Tensor*, const Array*>> arrays;
    add(arrays, p.out, out);
    add(arrays, p.mean, c.mean);
    add(arrays, p.logvar, c.logvar);
    add(arrays, p.given_noise, c.noise);
    CHECK(lay_out(p.shape, arrays, c.sizes, true, true));
    const int64_t chunks = (c.elements() + kChunk - 1) / kChunk;
    std::vector<float> kl(c.batch()), partials(c.batch() * chunks);
    if (c.divergence) {
        p.kl = kl.data();
        p.partials = partials.data();
    }
    kernels.reparameterize(p, threads);
    if (out.given()) CHECK(same(out, right));
    for (int64_t b = 0; c.divergence && b < c.batch(); ++b) {
        std::vector<float> terms;
        for (int64_t i = 0; i < c.elements(); ++i)
            terms.push_back(Element{c, b, i, b * c.elements() + i}.divergence());
        CHECK(kl[b] == 0.5f * tree_sum(terms));
    }
}

void check_backward(const Case& c, const CpuKernels& kernels, int threads) {
    ReparameterizeParams p = c.p;
    const Array mean = c.grad_mean.copy(), logvar = c.grad_logvar.copy();
    const Array noise = c.grad_noise.given() ? c.grad_noise.copy() : Array();
    std::vector<std::pair<Tensor*, const Array*>> arrays;
    add(arrays, p.mean, c.mean);
    add(arrays, p.logvar, c.logvar);
    add(arrays, p.given_noise, c.noise);
    add(arrays, p.grad_out, c.grad_out);
    add(arrays, p.grad_mean, mean);
    add(arrays, p.grad_logvar, logvar);
    add(arrays, p.grad_noise, noise);
    CHECK(lay_out(p.shape, arrays, c.sizes, true, true));
    if (!c.grad_kl.empty()) p.grad_kl = c.grad_kl.data();
    kernels.reparameterize_backward(p, threads);
    CHECK(same(mean, filled(c, mean, [](const Element& e) { return e.grad_mean(); })));
    CHECK(same(logvar, filled(c, logvar, [](const Element& e) { return e.grad_logvar(); })));
    if (noise.given())
        CHECK(same(noise, filled(c, noise, [](const Element& e) {
                       return e.c.grad_out.at(e.flat) * e.deviation();
                   })));
}

TEST(reparameterize_gives_the_bits_of_the_formula_forward_and_backward) {
    Random random(21);
    for (int trial = 0; trial < 60; ++trial) {
        const Case c = any_case(random);
        for_each_isa([&](const CpuKernels& kernels) {
            for (int threads : {1, 3}) {
                check_forward(c, kernels, threads);
                check_backward(c, kernels, threads);
            }
        });
    }
}

// More than kChunk chunks, so that the tree has three levels; beyond what a tile of 1024 divides.
TEST(the_divergence_of_a_large_sample_follows_the_tree) {
    const int64_t n = kChunk * kChunk + 5 * kChunk + 77, chunks = (n + kChunk - 1) / kChunk;
    std::vector<float> mean(n), logvar(n, 0.0f), partials(chunks), terms(n);
    for (int64_t i = 0; i < n; ++i) {
        mean[i] = float(i % 613) * 0x1p-9f;
        terms[i] = ((mean[i] * mean[i] + 1.0f) - 1.0f) - 0.0f;
    }
    const float right = 0.5f * tree_sum(terms);
    float kl;
    ReparameterizeParams p{};
    p.shape = {1, n, 1, {n}};
    p.mean = {mean.data(), kFloat32, n, {1}};
    p.logvar = {logvar.data(), kFloat32, n, {1}};
    p.clamp_low = -INFINITY;
    p.clamp_high = INFINITY;
    p.kl = &kl;
    p.partials = partials.data();
    for_each_isa([&](const CpuKernels& kernels) {
        kernels.reparameterize(p, 2);
        CHECK(kl == right);
    });
}

}  // namespace
}  // namespace fastgen::testing

// The parts of a transposed convolution: the matrix product, the fold and the epilogue.
#include <math.h>

#include <algorithm>

#include "math/activation.h"
#include "testing.h"

namespace fastgen::testing {
namespace {

std::vector<float> ordinary(int64_t count, Random& random) {
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (float& value : values) value = normal(random);
    return values;
}

float finish(const Epilogue& e, int64_t channel, float v) {
    if (e.bias) v = v + e.bias[channel];
    if (e.scale) v = v * e.scale[channel];
    if (e.shift) v = v + e.shift[channel];
    switch (e.activation) {
        case kIdentity:
            return v;
        case kRelu:
            return v < 0 ? 0 : v;
        case kLeakyRelu:
            return v < 0 ? v * e.negative_slope : v;
        case kTanh:
            return baseline::tanh_any(v);
        case kSigmoid:
            return baseline::sigmoid(v);
        case kSilu:
            return baseline::silu(v);
        case kGelu:
            return baseline::gelu(v);
    }
    return v;
}

struct Coefficients {
    std::vector<float> bias, scale, shift;

    Epilogue epilogue(int64_t channels, Random& random) {
        for (auto* values : {&bias, &scale, &shift})
            if (pick(random, 0, 1)) *values = ordinary(channels, random);
        auto pointer = [](const std::vector<float>& v) { return v.empty() ? nullptr : v.data(); };
        return {pointer(bias), pointer(scale), pointer(shift), Activation(pick(random, 0, 6)),
                0.2f};
    }
};

TEST(the_matrix_product_is_the_same_on_every_instruction_set_and_close_to_double) {
    Random random(23);
    for (int trial = 0; trial < 40; ++trial) {
        ProductParams p{};
        p.batch = pick(random, 1, 3);
        p.depth = pick(random, 1, 150);
        p.rows = pick(random, 1, 200);
        p.columns = trial % 4 ? 16 * pick(random, 1, 20) : 1;
        const auto weight = ordinary(p.depth * p.rows, random);
        const auto input = ordinary(p.batch * p.depth * p.columns, random);
        p.weight = weight.data();
        p.input = input.data();
        std::vector<float> first;
        for_each_isa([&](const CpuKernels& kernels) {
            for (int threads : {1, 3}) {
                std::vector<float> out(p.batch * p.rows * p.columns, NAN);
                p.out = out.data();
                kernels.conv_transpose_product(p, threads);
                if (first.empty()) first = out;
                CHECK(out == first);
            }
        });
        for (int64_t i = 0; i < int64_t(first.size()); ++i) {
            const int64_t n = i % p.columns, r = i / p.columns % p.rows, b = i / p.columns / p.rows;
            double sum = 0, size = 0;
            for (int64_t k = 0; k < p.depth; ++k) {
                const double product =
                    double(weight[k * p.rows + r]) * input[(b * p.depth + k) * p.columns + n];
                sum += product;
                size += fabs(product);
            }
            CHECK(fabs(first[i] - sum) <= 1e-6 * size);
        }
    }
}

struct Fold {
    FoldParams p{};
    Coefficients coefficients;
    std::vector<float> columns;
    Array out;
};

Fold any_fold(Random& random) {
    Fold fold;
    FoldParams& p = fold.p;
    p.batch = pick(random, 1, 2);
    p.channels = pick(random, 1, 20);
    int64_t inputs = 1, taps = 1;
    const int64_t dims = pick(random, 1, 3);
    for (int64_t dim = 0; dim < 3; ++dim) {
        const bool used = dim >= 3 - dims;
        do {
            p.in_size[dim] = used ? pick(random, 1, dims == 1 ? 400 : 6) : 1;
            p.kernel[dim] = used ? pick(random, 1, 4) : 1;
            p.stride[dim] = used ? pick(random, 1, 3) : 1;
            p.dilation[dim] = used ? pick(random, 1, 2) : 1;
            p.padding[dim] = used ? pick(random, 0, 2) : 0;
            p.out_size[dim] = (p.in_size[dim] - 1) * p.stride[dim] - 2 * p.padding[dim] +
                              p.dilation[dim] * (p.kernel[dim] - 1) + 1 +
                              (used ? pick(random, 0, p.stride[dim] - 1) : 0);
        } while (p.out_size[dim] < 1);
        inputs *= p.in_size[dim];
        taps *= p.kernel[dim];
    }
    p.tap_stride = inputs + pick(random, 0, 3);
    p.channel_stride = taps * p.tap_stride;
    p.sample_stride = p.channels * p.channel_stride + pick(random, 0, 3);
    const int64_t last = (p.batch - 1) * p.sample_stride + (p.channels - 1) * p.channel_stride +
                         (taps - 1) * p.tap_stride + inputs;
    fold.columns = ordinary(last, random);
    fold.out = Array({p.batch, p.channels, p.out_size[0], p.out_size[1], p.out_size[2]},
                     any_dtype(random), any_layout(random, true), random);
    p.epilogue = fold.coefficients.epilogue(p.channels, random);
    return fold;
}

// One output element: the taps that reach it, in the order of k.
float folded(const Fold& fold, int64_t b, int64_t c, const int64_t (&o)[3]) {
    const FoldParams& p = fold.p;
    float sum = 0;
    int64_t k[3];
    for (k[0] = 0; k[0] < p.kernel[0]; ++k[0])
        for (k[1] = 0; k[1] < p.kernel[1]; ++k[1])
            for (k[2] = 0; k[2] < p.kernel[2]; ++k[2]) {
                int64_t tap = 0, position = 0;
                bool reaches = true;
                for (int dim = 0; dim < 3; ++dim) {
                    const int64_t reach = o[dim] + p.padding[dim] - k[dim] * p.dilation[dim];
                    const int64_t i = reach / p.stride[dim];
                    reaches &= reach >= 0 && reach % p.stride[dim] == 0 && i < p.in_size[dim];
                    tap = tap * p.kernel[dim] + k[dim];
                    position = position * p.in_size[dim] + i;
                }
                if (reaches)
                    sum = sum + fold.columns[b * p.sample_stride + c * p.channel_stride +
                                             tap * p.tap_stride + position];
            }
    return finish(p.epilogue, c, sum);
}

TEST(the_fold_gathers_every_tap_in_order_into_any_layout) {
    Random random(24);
    for (int trial = 0; trial < 120; ++trial) {
        Fold fold = any_fold(random);
        FoldParams& p = fold.p;
        Array right = fold.out.copy();
        int64_t index = 0, o[3];
        for (int64_t b = 0; b < p.batch; ++b)
            for (int64_t c = 0; c < p.channels; ++c)
                for (o[0] = 0; o[0] < p.out_size[0]; ++o[0])
                    for (o[1] = 0; o[1] < p.out_size[1]; ++o[1])
                        for (o[2] = 0; o[2] < p.out_size[2]; ++o[2])
                            right.set(index++, folded(fold, b, c, o));
        for_each_isa([&](const CpuKernels& kernels) {
            for (int threads : {1, 3}) {
                const Array out = fold.out.copy();
                p.columns = fold.columns.data();
                p.out = {out.data(), out.dtype(), out.strides()[0], {}};
                std::copy(out.strides().begin() + 1, out.strides().end(), p.out.stride);
                kernels.conv_transpose_fold(p, threads);
                CHECK(same(out, right));
            }
        });
    }
}

TEST(the_epilogue_alone_has_the_bits_of_its_formula_in_place_too) {
    Random random(25);
    for (int trial = 0; trial < 60; ++trial) {
        const int64_t outer = pick(random, 1, 9), channels = pick(random, 1, 70);
        const int64_t inner = trial % 3 ? pick(random, 2, 1500) : 1;
        const Sizes sizes = {outer, channels, inner};
        const Array in(sizes, any_dtype(random), Array::Layout::kContiguous, random);
        const bool in_place = pick(random, 0, 1);
        const DType dtype = in_place ? in.dtype() : any_dtype(random);
        const Array out(sizes, dtype, Array::Layout::kContiguous, random);
        Coefficients coefficients;
        const Epilogue epilogue = coefficients.epilogue(channels, random);
        Array right = out.copy();
        for (int64_t i = 0; i < in.elements(); ++i)
            right.set(i, finish(epilogue, i / inner % channels, in.at(i)));
        for_each_isa([&](const CpuKernels& kernels) {
            for (int threads : {1, 3}) {
                const Array to = in_place ? in.copy() : out.copy();
                const Array& from = in_place ? to : in;
                ChannelEpilogueParams p{};
                p.in = {from.data(), from.dtype(), 0, {}};
                p.out = {to.data(), to.dtype(), 0, {}};
                p.outer = outer;
                p.channels = channels;
                p.inner = inner;
                p.epilogue = epilogue;
                kernels.channel_epilogue(p, threads);
                CHECK(same(to, right));
            }
        });
    }
}

}  // namespace
}  // namespace fastgen::testing

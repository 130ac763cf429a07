// The parts of a transposed convolution: the matrix product, the fold and the epilogue.
#include <math.h>

#include <algorithm>

#include "cpu/phases.h"
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

ConvTransposeGeometry any_geometry(Random& random) {
    ConvTransposeGeometry g{};
    g.groups = pick(random, 0, 3) ? 1 : pick(random, 2, 3);
    g.in_channels = pick(random, 1, pick(random, 0, 1) ? 8 : 80);
    g.out_channels = pick(random, 1, pick(random, 0, 1) ? 5 : 70);
    const int64_t dims = pick(random, 1, 3);
    const bool patches = dims == 2 && !pick(random, 0, 3);  // winograd.h
    if (patches) {
        g.in_channels = pick(random, 128, 140);
        g.out_channels = pick(random, 32, 70);
    }
    for (int64_t dim = 0; dim < 3; ++dim) {
        const bool used = dim >= 3 - dims;
        do {
            const int64_t most = dims == 1 ? 600 : dims == 3 ? 5 : patches ? 11 : 20;
            g.in_size[dim] = used ? pick(random, patches ? 7 : 1, most) : 1;
            g.kernel[dim] = used ? patches ? 4 : pick(random, 1, 5) : 1;
            g.stride[dim] = used ? patches ? 2 : pick(random, 1, 4) : 1;
            g.dilation[dim] = used && !patches ? pick(random, 1, 2) : 1;
            g.padding[dim] = used ? pick(random, 0, 2) : 0;
            g.out_size[dim] = (g.in_size[dim] - 1) * g.stride[dim] - 2 * g.padding[dim] +
                              g.dilation[dim] * (g.kernel[dim] - 1) + 1 +
                              (used ? pick(random, 0, g.stride[dim] - 1) : 0);
        } while (g.out_size[dim] < 1);
    }
    return g;
}

// One output element before its epilogue, and the sum of its terms' sizes.
void summed(const ConvTransposeGeometry& g, const Array& in, const Array& weight, int64_t b,
            int64_t c, const int64_t (&o)[3], double& sum, double& size) {
    sum = size = 0;
    int64_t k[3];
    for (k[0] = 0; k[0] < g.kernel[0]; ++k[0])
        for (k[1] = 0; k[1] < g.kernel[1]; ++k[1])
            for (k[2] = 0; k[2] < g.kernel[2]; ++k[2]) {
                int64_t tap = 0, position = 0;
                bool reaches = true;
                for (int dim = 0; dim < 3; ++dim) {
                    const int64_t reach = o[dim] + g.padding[dim] - k[dim] * g.dilation[dim];
                    const int64_t i = reach / g.stride[dim];
                    reaches &= reach >= 0 && reach % g.stride[dim] == 0 && i < g.in_size[dim];
                    tap = tap * g.kernel[dim] + k[dim];
                    position = position * g.in_size[dim] + i;
                }
                if (!reaches) continue;
                const int64_t positions = g.in_size[0] * g.in_size[1] * g.in_size[2];
                const int64_t taps = g.kernel[0] * g.kernel[1] * g.kernel[2];
                const int64_t group = c / g.out_channels, own = c % g.out_channels;
                for (int64_t i = 0; i < g.in_channels; ++i) {
                    const int64_t channel = group * g.in_channels + i;
                    const double product =
                        double(in.at((b * g.groups * g.in_channels + channel) * positions +
                                     position)) *
                        weight.at((channel * g.out_channels + own) * taps + tap);
                    sum += product;
                    size += fabs(product);
                }
            }
}

TEST(a_product_by_phases_is_close_to_double_whatever_the_threads_and_the_batch) {
    Random random(23);
    for (int trial = 0; trial < 100; ++trial) {
        ConvTransposeGeometry g = any_geometry(random);
        const int64_t batch = pick(random, 1, 3), channels = g.groups * g.out_channels;
        const DType dtype = any_dtype(random);
        Array in({batch, g.groups * g.in_channels, g.in_size[0], g.in_size[1], g.in_size[2]}, dtype,
                 any_layout(random, false), random);
        Array weight(
            {g.groups * g.in_channels, g.out_channels, g.kernel[0], g.kernel[1], g.kernel[2]},
            dtype, any_layout(random, false), random);
        const Array out({batch, channels, g.out_size[0], g.out_size[1], g.out_size[2]}, dtype,
                        any_layout(random, true), random);
        in.fill_ordinary(random);
        weight.fill_ordinary(random);
        g.planar = pick(random, 0, 1);
        std::vector<double> sums, sizes;
        int64_t o[3];
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t c = 0; c < channels; ++c)
                for (o[0] = 0; o[0] < g.out_size[0]; ++o[0])
                    for (o[1] = 0; o[1] < g.out_size[1]; ++o[1])
                        for (o[2] = 0; o[2] < g.out_size[2]; ++o[2]) {
                            sums.emplace_back();
                            sizes.emplace_back();
                            summed(g, in, weight, b, c, o, sums.back(), sizes.back());
                        }
        const double unit = dtype == kFloat32 ? 0 : dtype == kBFloat16 ? 0x1p-8 : 0x1p-11;
        for_each_product([&](const CpuKernels& kernels) {
            const Phases phases =
                phases_of(g, dtype == kBFloat16 ? *kernels.multiplier_bf16 : *kernels.multiplier);
            const int64_t bytes = g.groups * phases.weights *
                                  (phases.multiplier->operands == Operands::kFloats ? 4 : 2);
            std::vector<char> packed(bytes);
            PackParams pack{{weight.data(), dtype, 0, {}}, packed.data(), &phases};
            std::copy(weight.strides().begin(), weight.strides().end(), pack.weight.stride);
            kernels.conv_transpose_pack(pack, 2);
            std::vector<Array> results;
            for (int threads : {1, 3})
                for (int64_t samples : {batch, int64_t{1}}) {
                    results.push_back(out.copy());
                    const Array& to = results.back();
                    ConvTransposeParams p{};
                    p.in = {in.data(), dtype, in.strides()[0], {}};
                    p.out = {to.data(), dtype, to.strides()[0], {}};
                    std::copy(in.strides().begin() + 1, in.strides().end(), p.in.stride);
                    std::copy(to.strides().begin() + 1, to.strides().end(), p.out.stride);
                    p.weight = packed.data();
                    p.batch = samples;
                    p.phases = &phases;
                    kernels.conv_transpose(p, threads);
                }
            const int64_t count = sums.size(), sample = count / batch;
            for (int64_t i = 0; i < count; ++i) {
                const float made = results[0].at(i);
                CHECK(fabs(made - sums[i]) <= 2e-6 * sizes[i] + unit * fabs(sums[i]) + 1e-7);
                CHECK(results[2].at(i) == made);
                CHECK(i >= sample || (results[1].at(i) == made && results[3].at(i) == made));
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

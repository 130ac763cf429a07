// How a direct transposed convolution is cut, and which kernel of conv_transpose.cuh runs it.
#include <numeric>

#include "conv_transpose.cuh"
#include "launch.h"

namespace fastgen::cuda {
namespace {

constexpr int64_t kShared = 48 << 10;         // bytes that every GPU gives a block unasked
constexpr int64_t kLargest = 1 << 30;         // coordinates have 32 bits
constexpr int64_t kThreadsToFill = 64 << 10;  // a large GPU to half, as 256 blocks

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

Quotient quotient_of(int64_t size) {
    Quotient by{uint32_t(size), 0, 0};
    while ((int64_t{1} << by.shift) < size) ++by.shift;
    const uint64_t excess = (uint64_t{1} << by.shift) - size;
    by.multiplier = uint32_t((excess << 32) / size + 1);
    return by;
}

// Of a modulo m, which have no common divisor: Euclid's algorithm.
int64_t inverse_of(int64_t a, int64_t m) {
    int64_t rest = m, last = a % m, of_rest = 0, of_last = 1;
    while (last > 1) {
        const int64_t times = rest / last, next = rest - times * last;
        const int64_t of_next = of_rest - times * of_last;
        rest = last, last = next, of_rest = of_last, of_last = of_next;
    }
    return m == 1 ? 1 : (of_last + m) % m;
}

// No further than the kernel goes: beyond it there is no tap.
int64_t tap_step(const Axis& axis) {
    return int64_t{axis.step.size} < axis.kernel ? axis.step.size : axis.kernel;
}

Axis axis_of(const DirectConvTransposeParams& p, int dim) {
    const ConvTransposeGeometry& g = p.geometry;
    const int64_t common = std::gcd(g.stride[dim], g.dilation[dim]);
    const int64_t step = g.stride[dim] / common, back = g.dilation[dim] / common;
    Axis axis{};
    axis.in = int32_t(g.in_size[dim]);
    axis.kernel = int32_t(g.kernel[dim]);
    axis.padding = int32_t(g.padding[dim]);
    axis.dilation = int32_t(g.dilation[dim]);
    axis.inverse = uint32_t(inverse_of(back, step));
    axis.stride = quotient_of(g.stride[dim]);
    axis.common = quotient_of(common);
    axis.step = quotient_of(step);
    axis.back = quotient_of(back);
    axis.step_of_products = divider_of(step);
    axis.in_step = back * p.in.stride[1 + dim];
    axis.weight_stride = p.weight.stride[2 + dim];
    axis.weight_step = tap_step(axis) * axis.weight_stride;
    return axis;
}

// Whether 16 bytes can be read at any position of the input, of channels of one group.
bool reads_16_bytes(const DirectConvTransposeParams& p) {
    const int64_t bytes = p.in.dtype == kFloat32 ? 4 : 2;
    bool aligned = p.in.stride[0] == 1 && p.geometry.in_channels * bytes % 16 == 0;
    aligned &= reinterpret_cast<uintptr_t>(p.in.data) % 16 == 0;
    aligned &= p.batch == 1 || p.in.batch_stride * bytes % 16 == 0;
    for (int dim = 0; dim < 3; ++dim)
        aligned &= p.geometry.in_size[dim] == 1 || p.in.stride[1 + dim] * bytes % 16 == 0;
    return aligned && p.geometry.in_channels >= 8;
}

// Lanes run along columns where channels lie closer together than positions: then x and out are
// read and written side by side; else along positions.
bool channels_are_closer(const DirectConvTransposeParams& p) {
    const Tensor& tensor = p.geometry.in_size[2] > 1 ? p.in : p.out;
    return tensor.stride[0] < tensor.stride[3];
}

struct Plan {
    Cut cut{};
    int64_t positions = 1, taps = 1;
    int64_t phases = 1;     // classes of positions, each with taps of its own
    int channels, samples;  // of a thread
    bool vector, staged;
    size_t bytes;  // of shared memory
    dim3 grid, block;
};

// What a block stages: the weights of all input channels if they fit, else of ever fewer, and at
// last of fewer columns. False where nothing fits or nothing is gained: staged for every item anew,
// weights cost a thread weights / rows loads, and it has weights / phases products a sample; more
// than half of them are too many.
bool plan_staging(Plan& plan, const DirectConvTransposeParams& p) {
    Cut& cut = plan.cut;
    const int64_t all = p.geometry.in_channels, padding = padded(plan.channels);
    const int64_t width = !plan.vector ? 1 : p.in.dtype == kFloat32 ? 4 : 8;
    const int64_t unit = plan.vector ? 4 : padding;
    int64_t chunk = all;
    // Odd in units: the weights of neighbouring columns begin in different banks.
    const auto line = [&] { return unit * (ceil_div(chunk * padding, unit) | 1); };
    while ((plan.taps * line() * int64_t{sizeof(float)} << cut.lane_bits) > kShared) {
        if (chunk > 8 || (chunk > width && cut.lane_bits == 0))
            chunk = ceil_div(ceil_div(chunk, 2), width) * width;
        else if (cut.lane_bits-- == 0)
            return false;
    }
    cut.line = int32_t(line());
    cut.chunk = quotient_of(chunk);
    return chunk == all || 2 * plan.phases <= (kThreads >> cut.lane_bits) * plan.samples;
}

// As several samples do, several columns of a thread share their taps.
void plan_slabs(Plan& plan, const DirectConvTransposeParams& p) {
    const ConvTransposeGeometry& g = p.geometry;
    Cut& cut = plan.cut;
    const int64_t lanes = int64_t{1} << cut.lane_bits;
    const int64_t bytes = plan.staged ? plan.taps * cut.line * int64_t{sizeof(float)} * lanes : 0;
    int64_t turns = cut.chunk.size < g.in_channels ? 1 : 8;
    while (turns > 1 && (turns * lanes >= 2 * cut.all_columns || turns * bytes > kShared / 2 ||
                         cut.items * cut.all_columns < turns * kThreadsToFill))
        turns /= 2;
    plan.bytes = size_t(turns * bytes);
    cut.columns = int32_t(turns * lanes);
    cut.slabs = int32_t(ceil_div(cut.all_columns, cut.columns));
    cut.taps = quotient_of(plan.taps);
    cut.kernel_height = quotient_of(g.kernel[1]);
    cut.kernel_width = quotient_of(g.kernel[2]);
    cut.positions = divider_of(plan.positions);
    cut.height = divider_of(g.out_size[1]);
    cut.width = divider_of(g.out_size[2]);
    cut.out_positions = plan.positions;
    cut.out_height = g.out_size[1];
    cut.out_width = g.out_size[2];
    for (int dim = 2, behind = cut.columns * cut.line; plan.staged && dim >= 0; --dim) {
        cut.axis[dim].weight_stride = behind;
        cut.axis[dim].weight_step = behind * tap_step(cut.axis[dim]);
        behind *= int(g.kernel[dim]);
    }
}

void plan_grid(Plan& plan) {
    const Cut& cut = plan.cut;
    const int64_t lanes = int64_t{1} << cut.lane_bits;
    const int64_t threads = ceil_div(cut.items * lanes, kWarp) * kWarp;
    plan.block = dim3(unsigned(threads < kThreads ? threads : kThreads));
    const int64_t rows = plan.block.x / lanes, blocks = ceil_div(cut.items, rows);
    // Staging a weight takes some sixty instructions: where it is done once, it is done for so many
    // items that their products outweigh it.
    const int64_t wanted = ceil_div(128 * plan.phases, rows * plan.samples);
    const int64_t most = blocks * cut.slabs / (kThreadsToFill / kThreads);
    const bool once = plan.staged && int64_t{cut.chunk.size} == cut.in_channels;
    const int64_t a_block = !once || most < 1 ? 1 : wanted < most ? wanted : most;
    const int64_t columns = ceil_div(blocks, a_block);
    plan.grid = dim3(unsigned(columns < INT32_MAX ? columns : INT32_MAX),
                     unsigned(cut.slabs < kMaxGridRows ? cut.slabs : kMaxGridRows));
}

Plan plan_of(const DirectConvTransposeParams& p, bool staged) {
    const ConvTransposeGeometry& g = p.geometry;
    Plan plan{};
    Cut& cut = plan.cut;
    for (int dim = 2; dim >= 0; --dim) {
        cut.axis[dim] = axis_of(p, dim);
        plan.positions *= g.out_size[dim];
        if (plan.phases < kLargest) plan.phases *= g.stride[dim];
        plan.taps *= g.kernel[dim];
    }
    const int64_t tiles = staged ? ceil_div(g.out_channels, 4) : g.out_channels;
    plan.channels = int(ceil_div(g.out_channels, tiles));
    plan.vector = staged && reads_16_bytes(p);
    cut.tiles = quotient_of(tiles);
    cut.all_columns = int32_t(g.groups * tiles);
    while (channels_are_closer(p) && cut.lane_bits < 5 && 1 << cut.lane_bits < cut.all_columns)
        ++cut.lane_bits;
    // Several samples share their taps and the weights read, where enough threads remain.
    const int several = !staged || plan.vector ? 1 : plan.channels == 1 ? 4 : 2;
    const int64_t columns_of_samples = p.batch * plan.positions * cut.all_columns;
    const bool many = p.batch >= several && columns_of_samples >= several * kThreadsToFill;
    plan.samples = many ? several : 1;
    cut.items = ceil_div(p.batch, plan.samples) * plan.positions;
    cut.in_channels = int32_t(g.in_channels);
    cut.out_channels = int32_t(g.out_channels);
    cut.chunk = quotient_of(g.in_channels);
    plan.staged = staged && plan_staging(plan, p);
    if (staged && !plan.staged) return plan_of(p, false);
    plan_slabs(plan, p);
    plan_grid(plan);
    return plan;
}

bool has_32_bit_coordinates(const ConvTransposeGeometry& g) {
    int64_t taps = 1;
    bool fits = g.groups * g.in_channels <= kLargest && g.groups * g.out_channels <= kLargest;
    for (int dim = 0; dim < 3; ++dim) {
        fits &= g.in_size[dim] <= kLargest && g.out_size[dim] + g.padding[dim] <= kLargest;
        fits &= g.stride[dim] <= kLargest && g.dilation[dim] <= kLargest;
        fits &= g.kernel[dim] <= kLargest && taps * g.kernel[dim] <= kLargest;
        fits &= (g.kernel[dim] - 1) * g.dilation[dim] <= kLargest;
        taps *= g.kernel[dim];
    }
    return fits;
}

template <typename Element, int kChannels, int kSamples, bool kVector, bool kStaged>
int run(const DirectConvTransposeParams& p, const Plan& plan, void* stream) {
    return launch_sharing(plan.bytes,
                          conv_transpose_kernel<Element, kChannels, kSamples, kVector, kStaged>,
                          plan.grid, plan.block, stream, p, plan.cut);
}

template <typename Element, int kChannels>
int run(const DirectConvTransposeParams& p, const Plan& plan, void* stream) {
    if (plan.vector) return run<Element, kChannels, 1, true, true>(p, plan, stream);
    if (plan.samples == 1) return run<Element, kChannels, 1, false, true>(p, plan, stream);
    return run<Element, kChannels, kChannels == 1 ? 4 : 2, false, true>(p, plan, stream);
}

template <typename Element>
int run(const DirectConvTransposeParams& p, void* stream) {
    const Plan plan = plan_of(p, true);
    if (!plan.staged) return run<Element, 1, 1, false, false>(p, plan, stream);
    switch (plan.channels) {
        case 1:
            return run<Element, 1>(p, plan, stream);
        case 2:
            return run<Element, 2>(p, plan, stream);
        case 3:
            return run<Element, 3>(p, plan, stream);
        default:
            return run<Element, 4>(p, plan, stream);
    }
}

}  // namespace

int conv_transpose(const DirectConvTransposeParams& p, void* stream) {
    if (p.batch <= 0) return cudaSuccess;
    if (!has_32_bit_coordinates(p.geometry)) return cudaErrorInvalidValue;
    switch (p.in.dtype) {
        case kFloat32:
            return run<float>(p, stream);
        case kBFloat16:
            return run<bfloat16>(p, stream);
        default:
            return run<float16>(p, stream);
    }
}

}  // namespace fastgen::cuda

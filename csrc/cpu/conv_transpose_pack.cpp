// The weights of a transposed convolution in the order that its tile products read (multiply.h).
#include "buffer.h"
#include "kernels.h"
#include "phases.h"
#include "tile.h"

namespace fastgen::FASTGEN_ISA {
namespace {

FASTGEN_INLINE uint16_t bfloat_bits(float value) {
    bfloat16 rounded;
    from_float(value, rounded);
    return rounded.bits;
}

// The weights of a patch's matrix (winograd.h) from those of the taps, which are as the offsets
// are: the higher of two first. Matrices are (row, column, tap of the depth).
template <typename Tap>
FASTGEN_INLINE float of_patch(int64_t matrix, int64_t taps_deep, const Tap& of_tap) {
    const int64_t deep = matrix % taps_deep, i = matrix / taps_deep / 3, j = matrix / taps_deep % 3;
    double sum = 0.0;  // rounded once
    for (int64_t row = 0; row < 2; ++row)
        for (int64_t column = 0; column < 2; ++column)
            if (i != 2 * row && j != 2 * column)
                sum += double(of_tap((deep * 2 + row) * 2 + column));
    return float(sum);
}

// One panel: `span` columns of a product's weights, or rows, from the n-th on.
template <typename Element>
void pack_panel(const PackParams& p, const Multiplier& m, const Phases& phases,
                const Product& product, int64_t group, int64_t n, int span, char* to) {
    const ConvTransposeGeometry& g = phases.geometry;
    const int64_t* stride = p.weight.stride;
    const int64_t taps = product.offsets.size(), all = outputs_of(phases, product);
    Buffer room;
    int64_t* places = room.of_type<int64_t>(span * taps);  // -1: none
    for (int j = 0; j < span; ++j)
        for (int64_t tap = 0; tap < taps; ++tap) {
            int64_t& place = places[tap * span + j];
            place = -1;
            if (n + j >= all) continue;
            const Output output = output_of(phases, product, n + j);
            const int64_t k = product.taps[output.phase * taps + tap];
            place = output.channel * stride[1] + k / (g.kernel[1] * g.kernel[2]) * stride[2] +
                    k / g.kernel[2] % g.kernel[1] * stride[3] + k % g.kernel[2] * stride[4];
        }
    const bool rows = phases.order == Order::kRows;
    const int64_t matrices = matrices_of(phases, product);
    const Element* weight = static_cast<const Element*>(p.weight.data);
    for (int64_t c = 0; c < phases.depth; ++c) {
        const bool there = c < g.in_channels;
        const Element* from = weight + (group * g.in_channels + c) * stride[0];
        for (int64_t matrix = 0; matrix < matrices; ++matrix) {
            const int64_t k = matrix * phases.depth + c;
            for (int j = 0; j < span; ++j) {
                const auto of_tap = [&](int64_t tap) {
                    const int64_t place = places[tap * span + j];
                    return there && place >= 0 ? to_float(from[place]) : 0.0f;
                };
                const float value =
                    phases.patches ? of_patch(matrix, taps / 4, of_tap) : of_tap(matrix);
                if (m.operands == Operands::kFloats) {
                    reinterpret_cast<float*>(to)[k * span + j] = value;
                    continue;
                }
                int64_t at = (k / 2 * span + j) * 2 + k % 2;
                if (m.operands == Operands::kTiles) {
                    const int64_t tile = k / 32 * (span / 16) + j / 16;
                    at = tile * 512 +
                         (rows ? j % 16 * 32 + k % 32 : k % 32 / 2 * 32 + j % 16 * 2 + k % 2);
                }
                reinterpret_cast<uint16_t*>(to)[at] = bfloat_bits(value);
            }
        }
    }
}

}  // namespace

void conv_transpose_pack(const PackParams& p, int threads) {
    const Phases& phases = *p.phases;
    const Multiplier& m = *phases.multiplier;
    const int64_t size = m.operands == Operands::kFloats ? 4 : 2;
    for (int64_t group = 0; group < phases.geometry.groups; ++group)
        for (const Product& product : phases.products) {
            const int64_t count = padded_outputs(phases, product);
            const int64_t depth = matrices_of(phases, product) * phases.depth;
            const int64_t most = span_of(phases, product);
            char* to =
                static_cast<char*>(p.packed) + (group * phases.weights + product.weights) * size;
            parallel_for(panels_of(phases, product), threads, [&](int64_t begin, int64_t end) {
                for (; begin < end; ++begin) {
                    const int64_t n = begin * most;
                    const int span = int(count - n < most ? count - n : most);
                    char* panel = to + n * depth * size;
                    if (p.weight.dtype == kFloat32)
                        pack_panel<float>(p, m, phases, product, group, n, span, panel);
                    else if (p.weight.dtype == kBFloat16)
                        pack_panel<bfloat16>(p, m, phases, product, group, n, span, panel);
                    else
                        pack_panel<float16>(p, m, phases, product, group, n, span, panel);
                }
            });
        }
}

}  // namespace fastgen::FASTGEN_ISA

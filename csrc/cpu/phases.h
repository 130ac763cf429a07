// A transposed convolution as matrix products without a zero tap. Dumoulin & Visin, "A guide to
// convolution arithmetic for deep learning" (2016), chapter 4.
//
// In one dim the output o = s Q + R - p, 0 <= R < s, reads the taps k with R - k d = s offset, at
// the inputs Q + offset. The outputs of one R (one for each dim) are a phase: a product over the
// taps and input channels, for every Q. Phases that read the same inputs may share a product, with
// as many columns as they have channels together.
#pragma once

#include <array>
#include <vector>

#include "../params.h"
#include "multiply.h"

namespace fastgen {

using Coordinates = std::array<int64_t, 3>;  // depth, height, width

struct Product {
    std::vector<Coordinates> offsets;  // of the taps
    std::vector<Coordinates> shifts;   // of the phases: o = stride Q + shift
    std::vector<int64_t> taps;         // by phase and tap, as the weight counts them
    int across;                        // phases that alternate along a row of the output
    Coordinates low, count;            // Q
    int64_t weights;                   // where its weights begin, in elements

    int64_t positions() const { return count[0] * count[1] * count[2]; }
};

// Where the weights lie in a product: its columns are output channels, phase by phase, or phases,
// channel by channel; or its rows are, which the positions of a planar output are the columns of.
enum class Order { kChannelsInner, kPhasesInner, kRows };

struct Phases {
    ConvTransposeGeometry geometry;
    const Multiplier* multiplier;
    std::vector<Product> products;
    Order order;
    bool patches;     // by winograd.h
    int64_t depth;    // of a tap: the input channels of a group, rounded up
    int64_t weights;  // elements of a group
    uint64_t digest;  // equal where the weights are packed alike
};

Phases phases_of(const ConvTransposeGeometry& geometry, const Multiplier& multiplier);

// Matrices of weights that a product has: of its taps, or of patches, of which nine stand for four.
int64_t matrices_of(const Phases& phases, const Product& product);

// Products of one sample's inputs and weights, the zeros of their padding included.
double multiplications(const Phases& phases);

// Columns of the panels of a product, the last of which may be half a panel.
int64_t padded_columns(int64_t columns, const Multiplier& multiplier);

// Outputs of a position, of how many the weights of a panel are, how many of them the panels hold,
// the last of which may be smaller, and how many panels there are.
int64_t outputs_of(const Phases& phases, const Product& product);
int span_of(const Phases& phases, const Product& product);
int64_t padded_outputs(const Phases& phases, const Product& product);
int64_t panels_of(const Phases& phases, const Product& product);

struct Output {
    int64_t phase, channel;
};

// The n-th of a product's outputs.
inline __attribute__((always_inline)) Output output_of(const Phases& phases, const Product& product,
                                                       int64_t n) {
    const int64_t channels = phases.geometry.out_channels, count = product.shifts.size();
    if (phases.order == Order::kChannelsInner) return {n / channels, n % channels};
    return {n % count, n / count};
}

}  // namespace fastgen

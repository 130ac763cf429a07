#include "phases.h"

namespace fastgen {
namespace {

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }
int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

struct Residue {
    int64_t shift;  // R - p
    std::vector<int64_t> taps;
};

// Residues of one dim that read the same inputs.
struct Class {
    std::vector<int64_t> offsets;
    std::vector<Residue> residues;
    int64_t low = 0, end = 0;  // Q
};

std::vector<Class> classes_of(const ConvTransposeGeometry& g, int dim, bool merged) {
    const int64_t stride = g.stride[dim], out = g.out_size[dim], padding = g.padding[dim];
    std::vector<Class> classes;
    const int64_t count = stride < out ? stride : out;           // of residues with any output
    const int64_t first = (stride - padding % stride) % stride;  // the output whose residue is 0
    for (int64_t i = 0; i < count; ++i) {
        const int64_t o = first < count ? (first + i) % count : i;
        const int64_t R = (o + padding) % stride;
        Class made;
        Residue residue{R - padding, {}};
        for (int64_t k = 0; k < g.kernel[dim]; ++k) {
            const int64_t reach = R - k * g.dilation[dim];
            if (reach % stride != 0) continue;
            residue.taps.push_back(k);
            made.offsets.push_back(reach / stride);
        }
        made.low = ceil_div(-residue.shift, stride);
        made.end = floor_div(out - 1 - residue.shift, stride) + 1;
        Class* same = nullptr;
        for (Class& known : classes)
            if (merged && known.offsets == made.offsets) same = &known;
        if (same) {
            same->low = same->low < made.low ? same->low : made.low;
            same->end = same->end > made.end ? same->end : made.end;
        } else {
            classes.push_back(made);
            same = &classes.back();
        }
        same->residues.push_back(residue);
    }
    return classes;
}

// What packing one position takes, and storing apart what lies side by side, in columns of its
// product.
constexpr double kPacking = 24.0, kApart = 16.0;

constexpr int64_t kLongSum = 3072;

// Patches of two outputs by two pay where they are many, of many channels: there is more to lay out
// and to store, and weights, more than twice as many, come from memory where they are large.
constexpr int64_t kPatchRows = 8, kPatchInputs = 128, kPatchOutputs = 32;
constexpr int64_t kLargeWeights = int64_t{1} << 21, kPatchRowsOfLarge = 16;

bool takes_patches(const ConvTransposeGeometry& g, const Multiplier& multiplier,
                   const std::vector<Class> (&dims)[3][2]) {
    if (multiplier.operands != Operands::kFloats || g.out_channels < kPatchOutputs ||
        g.in_channels < kPatchInputs)
        return false;
    const int64_t weights =
        g.in_channels * g.out_channels * g.kernel[0] * g.kernel[1] * g.kernel[2];
    const int64_t rows = weights > kLargeWeights ? kPatchRowsOfLarge : kPatchRows;
    for (int dim = 1; dim < 3; ++dim)
        for (const Class& c : dims[dim][0])
            if (c.offsets.size() != 2 || c.offsets[0] - c.offsets[1] != 1 || c.end - c.low < rows)
                return false;
    return true;
}

}  // namespace

int64_t padded_columns(int64_t columns, const Multiplier& multiplier) {
    const int64_t half = multiplier.columns / 2;
    return (columns + half - 1) / half * half;
}

int64_t matrices_of(const Phases& phases, const Product& product) {
    const int64_t taps = product.offsets.size();
    return phases.patches ? taps / 4 * 9 : taps;
}

int64_t outputs_of(const Phases& phases, const Product& product) {
    return product.shifts.size() * phases.geometry.out_channels;
}

int span_of(const Phases& phases, const Product& product) {
    const Multiplier& m = *phases.multiplier;
    if (phases.order != Order::kRows) return m.columns;
    if (m.operands == Operands::kTiles) return m.rows;
    // rows of a tile, all of which have as many; phases that alternate are not parted
    const int64_t unit = product.across, rows = outputs_of(phases, product);
    const int64_t most = m.rows / unit * unit;
    const int64_t tiles = (rows + most - 1) / most, each = (rows + tiles - 1) / tiles;
    return int((each + unit - 1) / unit * unit);
}

int64_t padded_outputs(const Phases& phases, const Product& product) {
    const int64_t count = outputs_of(phases, product);
    if (phases.order != Order::kRows) return padded_columns(count, *phases.multiplier);
    if (phases.multiplier->operands == Operands::kTiles) return (count + 15) / 16 * 16;
    return panels_of(phases, product) * span_of(phases, product);
}

int64_t panels_of(const Phases& phases, const Product& product) {
    const int64_t span = span_of(phases, product);
    return (outputs_of(phases, product) + span - 1) / span;
}

double multiplications(const Phases& phases) {
    double total = 0.0;
    for (const Product& product : phases.products)
        total += double(product.positions()) * matrices_of(phases, product) /
                 (phases.patches ? 4 : 1) * phases.depth * outputs_of(phases, product);
    return total * phases.geometry.groups;
}

Phases phases_of(const ConvTransposeGeometry& g, const Multiplier& multiplier) {
    // Merged or not, dim by dim: whichever takes the fewest multiplications.
    std::vector<Class> dims[3][2];
    for (int dim = 0; dim < 3; ++dim)
        for (int merged = 0; merged < 2; ++merged) dims[dim][merged] = classes_of(g, dim, merged);
    const auto for_each = [&](int choice, const auto& visit) {  // of a choice's products
        for (const Class& d : dims[0][choice >> 2])
            for (const Class& h : dims[1][choice >> 1 & 1])
                for (const Class& w : dims[2][choice & 1]) visit(d, h, w);
    };
    int chosen = 0;
    double least = 0.0;
    for (int choice = 0; choice < 8; ++choice) {
        double cost = 0.0;
        for_each(choice, [&](const Class& d, const Class& h, const Class& w) {
            const int64_t phases = d.residues.size() * h.residues.size() * w.residues.size();
            const double taps = double(d.offsets.size()) * h.offsets.size() * w.offsets.size();
            const double positions = double(d.end - d.low) * (h.end - h.low) * (w.end - w.low);
            const bool apart = g.planar && int64_t(w.residues.size()) < g.stride[2];
            cost +=
                taps * positions *
                (padded_columns(phases * g.out_channels, multiplier) + kPacking + apart * kApart);
        });
        if (choice == 0 || cost < least) {
            least = cost;
            chosen = choice;
        }
    }
    Phases phases{};
    phases.geometry = g;
    phases.multiplier = &multiplier;
    phases.patches = takes_patches(g, multiplier, dims);
    if (phases.patches) chosen = 0;  // a product a phase
    // Channels apart: the products as for channels side by side, and single numbers stored, where
    // the sums are long beside it; else the orders whose rows are rows of the output.
    int64_t longest = 0;
    bool interleaved = false;
    for_each(chosen, [&](const Class& d, const Class& h, const Class& w) {
        const int64_t taps = d.offsets.size() * h.offsets.size() * w.offsets.size();
        if (taps * g.in_channels > longest) longest = taps * g.in_channels;
        interleaved |= w.residues.size() > 2;
    });
    phases.order = !g.planar || phases.patches ? Order::kChannelsInner
                   : interleaved               ? Order::kPhasesInner
                   : longest >= kLongSum       ? Order::kChannelsInner
                                               : Order::kRows;
    phases.depth = (g.in_channels + multiplier.depth - 1) / multiplier.depth * multiplier.depth;
    uint64_t digest = 14695981039346656037u;  // Fowler, Noll & Vo's hash
    const auto mix = [&](uint64_t value) { digest = (digest ^ value) * 1099511628211u; };
    for (int64_t value :
         {g.groups, g.in_channels, g.out_channels, g.kernel[0], g.kernel[1], g.kernel[2]})
        mix(value);
    mix(uint64_t(phases.patches) << 24 | uint64_t(multiplier.operands) << 16 |
        uint64_t(phases.order) << 8 | multiplier.columns);
    for_each(chosen, [&](const Class& d, const Class& h, const Class& w) {
        Product product;
        product.low = {d.low, h.low, w.low};
        product.count = {d.end - d.low, h.end - h.low, w.end - w.low};
        product.across = int(w.residues.size());
        for (int64_t i : d.offsets)
            for (int64_t j : h.offsets)
                for (int64_t k : w.offsets) product.offsets.push_back({i, j, k});
        for (const Residue& i : d.residues)
            for (const Residue& j : h.residues)
                for (const Residue& k : w.residues) {
                    product.shifts.push_back({i.shift, j.shift, k.shift});
                    for (int64_t x : i.taps)
                        for (int64_t y : j.taps)
                            for (int64_t z : k.taps)
                                product.taps.push_back((x * g.kernel[1] + y) * g.kernel[2] + z);
                }
        mix(product.shifts.size());
        for (int64_t tap : product.taps) mix(tap);
        product.weights = phases.weights;
        phases.weights +=
            matrices_of(phases, product) * phases.depth * padded_outputs(phases, product);
        phases.products.push_back(std::move(product));
    });
    phases.digest = digest;
    return phases;
}

}  // namespace fastgen

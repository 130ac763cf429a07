#include "cutting.h"

namespace fastgen {
namespace {

constexpr int64_t kBlockBytes = 768 << 10;  // of inputs laid out, which stay in the second cache
constexpr int64_t kPatchBytes = 1 << 20;    // of patches laid out
constexpr int64_t kBandBytes = 192 << 10;   // of a band, whose channels lie on pages of their own
constexpr int64_t kLeastWidth = 4 * kMostColumns;  // of a part of a row
constexpr int64_t kManyTiles = 8;  // of a block, for which its weights are read once
constexpr int64_t kShares = 3;     // tasks a thread at least

// What laying out one position takes, in columns of a product.
constexpr double kLaying = 24.0, kLayingTiles = 64.0;

int64_t pieces(int64_t count, int64_t size) { return (count + size - 1) / size; }

class Cutter {
   public:
    Cutter(const Phases& phases, int64_t batch, int threads)
        : phases_(phases), m_(*phases.multiplier), batch_(batch) {
        const bool rows = phases.order == Order::kRows, tiles = m_.operands == Operands::kTiles;
        made_.most = rows ? m_.columns : m_.rows;
        made_.fixed = rows || tiles;
        set_place(rows ? Place::kChannels : Place::kPositions);
        made_.patches = phases.patches;
        if (made_.patches) {
            cut_patches(threads);
            return;
        }
        cut_bands(threads);
        made_.banded = is_banded();
        if (made_.banded) return;
        if (!tiles) set_place(Place::kChannels);
        cut_exactly(threads);
    }

    const Cutting& made() const { return made_; }

   private:
    void set_place(Place place) {
        const bool floats = m_.operands == Operands::kFloats,
                   positions = place == Place::kPositions;
        made_.place = place;
        made_.word = floats || !positions ? 4 : 2;
        made_.pitch = phases_.depth + 64 / made_.word;  // apart in the sets of a cache
        made_.words = positions ? made_.pitch : floats ? phases_.depth : phases_.depth / 2;
    }

    void cut_bands(int threads) {
        Bands& b = made_.bands;
        bool first = true, reached = false;
        for (const Product& product : phases_.products) {
            for (int dim = 0; dim < 3; ++dim) {
                const int64_t low = product.low[dim], end = low + product.count[dim];
                if (first || low < b.q[dim].low) b.q[dim].low = low;
                if (first || end > b.q[dim].end) b.q[dim].end = end;
            }
            first = false;
            for (const Coordinates& offset : product.offsets) {
                for (int dim = 0; dim < 3; ++dim) {
                    if (!reached || offset[dim] < b.offset[dim].low)
                        b.offset[dim].low = offset[dim];
                    if (!reached || offset[dim] > b.offset[dim].end)
                        b.offset[dim].end = offset[dim];
                }
                reached = true;
            }
        }
        const int64_t size = phases_.geometry.in_size[2];
        b.left = -(b.q[2].low + b.offset[2].low);
        if (b.left < 0) b.left = 0;
        const int64_t right = b.q[2].end - 1 + b.offset[2].end - (size - 1);
        b.row_cells = size + (b.left > right ? b.left : right);
        const int64_t planes = 1 + b.halo(0), all = b.q[1].count();
        const int64_t room = kBandBytes / (made_.words * made_.word + 1);
        b.rows = room / (planes * b.row_cells) - b.halo(1);
        b.width = b.q[2].count();
        const int64_t each = batch_ * phases_.geometry.groups * b.q[0].count();
        const int64_t wanted = threads > 1 ? kShares * threads : 1;
        b.split = b.rows < 1 || (all == 1 && each < wanted);
        if (b.split) {  // not even one, or too few of them: a part of one
            b.rows = 1;
            int64_t fits = room / (planes * (1 + b.halo(1))) - b.halo(2);
            const int64_t share = pieces(b.q[2].count(), pieces(wanted, each * all));
            if (fits > share) fits = share;
            b.width = fits < kLeastWidth ? kLeastWidth : fits;
            if (b.width > b.q[2].count()) b.width = b.q[2].count();
            b.left = 0;
            b.row_cells = b.width + b.halo(2);
        }
        if (b.rows > all) b.rows = all;
        while (each * pieces(all, b.rows) < wanted && b.rows >= 16) b.rows = (b.rows + 1) / 2;
        b.down = pieces(all, b.rows);
        b.rows = pieces(all, b.down);
        b.across = pieces(b.q[2].count(), b.width);
        made_.tasks = each * b.down * b.across;
        int64_t most_panels = 1;
        for (const Product& product : phases_.products)
            if (panels_of(phases_, product) > most_panels)
                most_panels = panels_of(phases_, product);
        b.parts = pieces(wanted, made_.tasks);
        if (b.parts > most_panels) b.parts = most_panels;
        made_.tasks *= b.parts;
    }

    bool is_banded() const {
        double banded = 0.0, exact = 0.0;
        const double laying = m_.operands == Operands::kTiles ? kLayingTiles : kLaying;
        for (const Product& product : phases_.products) {
            const double depth = double(product.offsets.size()) * phases_.depth;
            const double columns = double(panels_of(phases_, product)) * span_of(phases_, product);
            const double bands =
                double(batch_) * product.count[0] * made_.bands.down * made_.bands.across;
            const int64_t positions = batch_ * product.positions();
            banded += bands * pieces(made_.bands.rows * made_.bands.row_cells, made_.most) *
                      made_.most * depth * columns;
            exact += depth * (double(pieces(positions, made_.most)) * made_.most * columns +
                              double(positions) * laying);
        }
        const double halo =
            (1.0 + made_.bands.halo(0)) * (1.0 + double(made_.bands.halo(1)) / made_.bands.rows);
        banded += double(batch_) * made_.bands.q[0].count() * made_.bands.q[1].count() * halo *
                  made_.bands.row_cells * made_.bands.across * phases_.depth * laying;
        return banded <= exact;
    }

    void cut_patches(int threads) {
        int64_t blocks = 0;
        for (const Product& product : phases_.products) {
            Cut cut{};
            cut.taps = matrices_of(phases_, product);
            const int64_t lines = batch_ * product.count[0] * pieces(product.count[1], 2);
            const int64_t width = pieces(product.count[2], 2);
            int64_t fits = kPatchBytes / (cut.taps * made_.words * made_.word + 1);
            if (fits < made_.most) fits = made_.most;
            cut.across = pieces(width, fits);
            cut.width = pieces(width, cut.across);
            cut.positions = lines * cut.across;
            cut.block = fits / cut.width < 1 ? 1 : fits / cut.width;
            cut.blocks = pieces(cut.positions, cut.block);
            cut.block = pieces(cut.positions, cut.blocks);
            cut.blocks = pieces(cut.positions, cut.block);
            blocks += phases_.geometry.groups * cut.blocks;
            made_.cuts.push_back(cut);
        }
        share(threads, blocks);
    }

    // Blocks in parts of the weights, where they are fewer than the tasks wanted.
    void share(int threads, int64_t blocks) {
        made_.tasks = 0;
        for (int64_t i = 0; i < int64_t(made_.cuts.size()); ++i) {
            Cut& cut = made_.cuts[i];
            cut.parts = threads > 1 ? pieces(kShares * threads, blocks) : 1;
            const int64_t most = panels_of(phases_, phases_.products[i]);
            if (cut.parts > most) cut.parts = most;
            cut.first = made_.tasks;
            made_.tasks += phases_.geometry.groups * cut.blocks * cut.parts;
        }
    }

    void cut_exactly(int threads) {
        const int64_t groups = phases_.geometry.groups;
        int64_t blocks = 0;
        for (const Product& product : phases_.products) {
            Cut cut{};
            cut.positions = batch_ * product.positions();
            const int64_t tiles = pieces(cut.positions, made_.most);
            cut.tile = made_.tile_of(cut.positions);
            const int64_t tap_bytes = made_.tap_words(cut.tile) * made_.word;
            cut.taps = product.offsets.size();
            // Where few tiles fit, and no partial sum is cut, fewer taps at a time:
            // then the weights are read for more tiles at once.
            if (kBlockBytes < kManyTiles * cut.taps * tap_bytes && phases_.depth % 64 == 0) {
                cut.taps = kBlockBytes / (kManyTiles * tap_bytes);
                if (cut.taps < 1) cut.taps = 1;
            }
            int64_t fits = kBlockBytes / (cut.taps * tap_bytes + 1);
            const int64_t sums = int64_t{m_.rows} * kMostColumns * 4 * panels_of(phases_, product);
            if (cut.taps < int64_t(product.offsets.size()) && fits * sums > kBlockBytes)
                fits = kBlockBytes / sums;
            cut.blocks = fits < 1 ? tiles : pieces(tiles, fits);
            cut.block = pieces(tiles, cut.blocks);
            cut.blocks = pieces(tiles, cut.block);
            blocks += groups * cut.blocks;
            made_.cuts.push_back(cut);
        }
        share(threads, blocks);
    }

    const Phases& phases_;
    const Multiplier& m_;
    const int64_t batch_;
    Cutting made_{};
};

}  // namespace

const Cutting* new_cutting(const Phases& phases, int64_t batch, int threads) {
    return new Cutting(Cutter(phases, batch, threads).made());
}

void delete_cutting(const Cutting* cutting) { delete cutting; }

}  // namespace fastgen

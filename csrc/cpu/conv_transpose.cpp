// Transposed convolution by phases (phases.h): tile products of packed weights and inputs laid out
// so that every tap of a tile is the same tile, moved; its outputs go to their places with bias,
// folded normalisation and activation on the way.
#include <stdlib.h>

#include <atomic>
#include <utility>

#include "epilogue.h"
#include "gather.h"
#include "kernels.h"
#include "phases.h"
#include "tile.h"

namespace fastgen::FASTGEN_ISA {
namespace {

constexpr int64_t kBlockBytes = 768 << 10;  // of inputs laid out, which stay in the second cache
constexpr int64_t kBandBytes = 192 << 10;   // of a band, whose channels lie on pages of their own
constexpr int64_t kManyTiles = 8;           // of a block, for which its weights are read once
constexpr int64_t kShares = 3;              // tasks a thread at least
constexpr int64_t kSlack = 64;              // words behind them that a tile may read

// A position of a product.
struct Row {
    int32_t q[3];
    bool interior;    // whether all phases have an output there
    int64_t in, out;  // where its input and output channels begin, of offset and shift 0
};

FASTGEN_INLINE bool is_inside(const int32_t* q, const Coordinates& by, const int64_t* scale,
                              const int64_t* size) {
    for (int dim = 0; dim < 3; ++dim) {
        const int64_t at = q[dim] * scale[dim] + by[dim];
        if (at < 0 || at >= size[dim]) return false;
    }
    return true;
}

constexpr int64_t kOne[3] = {1, 1, 1};

// Memory that grows and stays. Nothing of the standard library's here: its functions, compiled for
// one instruction set, could be linked in place of another's.
struct Buffer {
    char* room = nullptr;
    size_t size = 0;

    ~Buffer() { free(room); }

    char* of(size_t bytes) {
        if (bytes + 64 > size) {
            free(room);
            size = bytes + 64;
            room = static_cast<char*>(malloc(size));
            if (!room) abort();
        }
        return room + (-reinterpret_cast<uintptr_t>(room) & 63);
    }

    template <typename T>
    T* of_type(size_t count) {
        return reinterpret_cast<T*>(of(count * sizeof(T)));
    }
};

// ---- how a call is cut into tasks ---------------------------------------------------------------
// Exact: a task is a block of positions of one product, laid out once a tap, with no gap. For small
// inputs, where rows of a few positions would be mostly edges.
// Bands: a task is a part of the input with its edges, laid out once for all products and taps; a
// row of zeros between its rows makes every tap of a tile the same tile, moved.

// Exact, of one product.
struct Cut {
    int64_t positions;  // all of them
    int tile;           // positions of a tile, but for the last
    int64_t block;      // tiles of a block
    int64_t blocks, parts;
    int64_t taps;   // laid out at a time: long sums go on from one part of them to the next
    int64_t first;  // task
};

struct Extent {
    int64_t low, end;
    int64_t count() const { return end - low; }
};

// Bands of all products.
struct Bands {
    Extent q[3];              // of any product
    Extent offset[3];         // of any tap, end included
    int64_t rows, width;      // of Q in a band
    bool split;               // rows in parts, each with its own edges
    int64_t across, down;     // bands
    int64_t row_cells, left;  // cells of a row laid out; zeros before the first
    int64_t parts;
    int64_t tasks;

    int64_t halo(int dim) const { return offset[dim].end - offset[dim].low; }
};

// What laying out one position takes, in columns of a product.
constexpr double kLaying = 24.0, kLayingTiles = 64.0;

class Worker {
   public:
    Worker(const ConvTransposeParams& p, const Multiplier& m, const Phases& phases, int threads)
        : p_(p), m_(m), phases_(phases), rows_(phases.order == Order::kRows) {
        const ConvTransposeGeometry& g = phases.geometry;
        most_ = rows_ ? m.columns : m.rows;
        channels_ = {g.in_channels, phases.depth, p.in.stride[0], m.operands == Operands::kFloats};
        set_place(rows_ ? Place::kChannels : Place::kPositions);
        cut_bands(threads);
        banded_ = is_banded();
        if (banded_) return;
        if (m.operands != Operands::kTiles) set_place(Place::kChannels);
        cut_exactly(threads);
    }

    int64_t tasks() const { return banded_ ? bands_.tasks : tasks_; }

    void run(int64_t task) { banded_ ? run_band(task) : run_block(task); }

   private:
    void set_place(Place place) {
        place_ = place;
        const bool positions = place == Place::kPositions;
        word_ = channels_.floats || !positions ? 4 : 2;
        pitch_ = channels_.depth + 64 / word_;  // of positions: apart in the sets of a cache
        words_ = positions ? pitch_ : channels_.floats ? channels_.depth : channels_.depth / 2;
    }

    // ---- cutting ----

    int64_t outputs(const Product& product) const {
        return product.shifts.size() * phases_.geometry.out_channels;
    }

    int span(const Product& product) const {
        return rows_ ? rows_of_tile(outputs(product), product.across, m_) : m_.columns;
    }

    int64_t panels(const Product& product) const {
        const int64_t padded = padded_weights(phases_, product, phases_.geometry.out_channels, m_);
        return (padded + span(product) - 1) / span(product);
    }

    int64_t most_panels() const {
        int64_t most = 1;
        for (const Product& product : phases_.products)
            if (panels(product) > most) most = panels(product);
        return most;
    }

    static int64_t pieces(int64_t count, int64_t size) { return (count + size - 1) / size; }

    void cut_bands(int threads) {
        Bands& b = bands_;
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
        const int64_t room = kBandBytes / (words_ * word_ + 1);
        b.rows = room / (planes * b.row_cells) - b.halo(1);
        b.width = b.q[2].count();
        b.split = b.rows < 1;
        if (b.split) {  // not even one: a part of one
            b.rows = 1;
            const int64_t fits = room / (planes * (1 + b.halo(1))) - b.halo(2);
            b.width = fits < 4 * kMostColumns ? 4 * kMostColumns : fits;
            if (b.width > b.q[2].count()) b.width = b.q[2].count();
            b.left = 0;
            b.row_cells = b.width + b.halo(2);
        }
        const int64_t each = p_.batch * phases_.geometry.groups * b.q[0].count();
        const int64_t wanted = threads > 1 ? kShares * threads : 1;
        if (b.rows > all) b.rows = all;
        while (each * pieces(all, b.rows) < wanted && b.rows >= 16) b.rows = (b.rows + 1) / 2;
        b.down = pieces(all, b.rows);
        b.rows = pieces(all, b.down);
        b.across = pieces(b.q[2].count(), b.width);
        b.tasks = each * b.down * b.across;
        b.parts = pieces(wanted, b.tasks);
        if (b.parts > most_panels()) b.parts = most_panels();
        b.tasks *= b.parts;
    }

    bool is_banded() const {
        double banded = 0.0, exact = 0.0;
        const double laying = m_.operands == Operands::kTiles ? kLayingTiles : kLaying;
        for (const Product& product : phases_.products) {
            const double depth = double(product.offsets.size()) * phases_.depth;
            const double columns = double(panels(product)) * span(product);
            const double bands = double(p_.batch) * product.count[0] * bands_.down * bands_.across;
            const int64_t positions = p_.batch * product.positions();
            banded +=
                bands * pieces(bands_.rows * bands_.row_cells, most_) * most_ * depth * columns;
            exact += depth * (double(pieces(positions, most_)) * most_ * columns +
                              double(positions) * laying);
        }
        const double halo = (1.0 + bands_.halo(0)) * (1.0 + double(bands_.halo(1)) / bands_.rows);
        banded += double(p_.batch) * bands_.q[0].count() * bands_.q[1].count() * halo *
                  bands_.row_cells * bands_.across * phases_.depth * laying;
        return banded <= exact;
    }

    void cut_exactly(int threads) {
        const int64_t groups = phases_.geometry.groups, count = phases_.products.size();
        int64_t blocks = 0, index = 0;
        cuts_ = rooms()[4].of_type<Cut>(count);
        for (const Product& product : phases_.products) {
            Cut cut{};
            cut.positions = p_.batch * product.positions();
            int64_t tiles = pieces(cut.positions, most_);
            const bool fixed = rows_ || m_.operands == Operands::kTiles;
            cut.tile = fixed ? most_ : int(pieces(cut.positions, tiles));
            const int64_t tap_bytes = tap_words(cut.tile) * word_;
            cut.taps = product.offsets.size();
            // Where few tiles fit, and no sum of kPartial products is cut, fewer taps at a time:
            // then the weights are read for more tiles at once.
            if (kBlockBytes < kManyTiles * cut.taps * tap_bytes && phases_.depth % 64 == 0) {
                cut.taps = kBlockBytes / (kManyTiles * tap_bytes);
                if (cut.taps < 1) cut.taps = 1;
            }
            int64_t fits = kBlockBytes / (cut.taps * tap_bytes + 1);
            const int64_t sums = int64_t{m_.rows} * kMostColumns * 4 * panels(product);
            if (cut.taps < int64_t(product.offsets.size()) && fits * sums > kBlockBytes)
                fits = kBlockBytes / sums;
            cut.blocks = fits < 1 ? tiles : pieces(tiles, fits);
            cut.block = pieces(tiles, cut.blocks);
            cut.blocks = pieces(tiles, cut.block);
            blocks += groups * cut.blocks;
            cuts_[index++] = cut;
        }
        for (int64_t i = 0; i < count; ++i) {
            Cut& cut = cuts_[i];
            cut.parts = threads > 1 ? pieces(kShares * threads, blocks) : 1;
            const int64_t most = panels(phases_.products[i]);
            if (cut.parts > most) cut.parts = most;
            cut.first = tasks_;
            tasks_ += groups * cut.blocks * cut.parts;
        }
    }

    // ---- tasks ----

    // The taps of a sum that are at hand.
    struct Sum {
        int64_t begin, end, all;
    };

    // Words of a tap of a tile that is laid out by itself, and of all its taps.
    int64_t tap_words(int tile) const {
        return words_ * (place_ == Place::kPositions ? pieces(tile, 16) * 16 : tile);
    }

    const char* input_of(int64_t group) const {
        const int64_t size = p_.in.dtype == kFloat32 ? 4 : 2;
        return static_cast<const char*>(p_.in.data) +
               group * phases_.geometry.in_channels * p_.in.stride[0] * size;
    }

    void run_block(int64_t task) {
        size_t index = phases_.products.size() - 1;
        while (cuts_[index].first > task) --index;
        const Cut& cut = cuts_[index];
        const Product& product = phases_.products[index];
        task -= cut.first;
        const int64_t part = task % cut.parts, block = task / cut.parts % cut.blocks;
        const int64_t group = task / cut.parts / cut.blocks;
        const int64_t first = block * cut.block * cut.tile;
        const int64_t left = cut.positions - first, all = cut.block * cut.tile;
        const int64_t positions = left < all ? left : all;
        const int64_t words = cut.taps * tap_words(cut.tile);
        char* laid = room_.of((cut.block * words + kSlack) * word_);
        Row* at = reinterpret_cast<Row*>(row_room_.of(positions * sizeof(Row)));
        find_rows(product, first, positions, at);
        int64_t* offsets = offset_room_.of_type<int64_t>(cut.taps);
        for (int64_t tap = 0; tap < cut.taps; ++tap) offsets[tap] = tap * tap_words(cut.tile);
        const int64_t pitch = place_ == Place::kPositions ? pitch_ : cut.tile;
        Sum sum{0, 0, int64_t(product.offsets.size())};
        do {
            sum.end = sum.begin + cut.taps < sum.all ? sum.begin + cut.taps : sum.all;
            for (int64_t done = 0; done < positions; done += cut.tile) {
                const int count = int(positions - done < cut.tile ? positions - done : cut.tile);
                char* to = laid + done / cut.tile * words * word_;
                for (int64_t tap = sum.begin; tap < sum.end; ++tap)
                    lay_out(product.offsets[tap], input_of(group), at + done, count,
                            to + offsets[tap - sum.begin] * word_, cut.tile);
            }
            const Inputs inputs{laid,          offsets, pitch,   int(sum.end - sum.begin),
                                phases_.depth, false,   nullptr, 0};
            multiply(product, group, inputs, words * word_, positions, cut.tile, at, part,
                     cut.parts, sum);
            sum.begin = sum.end;
        } while (sum.end < sum.all);
    }

    void find_rows(const Product& product, int64_t first, int64_t count, Row* rows) const {
        int64_t at[4], rest = first;  // sample, depth, height, width
        for (int dim = 3; dim > 0; --dim) {
            at[dim] = rest % product.count[dim - 1];
            rest /= product.count[dim - 1];
        }
        at[0] = rest;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t q[3] = {product.low[0] + at[1], product.low[1] + at[2],
                                  product.low[2] + at[3]};
            find_row(product, at[0], q, rows[i]);
            for (int dim = 3; dim > 0 && ++at[dim] == product.count[dim - 1]; --dim) at[dim] = 0;
            if (at[1] == 0 && at[2] == 0 && at[3] == 0) ++at[0];
        }
    }

    FASTGEN_INLINE void find_row(const Product& product, int64_t sample, const int64_t* q,
                                 Row& row) const {
        const ConvTransposeGeometry& g = phases_.geometry;
        row.in = sample * p_.in.batch_stride;
        row.out = sample * p_.out.batch_stride;
        for (int dim = 0; dim < 3; ++dim) {
            row.q[dim] = int32_t(q[dim]);
            row.in += q[dim] * p_.in.stride[dim + 1];
            row.out += q[dim] * g.stride[dim] * p_.out.stride[dim + 1];
        }
        row.interior = is_inside(row.q, product.shifts.front(), g.stride, g.out_size) &&
                       is_inside(row.q, product.shifts.back(), g.stride, g.out_size);
    }

    // One tap of a tile.
    void lay_out(const Coordinates& tap, const char* in, const Row* at, int count, char* to,
                 int64_t tile) {
        if (p_.in.dtype == kFloat32)
            lay_out_as(tap, reinterpret_cast<const float*>(in), at, count, to, tile);
        else if (p_.in.dtype == kBFloat16)
            lay_out_as(tap, reinterpret_cast<const bfloat16*>(in), at, count, to, tile);
        else
            lay_out_as(tap, reinterpret_cast<const float16*>(in), at, count, to, tile);
    }

    template <typename Element>
    void lay_out_as(const Coordinates& tap, const Element* in, const Row* at, int count, char* to,
                    int64_t tile) {
        const int64_t* stride = p_.in.stride + 1;
        const int64_t by = tap[0] * stride[0] + tap[1] * stride[1] + tap[2] * stride[2];
        const int64_t pitch = place_ == Place::kPositions ? pitch_ : tile;
        const Element* from[kMostRows];
        for (int i = 0; i < count; ++i)
            from[i] = is_inside(at[i].q, tap, kOne, phases_.geometry.in_size) ? in + at[i].in + by
                                                                              : nullptr;
        const auto target = [&](int i) {
            return to + i * word_ * (place_ == Place::kPositions ? pitch_ : 1);
        };
        if (channels_.step == 1) {
            for (int i = 0; i < count; i += 16)
                gather_positions(place_, channels_, from + i, count - i < 16 ? count - i : 16,
                                 target(i), pitch);
            return;
        }
        for (int i = 0; i < count;) {  // runs of consecutive positions, or of none
            int next = i + 1;
            while (next < count &&
                   (from[i] ? from[next] == from[next - 1] + stride[2] : !from[next]))
                ++next;
            gather_row(place_, channels_, from[i], stride[2], next - i, target(i), pitch);
            i = next;
        }
    }

    void run_band(int64_t task) {
        const Bands& b = bands_;
        const int64_t part = task % b.parts;
        task /= b.parts;
        const int64_t across = task % b.across, down = task / b.across % b.down;
        task /= b.across * b.down;
        const int64_t plane = b.q[0].low + task % b.q[0].count();
        task /= b.q[0].count();
        const int64_t group = task % phases_.geometry.groups,
                      sample = task / phases_.geometry.groups;
        Extent h{b.q[1].low + down * b.rows, 0}, w{b.q[2].low + across * b.width, 0};
        h.end = h.low + b.rows < b.q[1].end ? h.low + b.rows : b.q[1].end;
        w.end = w.low + b.width < b.q[2].end ? w.low + b.width : b.q[2].end;
        // the input's part: planes, rows and columns from `origin` on
        const int64_t rows = h.count() + b.halo(1), planes = 1 + b.halo(0);
        const int64_t origin[3] = {plane + b.offset[0].low, h.low + b.offset[1].low,
                                   b.split ? w.low + b.offset[2].low : 0};
        const int64_t cells = b.left + planes * rows * b.row_cells;
        // an odd number of cache lines: channels are apart in the sets of a cache
        const int64_t pitch =
            place_ == Place::kPositions ? pitch_ : ((cells + kSlack + 15) / 16 | 1) * 16;
        const int64_t held =
            place_ == Place::kPositions ? (cells + kSlack) * pitch_ : words_ * pitch;
        char* laid = room_.of(held * word_);
        const int64_t step = word_ * (place_ == Place::kPositions ? pitch_ : 1);  // of a cell
        fill(nullptr, 0, b.left, laid, pitch);
        for (int64_t d = 0; d < planes; ++d)
            for (int64_t r = 0; r < rows; ++r)
                fill_row(sample, group, {origin[0] + d, origin[1] + r, origin[2]},
                         laid + (b.left + (d * rows + r) * b.row_cells) * step, step, pitch);
        for (const Product& product : phases_.products) {
            Extent own[3];
            for (int dim = 0; dim < 3; ++dim)
                own[dim] = {product.low[dim], product.low[dim] + product.count[dim]};
            if (plane < own[0].low || plane >= own[0].end) continue;
            for (int dim = 1; dim < 3; ++dim) {
                const Extent& given = dim == 1 ? h : w;
                if (own[dim].low < given.low) own[dim].low = given.low;
                if (own[dim].end > given.end) own[dim].end = given.end;
            }
            if (own[1].count() <= 0 || own[2].count() <= 0) continue;
            const int64_t positions = (own[1].count() - 1) * b.row_cells + own[2].count();
            Row* at = reinterpret_cast<Row*>(row_room_.of(positions * sizeof(Row)));
            for (int64_t i = 0; i < positions; ++i) {
                const int64_t q[3] = {plane, own[1].low + i / b.row_cells,
                                      own[2].low + i % b.row_cells};
                find_row(product, sample, q, at[i]);
            }
            const int64_t taps = product.offsets.size();
            int64_t* offsets = offset_room_.of_type<int64_t>(taps);
            const int64_t words = step / word_;
            for (int64_t t = 0; t < taps; ++t) {
                const Coordinates& tap = product.offsets[t];
                const int64_t row =
                    (plane + tap[0] - origin[0]) * rows + own[1].low + tap[1] - origin[1];
                offsets[t] = words * (row * b.row_cells + b.left + own[2].low + tap[2] - origin[2]);
            }
            const bool fixed = rows_ || m_.operands == Operands::kTiles;
            const int tile = fixed ? most_ : int(pieces(positions, pieces(positions, most_)));
            const Inputs inputs{laid, offsets, pitch, int(taps), phases_.depth, false, nullptr, 0};
            multiply(product, group, inputs, tile * step, positions, tile, at, part, b.parts,
                     {0, taps, taps});
        }
    }

    // A row of cells, from the input's coordinates on: what lies outside of it is zero.
    void fill_row(int64_t sample, int64_t group, const Coordinates& from, char* to, int64_t step,
                  int64_t pitch) {
        const int64_t* size = phases_.geometry.in_size;
        const int64_t cells = bands_.row_cells;
        int64_t begin = from[2] < 0 ? -from[2] : 0, end = size[2] - from[2];
        if (end > cells) end = cells;
        const bool there = from[0] >= 0 && from[0] < size[0] && from[1] >= 0 && from[1] < size[1];
        if (!there || begin >= end) begin = end = 0;
        fill(nullptr, 0, begin, to, pitch);
        if (begin < end) {
            const int64_t offset = sample * p_.in.batch_stride + from[0] * p_.in.stride[1] +
                                   from[1] * p_.in.stride[2] + (from[2] + begin) * p_.in.stride[3];
            fill(input_of(group), offset, end - begin, to + begin * step, pitch);
        }
        fill(nullptr, 0, cells - end, to + end * step, pitch);
    }

    void fill(const char* in, int64_t offset, int64_t count, char* to, int64_t pitch) {
        if (p_.in.dtype == kFloat32)
            fill_as(reinterpret_cast<const float*>(in), offset, count, to, pitch);
        else if (p_.in.dtype == kBFloat16)
            fill_as(reinterpret_cast<const bfloat16*>(in), offset, count, to, pitch);
        else
            fill_as(reinterpret_cast<const float16*>(in), offset, count, to, pitch);
    }

    template <typename Element>
    void fill_as(const Element* in, int64_t offset, int64_t count, char* to, int64_t pitch) {
        const int64_t across = p_.in.stride[3];
        if (!in || channels_.step != 1)
            return gather_row(place_, channels_, in ? in + offset : nullptr, across, count, to,
                              pitch);
        const int64_t step = word_ * (place_ == Place::kPositions ? pitch_ : 1);
        const Element* from[16];
        for (int64_t i = 0; i < count; i += 16) {
            const int some = int(count - i < 16 ? count - i : 16);
            for (int j = 0; j < some; ++j) from[j] = in + offset + (i + j) * across;
            gather_positions(place_, channels_, from, some, to + i * step, pitch);
        }
    }

    // ---- products and their epilogue ----

    int width_of(int count) const { return count > m_.columns / 2 ? m_.columns : m_.columns / 2; }

    // All positions, `tile_bytes` from tile to tile, by a part of the weights.
    void multiply(const Product& product, int64_t group, Inputs inputs, int64_t tile_bytes,
                  int64_t positions, int tile, const Row* at, int64_t part, int64_t parts,
                  const Sum& sum) {
        const int64_t count = outputs(product), most = span(product);
        const int64_t padded = padded_weights(phases_, product, phases_.geometry.out_channels, m_);
        const int64_t all = panels(product), begin = all * part / parts * most;
        int64_t end = all * (part + 1) / parts * most;
        if (end > padded) end = padded;
        if (begin >= end) return;
        float* vectors = reinterpret_cast<float*>(vector_room_.of(3 * (end - begin) * 4));
        if (sum.end == sum.all) lay_out_vectors(product, group, begin, end, count, vectors);
        const int64_t size = m_.operands == Operands::kFloats ? 4 : 2;
        const char* weights = static_cast<const char*>(p_.weight) +
                              (group * phases_.weights + product.weights) * size;
        const char* base = static_cast<const char*>(inputs.base);
        const int64_t tiles = pieces(positions, tile);
        const bool whole = sum.begin == 0 && sum.end == sum.all;
        alignas(64) float own[kMostRows * kMostColumns];
        const int64_t room = int64_t{m_.rows} * kMostColumns;  // of a tile's sums
        float* sums = whole ? own
                            : reinterpret_cast<float*>(
                                  sum_room_.of(pieces(end - begin, most) * tiles * room * 4));
        inputs.add = sum.begin > 0;
        for (int64_t n = begin; n < end; n += most) {
            const int some = int(end - n < most ? end - n : most);
            const int used = int(count - n < some ? count - n : some);
            const int64_t tap_bytes = some * phases_.depth * size;
            const char* panel =
                weights + n * sum.all * phases_.depth * size + sum.begin * tap_bytes;
            const char* next = panel + sum.all * tap_bytes;
            const int64_t lines = n + most < end ? inputs.taps * tap_bytes / 64 : 0;
            for (int64_t index = 0; index < tiles; ++index) {
                const int64_t done = index * tile;
                const int here = int(positions - done < tile ? positions - done : tile);
                float* c = whole ? own : sums + ((n - begin) / most * tiles + index) * room;
                inputs.base = base + index * tile_bytes;
                // a share of the next panel for each tile of this one
                inputs.ahead = next + lines * index / tiles * 64;
                inputs.ahead_lines = lines * (index + 1) / tiles - lines * index / tiles;
                if (rows_)
                    m_.by_columns(inputs, panel, c, some, here);
                else
                    (banded_ ? m_.by_rows : m_.by_panels)(inputs, panel, c, here, some);
                if (sum.end < sum.all) continue;
                finish(vectors + (n - begin), end - begin, c, rows_ ? used : here,
                       rows_ ? width_of(here) : some);
                store(product, group, at + done, here, n, used, c);
            }
        }
    }

    // (phase, channel) of the n-th of a product's outputs.
    std::pair<int64_t, int64_t> output_of(const Product& product, int64_t n) const {
        const int64_t channels = phases_.geometry.out_channels, phases = product.shifts.size();
        if (phases_.order == Order::kChannelsInner) return {n / channels, n % channels};
        return {n % phases, n / phases};
    }

    // bias, scale and shift of a part; neutral where there is none.
    void lay_out_vectors(const Product& product, int64_t group, int64_t begin, int64_t end,
                         int64_t all, float* to) {
        const Epilogue& e = p_.epilogue;
        const int64_t count = end - begin;
        for (int64_t i = 0; i < count; ++i) {
            const bool there = begin + i < all;
            const int64_t channel = group * phases_.geometry.out_channels +
                                    (there ? output_of(product, begin + i).second : 0);
            to[i] = e.bias && there ? e.bias[channel] : -0.0f;
            to[count + i] = e.scale && there ? e.scale[channel] : 1.0f;
            to[2 * count + i] = e.shift && there ? e.shift[channel] : -0.0f;
        }
    }

    void finish(const float* vectors, int64_t pitch, float* c, int rows, int width) {
        const Epilogue& e = p_.epilogue;
        if (!e.bias && !e.scale && !e.shift && e.activation == kIdentity) return;
        const float *bias = vectors, *scale = vectors + pitch, *shift = vectors + 2 * pitch;
        with_activation(e, [&](const auto& act) {
            for (int row = 0; row < rows; ++row) {
                float* __restrict v = c + row * kMostColumns;
                if (rows_) {
                    const float b = bias[row], s = scale[row], t = shift[row];
                    for (int j = 0; j < width; ++j) v[j] = act(s * (v[j] + b) + t);
                } else {
                    for (int j = 0; j < width; ++j)
                        v[j] = act(scale[j] * (v[j] + bias[j]) + shift[j]);
                }
            }
        });
    }

    // Where channel `channel` of a group has the output that `shift` moves a position to.
    template <typename Element>
    Element* place(int64_t group, int64_t channel, const Coordinates& shift) const {
        const int64_t* stride = p_.out.stride;
        return static_cast<Element*>(p_.out.data) +
               (group * phases_.geometry.out_channels + channel) * stride[0] +
               shift[0] * stride[1] + shift[1] * stride[2] + shift[2] * stride[3];
    }

    // c[position][channel]
    template <typename Element>
    void store_channels(const Product& product, int64_t group, const Row* at, int count, int64_t n,
                        int used, const float* c) {
        const ConvTransposeGeometry& g = phases_.geometry;
        const int64_t step = p_.out.stride[0];
        for (int done = 0; done < used;) {
            const auto [phase, channel] = output_of(product, n + done);
            const int64_t most = g.out_channels - channel;
            const int run = int(used - done < most ? used - done : most);
            const Coordinates& shift = product.shifts[phase];
            Element* out = place<Element>(group, channel, shift);
            for (int i = 0; i < count; ++i) {
                if (!at[i].interior && !is_inside(at[i].q, shift, g.stride, g.out_size)) continue;
                Element* to = out + at[i].out;
                const float* from = c + i * kMostColumns + done;
                if (step == 1)
                    for (int j = 0; j < run; ++j) from_float(from[j], to[j]);
                else
                    for (int j = 0; j < run; ++j) from_float(from[j], to[j * step]);
            }
            done += run;
        }
    }

    // c[position][phase]: the phases of a row of the output side by side.
    template <typename Element>
    void store_phases(const Product& product, int64_t group, const Row* at, int count, int64_t n,
                      int used, const float* c) {
        const ConvTransposeGeometry& g = phases_.geometry;
        struct Piece {  // of a panel: neighbours in the output
            int first, count;
            int64_t phase;
            Element* out;
        } pieces[kMostColumns];
        int found = 0;
        for (int done = 0; done < used;) {
            const auto [phase, channel] = output_of(product, n + done);
            const int most = product.across - int(phase % product.across);
            const int run = used - done < most ? used - done : most;
            pieces[found++] = {done, run, phase,
                               place<Element>(group, channel, product.shifts[phase])};
            done += run;
        }
        const bool dense = product.across == g.stride[2] && p_.out.stride[3] == 1;
        const int64_t along = p_.out.stride[3];
        for (int i = 0; i < count; ++i) {
            Element line[kMostColumns];
            for (int j = 0; j < kMostColumns; ++j) from_float(c[i * kMostColumns + j], line[j]);
            for (const Piece* piece = pieces; piece < pieces + found; ++piece) {
                Element* to = piece->out + at[i].out;
                const Element* from = line + piece->first;
                if (dense && at[i].interior && piece->count == 8) {
                    __builtin_memcpy(to, from, 8 * sizeof(Element));
                } else if (dense && at[i].interior) {
                    for (int j = 0; j < piece->count; ++j) to[j] = from[j];
                } else {
                    const int64_t shift = product.shifts[piece->phase][2];
                    for (int j = 0; j < piece->count; ++j) {
                        const Coordinates& own = product.shifts[piece->phase + j];
                        if (is_inside(at[i].q, own, g.stride, g.out_size))
                            to[(own[2] - shift) * along] = from[j];
                    }
                }
            }
        }
    }

    // c[channel and phase][position]
    template <typename Element>
    void store_rows(const Product& product, int64_t group, const Row* at, int count, int64_t n,
                    int used, const float* c) {
        const ConvTransposeGeometry& g = phases_.geometry;
        const int64_t step = p_.out.stride[3], stride = g.stride[2];
        for (int first = 0; first < count;) {  // positions of one row of the output
            int next = first + 1;
            while (next < count && at[next].q[2] == at[next - 1].q[2] + 1) ++next;
            const int run = next - first;
            const Row& row = at[first];
            for (int done = 0; done < used;) {
                const auto [phase, channel] = output_of(product, n + done);
                const bool pair = product.across == 2 && stride == 2 && step == 1 &&
                                  phase % 2 == 0 && done + 1 < used;
                const Coordinates& shift = product.shifts[phase];
                const int64_t o = row.q[2] * stride + shift[2];  // of the first position
                const int64_t each = pair ? 1 : stride;
                int64_t begin = o < 0 ? (each - 1 - o) / each : 0;
                int64_t end = pair ? 2 * run : run;
                const int64_t room = (g.out_size[2] - o + each - 1) / each;
                if (end > room) end = room;
                const float* from = c + done * kMostColumns + first;
                done += pair ? 2 : 1;
                bool inside = true;
                for (int dim = 0; dim < 2; ++dim) {
                    const int64_t other = row.q[dim] * g.stride[dim] + shift[dim];
                    inside &= other >= 0 && other < g.out_size[dim];
                }
                if (!inside) continue;
                Element* to = place<Element>(group, channel, shift) + row.out;
                if (pair) {
                    Element line[2 * kMostColumns];
                    const float* second = from + kMostColumns;
                    for (int i = 0; i < run; ++i) {
                        from_float(from[i], line[2 * i]);
                        from_float(second[i], line[2 * i + 1]);
                    }
                    if (begin == 0 && end == 2 * kMostColumns)
                        __builtin_memcpy(to, line, sizeof line);
                    else
                        for (; begin < end; ++begin) to[begin] = line[begin];
                } else if (stride * step == 1) {
                    for (; begin < end; ++begin) from_float(from[begin], to[begin]);
                } else {
                    for (; begin < end; ++begin) from_float(from[begin], to[begin * stride * step]);
                }
            }
            first = next;
        }
    }

    template <typename Element>
    void store_as(const Product& product, int64_t group, const Row* at, int count, int64_t n,
                  int used, const float* c) {
        if (rows_)
            store_rows<Element>(product, group, at, count, n, used, c);
        else if (phases_.order == Order::kPhasesInner)
            store_phases<Element>(product, group, at, count, n, used, c);
        else
            store_channels<Element>(product, group, at, count, n, used, c);
    }

    void store(const Product& product, int64_t group, const Row* at, int count, int64_t n, int used,
               const float* c) {
        if (p_.out.dtype == kFloat32)
            store_as<float>(product, group, at, count, n, used, c);
        else if (p_.out.dtype == kBFloat16)
            store_as<bfloat16>(product, group, at, count, n, used, c);
        else
            store_as<float16>(product, group, at, count, n, used, c);
    }

    const ConvTransposeParams& p_;
    const Multiplier& m_;
    const Phases& phases_;
    const bool rows_;
    Place place_;
    Channels channels_;
    int64_t pitch_, word_, words_;  // bytes of a word, words of a position
    int most_;                      // positions of a tile
    bool banded_;
    Bands bands_{};
    Cut* cuts_ = nullptr;
    int64_t tasks_ = 0;
    Buffer &room_ = rooms()[0], &row_room_ = rooms()[1], &vector_room_ = rooms()[2],
           &sum_room_ = rooms()[3], &offset_room_ = rooms()[5];

    static Buffer* rooms() {
        static thread_local Buffer held[6];
        return held;
    }
};

}  // namespace

void conv_transpose(const ConvTransposeParams& p, int threads) {
    const Phases& phases = *p.phases;
    const Multiplier& m = *phases.multiplier;
    std::atomic<int64_t> next{0};
    parallel_for(threads, threads, [&](int64_t begin, int64_t end) {
        IeeeMode ieee;
        Worker worker(p, m, phases, threads);
        if (m.begin) m.begin();
        // a thread alone in place of the team has the ranges of all, one behind the other
        for (; begin < end; ++begin)
            for (int64_t task; (task = next.fetch_add(1)) < worker.tasks();) worker.run(task);
        if (m.end) m.end();
    });
}

// ---- weights, packed ---------------------------------------------------------------------------

namespace {

FASTGEN_INLINE uint16_t bfloat_bits(float value) {
    bfloat16 rounded;
    from_float(value, rounded);
    return rounded.bits;
}

// One panel: `span` columns of a product's weights, or rows, from the n-th on.
template <typename Element>
void pack_panel(const PackParams& p, const Multiplier& m, const Phases& phases,
                const Product& product, int64_t group, int64_t n, int span, char* to) {
    const ConvTransposeGeometry& g = phases.geometry;
    const int64_t* stride = p.weight.stride;
    const int64_t taps = product.offsets.size(), all = product.shifts.size() * g.out_channels;
    Buffer room;
    int64_t* places = room.of_type<int64_t>(span * taps);  // -1: none
    for (int j = 0; j < span; ++j)
        for (int64_t tap = 0; tap < taps; ++tap) {
            int64_t& place = places[tap * span + j];
            place = -1;
            if (n + j >= all) continue;
            const bool channels_inner = phases.order == Order::kChannelsInner;
            const int64_t count = channels_inner ? g.out_channels : product.shifts.size();
            const int64_t outer = (n + j) / count, inner = (n + j) % count;
            const int64_t channel = channels_inner ? inner : outer;
            const int64_t k = product.taps[(channels_inner ? outer : inner) * taps + tap];
            place = channel * stride[1] + k / (g.kernel[1] * g.kernel[2]) * stride[2] +
                    k / g.kernel[2] % g.kernel[1] * stride[3] + k % g.kernel[2] * stride[4];
        }
    const bool rows = phases.order == Order::kRows;
    const Element* weight = static_cast<const Element*>(p.weight.data);
    for (int64_t c = 0; c < phases.depth; ++c) {
        const bool there = c < g.in_channels;
        const Element* from = weight + (group * g.in_channels + c) * stride[0];
        for (int64_t tap = 0; tap < taps; ++tap) {
            const int64_t k = tap * phases.depth + c;
            const int64_t* place = places + tap * span;
            for (int j = 0; j < span; ++j) {
                const float value = there && place[j] >= 0 ? to_float(from[place[j]]) : 0.0f;
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
            const int64_t count = padded_weights(phases, product, phases.geometry.out_channels, m);
            const int64_t depth = product.offsets.size() * phases.depth;
            const int64_t most =
                phases.order == Order::kRows
                    ? rows_of_tile(product.shifts.size() * phases.geometry.out_channels,
                                   product.across, m)
                    : m.columns;
            char* to =
                static_cast<char*>(p.packed) + (group * phases.weights + product.weights) * size;
            parallel_for((count + most - 1) / most, threads, [&](int64_t begin, int64_t end) {
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

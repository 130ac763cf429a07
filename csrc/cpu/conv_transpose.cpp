// Transposed convolution by phases (phases.h): tile products of packed weights and inputs laid out
// so that every tap of a tile is the same tile, moved; its outputs go to their places with bias,
// folded normalisation and activation on the way.
#include <atomic>

#include "buffer.h"
#include "cutting.h"
#include "epilogue.h"
#include "gather.h"
#include "kernels.h"
#include "scatter.h"
#include "tile.h"
#include "winograd.h"

namespace fastgen::FASTGEN_ISA {
namespace {

constexpr int64_t kSlack = 64;  // words behind inputs laid out that a tile may read

constexpr int64_t kOne[3] = {1, 1, 1};

class Worker {
   public:
    Worker(const ConvTransposeParams& p, const Cutting& cutting)
        : p_(p),
          phases_(*p.phases),
          m_(*phases_.multiplier),
          cutting_(cutting),
          scatter_(p, phases_),
          rows_(phases_.order == Order::kRows),
          channels_{phases_.geometry.in_channels, phases_.depth, p.in.stride[0],
                    m_.operands == Operands::kFloats} {}

    void run(int64_t task) {
        if (cutting_.patches)
            run_patches(task);
        else if (cutting_.banded)
            run_band(task);
        else
            run_block(task);
    }

   private:
    // The taps of a sum that are at hand.
    struct Sum {
        int64_t begin, end, all;
    };

    const char* input_of(int64_t group) const {
        const int64_t size = p_.in.dtype == kFloat32 ? 4 : 2;
        return static_cast<const char*>(p_.in.data) +
               group * phases_.geometry.in_channels * p_.in.stride[0] * size;
    }

    struct Task {
        const Cut& cut;
        const Product& product;
        int64_t group, block, part;
    };

    Task task_of(int64_t task) const {
        size_t index = phases_.products.size() - 1;
        while (cutting_.cuts[index].first > task) --index;
        const Cut& cut = cutting_.cuts[index];
        task -= cut.first;
        return {cut, phases_.products[index], task / cut.parts / cut.blocks,
                task / cut.parts % cut.blocks, task % cut.parts};
    }

    void run_block(int64_t task) {
        const auto& [cut, product, group, block, part] = task_of(task);
        const int64_t first = block * cut.block * cut.tile;
        const int64_t left = cut.positions - first, all = cut.block * cut.tile;
        const int64_t positions = left < all ? left : all;
        const int64_t words = cut.taps * cutting_.tap_words(cut.tile);
        char* laid = room_.of((cut.block * words + kSlack) * cutting_.word);
        Row* at = row_room_.of_type<Row>(positions);
        find_rows(product, first, positions, at);
        int64_t* offsets = offset_room_.of_type<int64_t>(cut.taps);
        for (int64_t tap = 0; tap < cut.taps; ++tap)
            offsets[tap] = tap * cutting_.tap_words(cut.tile);
        const int64_t pitch = cutting_.place == Place::kPositions ? cutting_.pitch : cut.tile;
        Sum sum{0, 0, int64_t(product.offsets.size())};
        do {
            sum.end = sum.begin + cut.taps < sum.all ? sum.begin + cut.taps : sum.all;
            for (int64_t done = 0; done < positions; done += cut.tile) {
                const int count = int(positions - done < cut.tile ? positions - done : cut.tile);
                char* to = laid + done / cut.tile * words * cutting_.word;
                for (int64_t tap = sum.begin; tap < sum.end; ++tap)
                    lay_out(product.offsets[tap], input_of(group), at + done, count,
                            to + offsets[tap - sum.begin] * cutting_.word, cut.tile);
            }
            const Inputs inputs{laid,
                                offsets,
                                pitch,
                                int(sum.end - sum.begin),
                                phases_.depth,
                                sum.all * phases_.depth,
                                false,
                                nullptr,
                                0};
            multiply(product, group, inputs, words * cutting_.word, positions, cut.tile, at, part,
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
        while (count > 0) {
            const int64_t left = product.count[2] - at[3], some = left < count ? left : count;
            const int64_t q[3] = {product.low[0] + at[1], product.low[1] + at[2],
                                  product.low[2] + at[3]};
            find_line(product, at[0], q, some, 1, rows);
            rows += some;
            count -= some;
            at[3] = 0;
            for (int dim = 2; dim > 0 && ++at[dim] == product.count[dim - 1]; --dim) at[dim] = 0;
            if (at[1] == 0 && at[2] == 0) ++at[0];
        }
    }

    // Positions of a row, every `each`-th from q on.
    void find_line(const Product& product, int64_t sample, const int64_t* q, int64_t count,
                   int64_t each, Row* rows) const {
        const ConvTransposeGeometry& g = phases_.geometry;
        int64_t in = sample * p_.in.batch_stride, out = sample * p_.out.batch_stride;
        for (int dim = 0; dim < 3; ++dim) {
            in += q[dim] * p_.in.stride[dim + 1];
            out += q[dim] * g.stride[dim] * p_.out.stride[dim + 1];
        }
        const int64_t in_step = each * p_.in.stride[3];
        const int64_t out_step = each * g.stride[2] * p_.out.stride[3];
        // whether the first and the last phase have their outputs
        const Coordinates &low = product.shifts.front(), &high = product.shifts.back();
        bool inside = true;
        for (int dim = 0; dim < 2; ++dim) {
            const int64_t o = q[dim] * g.stride[dim];
            inside &= o + low[dim] >= 0 && o + high[dim] < g.out_size[dim];
        }
        for (int64_t i = 0; i < count; ++i) {
            const int64_t place = q[2] + i * each, o = place * g.stride[2];
            rows[i] = {{int32_t(q[0]), int32_t(q[1]), int32_t(place)},
                       inside && o + low[2] >= 0 && o + high[2] < g.out_size[2],
                       in + i * in_step,
                       out + i * out_step};
        }
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
        const int64_t pitch = cutting_.place == Place::kPositions ? cutting_.pitch : tile;
        const Element* from[kMostRows];
        for (int i = 0; i < count; ++i)
            from[i] = is_inside(at[i].q, tap, kOne, phases_.geometry.in_size) ? in + at[i].in + by
                                                                              : nullptr;
        const auto target = [&](int i) {
            return to +
                   i * cutting_.word * (cutting_.place == Place::kPositions ? cutting_.pitch : 1);
        };
        if (channels_.step == 1) {
            for (int i = 0; i < count; i += 16)
                gather_positions(cutting_.place, channels_, from + i,
                                 count - i < 16 ? count - i : 16, target(i), pitch);
            return;
        }
        for (int i = 0; i < count;) {  // runs of consecutive positions, or of none
            int next = i + 1;
            while (next < count &&
                   (from[i] ? from[next] == from[next - 1] + stride[2] : !from[next]))
                ++next;
            gather_row(cutting_.place, channels_, from[i], stride[2], next - i, target(i), pitch);
            i = next;
        }
    }

    void run_band(int64_t task) {
        const Bands& b = cutting_.bands;
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
        const int64_t pitch = cutting_.place == Place::kPositions
                                  ? cutting_.pitch
                                  : ((cells + kSlack + 15) / 16 | 1) * 16;
        const int64_t held = cutting_.place == Place::kPositions ? (cells + kSlack) * cutting_.pitch
                                                                 : cutting_.words * pitch;
        char* laid = room_.of(held * cutting_.word);
        const int64_t step =
            cutting_.word *
            (cutting_.place == Place::kPositions ? cutting_.pitch : 1);  // of a cell
        fill(nullptr, 0, b.left, laid, pitch);
        for (int64_t d = 0; d < planes; ++d)
            for (int64_t r = 0; r < rows; ++r)
                fill_row(sample, group, {origin[0] + d, origin[1] + r, origin[2]}, b.row_cells,
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
            Row* at = row_room_.of_type<Row>(positions);
            for (int64_t i = 0; i < positions; i += b.row_cells) {
                const int64_t q[3] = {plane, own[1].low + i / b.row_cells, own[2].low};
                const int64_t left = positions - i;
                find_line(product, sample, q, left < b.row_cells ? left : b.row_cells, 1, at + i);
            }
            const int64_t taps = product.offsets.size();
            int64_t* offsets = offset_room_.of_type<int64_t>(taps);
            const int64_t words = step / cutting_.word;
            for (int64_t t = 0; t < taps; ++t) {
                const Coordinates& tap = product.offsets[t];
                const int64_t row =
                    (plane + tap[0] - origin[0]) * rows + own[1].low + tap[1] - origin[1];
                offsets[t] = words * (row * b.row_cells + b.left + own[2].low + tap[2] - origin[2]);
            }
            const int tile = cutting_.tile_of(positions);
            const Inputs inputs{laid,      offsets,       pitch,
                                int(taps), phases_.depth, taps * phases_.depth,
                                false,     nullptr,       0};
            multiply(product, group, inputs, tile * step, positions, tile, at, part, b.parts,
                     {0, taps, taps});
        }
    }

    void run_patches(int64_t task) {
        const auto& [cut, product, group, block, part] = task_of(task);
        const int64_t first = block * cut.block, left = cut.positions - first;
        const int64_t pieces = left < cut.block ? left : cut.block;
        const int64_t tall = (product.count[1] + 1) / 2, wide = (product.count[2] + 1) / 2;
        const int64_t most = pieces * cut.width, pitch = cutting_.pitch;
        const int64_t deep = product.offsets.size() / 4, apart = deep * most * pitch;
        float* laid = room_.of_type<float>(9 * apart + kSlack);
        const int64_t cells = 2 * cut.width + 1;
        float* raw = raw_room_.of_type<float>(3 * cells * pitch + kSlack);
        Row* at = row_room_.of_type<Row>(4 * most);  // of each output of a patch
        int64_t patches = 0;
        for (int64_t piece = first; piece < first + pieces; ++piece) {
            int64_t rest = piece / cut.across;
            const int64_t w = piece % cut.across * cut.width, h = rest % tall;
            rest /= tall;
            const int64_t d = rest % product.count[0], sample = rest / product.count[0];
            const int64_t width = wide - w < cut.width ? wide - w : cut.width;
            const Coordinates q{product.low[0] + d, product.low[1] + 2 * h, product.low[2] + 2 * w};
            for (int64_t tap = 0; tap < deep; ++tap) {
                const Coordinates& low = product.offsets[4 * tap + 3];
                for (int64_t row = 0; row < 3; ++row)
                    fill_row(sample, group, {q[0] + low[0], q[1] + low[1] + row, q[2] + low[2]},
                             2 * width + 1, reinterpret_cast<char*>(raw + row * cells * pitch),
                             pitch * 4, pitch);
                for (int64_t i = 0; i < width; ++i)
                    patch_of(raw + 2 * i * pitch, pitch, cells * pitch, phases_.depth,
                             laid + (tap * most + patches + i) * pitch, apart);
            }
            for (int output = 0; output < 4; ++output) {
                const int64_t from[3] = {q[0], q[1] + output / 2, q[2] + output % 2};
                find_line(product, sample, from, width, 2, at + output * most + patches);
            }
            patches += width;
        }
        int64_t* offsets = offset_room_.of_type<int64_t>(deep);
        for (int64_t tap = 0; tap < deep; ++tap) offsets[tap] = tap * most * pitch;
        const Inputs inputs{laid,  offsets, pitch, int(deep), phases_.depth, deep * phases_.depth,
                            false, nullptr, 0};
        multiply_patches(product, group, inputs, apart, patches, most, at, part, cut.parts);
    }

    // As `multiply`; `apart`: floats from one matrix of inputs to the next.
    void multiply_patches(const Product& product, int64_t group, Inputs inputs, int64_t apart,
                          int64_t patches, int64_t most, const Row* at, int64_t part,
                          int64_t parts) {
        const auto [count, span, begin, end] = share_of(product, part, parts);
        if (begin >= end) return;
        float* vectors = vector_room_.of_type<float>(3 * (end - begin));
        lay_out_vectors(product, group, begin, end, count, vectors);
        const float* weights =
            static_cast<const float*>(p_.weight) + group * phases_.weights + product.weights;
        const float* laid = static_cast<const float*>(inputs.base);
        const int64_t depth = inputs.taps * phases_.depth;
        const int tile = cutting_.tile_of(patches);
        const int64_t tiles = (patches + tile - 1) / tile, turns = 9 * tiles;
        const int64_t room = int64_t{m_.rows} * kMostColumns;  // of a tile's sums
        float* sums = sum_room_.of_type<float>(turns * room);
        for (int64_t n = begin; n < end; n += span) {
            const int some = int(end - n < span ? end - n : span);
            const int used = int(count - n < some ? count - n : some);
            const float* panel = weights + n * 9 * depth;
            const char* next = reinterpret_cast<const char*>(panel + 9 * depth * some);
            const int64_t lines = n + span < end ? 9 * depth * some * 4 / 64 : 0;
            // a matrix of weights for all tiles: it stays in the first cache
            for (int64_t turn = 0; turn < turns; ++turn) {
                const int64_t matrix = turn / tiles, index = turn % tiles, done = index * tile;
                const int here = int(patches - done < tile ? patches - done : tile);
                inputs.base = laid + matrix * apart + done * inputs.pitch;
                inputs.ahead = next + lines * turn / turns * 64;
                inputs.ahead_lines = lines * (turn + 1) / turns - lines * turn / turns;
                m_.by_rows(inputs, panel + matrix * depth * some,
                           sums + (index * 9 + matrix) * room, here, some);
            }
            for (int64_t index = 0; index < tiles; ++index) {
                const int64_t done = index * tile;
                const int here = int(patches - done < tile ? patches - done : tile);
                float* c = sums + index * 9 * room;
                outputs_of_products(c, room, int64_t{here} * kMostColumns);
                for (int output = 0; output < 4; ++output) {
                    float* own = c + (output / 2 * 3 + output % 2) * room;
                    finish(vectors + (n - begin), end - begin, own, here, some);
                    scatter_.store(product, group, at + output * most + done, here, n, used, own,
                                   here);
                }
            }
        }
    }

    // A row of cells, from the input's coordinates on: what lies outside of it is zero.
    void fill_row(int64_t sample, int64_t group, const Coordinates& from, int64_t cells, char* to,
                  int64_t step, int64_t pitch) {
        const int64_t* size = phases_.geometry.in_size;
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
            return gather_row(cutting_.place, channels_, in ? in + offset : nullptr, across, count,
                              to, pitch);
        const int64_t step =
            cutting_.word * (cutting_.place == Place::kPositions ? cutting_.pitch : 1);
        const Element* from[16];
        for (int64_t i = 0; i < count; i += 16) {
            const int some = int(count - i < 16 ? count - i : 16);
            for (int j = 0; j < some; ++j) from[j] = in + offset + (i + j) * across;
            gather_positions(cutting_.place, channels_, from, some, to + i * step, pitch);
        }
    }

    // ---- products and their epilogue ----

    int width_of(int count) const { return count > m_.columns / 2 ? m_.columns : m_.columns / 2; }

    // What a part of the weights makes of a product's outputs: whole panels of `span`.
    struct Share {
        int64_t count, span, begin, end;  // count: of all outputs, without padding
    };

    Share share_of(const Product& product, int64_t part, int64_t parts) const {
        const int64_t span = span_of(phases_, product), all = panels_of(phases_, product);
        const int64_t padded = padded_outputs(phases_, product);
        const int64_t end = all * (part + 1) / parts * span;
        return {outputs_of(phases_, product), span, all * part / parts * span,
                end < padded ? end : padded};
    }

    // All positions, `tile_bytes` from tile to tile, by a part of the weights.
    void multiply(const Product& product, int64_t group, Inputs inputs, int64_t tile_bytes,
                  int64_t positions, int tile, const Row* at, int64_t part, int64_t parts,
                  const Sum& sum) {
        const auto [count, most, begin, end] = share_of(product, part, parts);
        if (begin >= end) return;
        float* vectors = vector_room_.of_type<float>(3 * (end - begin));
        if (sum.end == sum.all) lay_out_vectors(product, group, begin, end, count, vectors);
        const int64_t size = m_.operands == Operands::kFloats ? 4 : 2;
        const char* weights = static_cast<const char*>(p_.weight) +
                              (group * phases_.weights + product.weights) * size;
        const char* base = static_cast<const char*>(inputs.base);
        const int64_t tiles = (positions + tile - 1) / tile;
        const bool whole = sum.begin == 0 && sum.end == sum.all;
        alignas(64) float own[kMostRows * kMostColumns];
        const int64_t room = int64_t{m_.rows} * kMostColumns;  // of a tile's sums
        const int64_t panels = (end - begin + most - 1) / most;
        float* sums = whole ? own : sum_room_.of_type<float>(panels * tiles * room);
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
                    (cutting_.banded ? m_.by_rows : m_.by_panels)(inputs, panel, c, here, some);
                if (sum.end < sum.all) continue;
                const int rows = rows_ ? used : here;
                finish(vectors + (n - begin), end - begin, c, rows, rows_ ? width_of(here) : some);
                scatter_.store(product, group, at + done, here, n, used, c, rows);
            }
        }
    }

    // bias, scale and shift of a part; neutral where there is none.
    void lay_out_vectors(const Product& product, int64_t group, int64_t begin, int64_t end,
                         int64_t all, float* to) {
        const Epilogue& e = p_.epilogue;
        const int64_t count = end - begin;
        for (int64_t i = 0; i < count; ++i) {
            const bool there = begin + i < all;
            const int64_t channel = group * phases_.geometry.out_channels +
                                    (there ? output_of(phases_, product, begin + i).channel : 0);
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

    const ConvTransposeParams& p_;
    const Phases& phases_;
    const Multiplier& m_;
    const Cutting& cutting_;
    const Scatter scatter_;
    const bool rows_;
    const Channels channels_;
    Buffer &room_ = rooms()[0], &row_room_ = rooms()[1], &vector_room_ = rooms()[2],
           &sum_room_ = rooms()[3], &offset_room_ = rooms()[4], &raw_room_ = rooms()[5];

    static Buffer* rooms() {
        static thread_local Buffer held[6];
        return held;
    }
};

}  // namespace

void conv_transpose(const ConvTransposeParams& p, int threads) {
    const Multiplier& m = *p.phases->multiplier;
    const Cutting* cutting = new_cutting(*p.phases, p.batch, threads);
    std::atomic<int64_t> next{0};
    parallel_for(threads, threads, [&](int64_t begin, int64_t end) {
        IeeeMode ieee;
        Worker worker(p, *cutting);
        if (m.begin) m.begin();
        // a thread alone in place of the team has the ranges of all, one behind the other
        for (; begin < end; ++begin)
            for (int64_t task; (task = next.fetch_add(1)) < cutting->tasks;) worker.run(task);
        if (m.end) m.end();
    });
    delete_cutting(cutting);
}

}  // namespace fastgen::FASTGEN_ISA

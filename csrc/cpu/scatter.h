// How a tile of outputs comes to its places, of any dtype and strides.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../math/convert.h"
#include "phases.h"
#include "tile.h"

namespace fastgen::FASTGEN_ISA {

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

namespace {

// A row of a tile and the next one, in turn.
FASTGEN_INLINE void interleave(const float* even, const float* odd, int count, float* to) {
    for (int i = 0; i < count; ++i) {
        to[2 * i] = even[i];
        to[2 * i + 1] = odd[i];
    }
}
template <typename Short>
FASTGEN_INLINE void interleave(const Short* even, const Short* odd, int count, Short* to) {
    uint32_t words[kMostColumns];
    for (int i = 0; i < count; ++i) words[i] = even[i].bits | uint32_t{odd[i].bits} << 16;
    __builtin_memcpy(to, words, sizeof words);
}

// Rows of eight, `kMostColumns` apart, one behind the other: few stores, which would hold up the
// loads of the tile to come.
template <typename Element>
FASTGEN_INLINE void join_eights(const Element* from, int count, Element* to) {
    int i = 0;
#if defined(__AVX512F__)
    const auto at = [&](int row) { return from + (i + row) * kMostColumns; };
    if constexpr (sizeof(Element) == 2) {
        const auto load = [&](int row) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at(row)));
        };
        for (; i + 4 <= count; i += 4) {
            __m512i line = _mm512_castsi128_si512(load(0));
            line = _mm512_inserti32x4(line, load(1), 1);
            line = _mm512_inserti32x4(line, load(2), 2);
            _mm512_storeu_si512(to + 8 * i, _mm512_inserti32x4(line, load(3), 3));
        }
    } else {
        const auto load = [&](int row) { return _mm256_loadu_ps(at(row)); };
        for (; i + 2 <= count; i += 2)
            _mm512_storeu_ps(to + 8 * i,
                             _mm512_insertf32x8(_mm512_castps256_ps512(load(0)), load(1), 1));
    }
#endif
    for (; i < count; ++i)
        __builtin_memcpy(to + 8 * i, from + i * kMostColumns, 8 * sizeof(Element));
}

class Scatter {
   public:
    Scatter(const ConvTransposeParams& p, const Phases& phases) : p_(p), phases_(phases) {}

    // c: a tile of sums, behind the epilogue, of `used` outputs from the n-th on, in `rows` rows.
    void store(const Product& product, int64_t group, const Row* at, int count, int64_t n, int used,
               const float* c, int rows) const {
        if (p_.out.dtype == kFloat32) return store_as(product, group, at, count, n, used, c);
        alignas(64) uint16_t narrow[kMostRows * kMostColumns];
        if (p_.out.dtype == kBFloat16) {
            bfloat16* tile = reinterpret_cast<bfloat16*>(narrow);
            if (phases_.multiplier->narrow)
                phases_.multiplier->narrow(c, rows, narrow);
            else
                for (int i = 0; i < rows * kMostColumns; ++i) from_float(c[i], tile[i]);
            store_as(product, group, at, count, n, used, tile);
        } else {
            float16* tile = reinterpret_cast<float16*>(narrow);
            for (int i = 0; i < rows * kMostColumns; ++i) from_float(c[i], tile[i]);
            store_as(product, group, at, count, n, used, tile);
        }
    }

   private:
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
                        int used, const Element* c) const {
        const ConvTransposeGeometry& g = phases_.geometry;
        const int64_t step = p_.out.stride[0];
        for (int done = 0; done < used;) {
            const auto [phase, channel] = output_of(phases_, product, n + done);
            const int64_t most = g.out_channels - channel;
            const int run = int(used - done < most ? used - done : most);
            const Coordinates& shift = product.shifts[phase];
            Element* out = place<Element>(group, channel, shift);
            int64_t places[kMostRows];
            int rows[kMostRows], there = 0;
            for (int i = 0; i < count; ++i) {
                if (!at[i].interior && !is_inside(at[i].q, shift, g.stride, g.out_size)) continue;
                places[there] = at[i].out;
                rows[there++] = i * kMostColumns + done;
            }
            if (step == 1 && run == kMostColumns)
                for (int i = 0; i < there; ++i)
                    __builtin_memcpy(out + places[i], c + rows[i], kMostColumns * sizeof(Element));
            else if (step == 1)
                for (int i = 0; i < there; ++i)
                    for (int j = 0; j < run; ++j) out[places[i] + j] = c[rows[i] + j];
            else  // a channel at a time: planes lie apart by powers of two, in one set of a cache
                for (int j = 0; j < run; ++j, out += step)
                    for (int i = 0; i < there; ++i) out[places[i]] = c[rows[i] + j];
            done += run;
        }
    }

    // c[position][phase]: the phases of a row of the output side by side.
    template <typename Element>
    void store_phases(const Product& product, int64_t group, const Row* at, int count, int64_t n,
                      int used, const Element* c) const {
        const ConvTransposeGeometry& g = phases_.geometry;
        struct Piece {  // of a panel: neighbours in the output
            int first, count;
            int64_t phase;
            Element* out;
        } pieces[kMostColumns];
        int found = 0;
        for (int done = 0; done < used;) {
            const auto [phase, channel] = output_of(phases_, product, n + done);
            const int most = product.across - int(phase % product.across);
            const int run = used - done < most ? used - done : most;
            pieces[found++] = {done, run, phase,
                               place<Element>(group, channel, product.shifts[phase])};
            done += run;
        }
        const bool dense = product.across == g.stride[2] && p_.out.stride[3] == 1;
        const int64_t along = p_.out.stride[3];
        for (const Piece* piece = pieces; piece < pieces + found; ++piece)
            for (int i = 0; i < count;) {
                Element* to = piece->out + at[i].out;
                const Element* from = c + i * kMostColumns + piece->first;
                if (dense && at[i].interior && piece->count == 8) {
                    int next = i + 1;
                    while (next < count && at[next].interior &&
                           at[next].out == at[next - 1].out + 8)
                        ++next;
                    join_eights(from, next - i, to);
                    i = next;
                    continue;
                }
                if (dense && at[i].interior) {
                    for (int j = 0; j < piece->count; ++j) to[j] = from[j];
                    ++i;
                    continue;
                }
                const int64_t shift = product.shifts[piece->phase][2];
                for (int j = 0; j < piece->count; ++j) {
                    const Coordinates& own = product.shifts[piece->phase + j];
                    if (is_inside(at[i].q, own, g.stride, g.out_size))
                        to[(own[2] - shift) * along] = from[j];
                }
                ++i;
            }
    }

    // c[channel and phase][position]
    template <typename Element>
    void store_rows(const Product& product, int64_t group, const Row* at, int count, int64_t n,
                    int used, const Element* c) const {
        const ConvTransposeGeometry& g = phases_.geometry;
        const int64_t step = p_.out.stride[3], stride = g.stride[2];
        for (int first = 0; first < count;) {  // positions of one row of the output
            int next = first + 1;
            while (next < count && at[next].q[2] == at[next - 1].q[2] + 1) ++next;
            const int run = next - first;
            const Row& row = at[first];
            for (int done = 0; done < used;) {
                const auto [phase, channel] = output_of(phases_, product, n + done);
                const bool pair = product.across == 2 && stride == 2 && step == 1 &&
                                  phase % 2 == 0 && done + 1 < used;
                const Coordinates& shift = product.shifts[phase];
                const int64_t o = row.q[2] * stride + shift[2];  // of the first position
                const int64_t each = pair ? 1 : stride;
                int64_t begin = o < 0 ? (each - 1 - o) / each : 0;
                int64_t end = pair ? 2 * run : run;
                const int64_t room = (g.out_size[2] - o + each - 1) / each;
                if (end > room) end = room;
                const Element* from = c + done * kMostColumns + first;
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
                    interleave(from, from + kMostColumns, run, line);
                    if (begin == 0 && end == 2 * kMostColumns)
                        __builtin_memcpy(to, line, sizeof line);
                    else
                        for (; begin < end; ++begin) to[begin] = line[begin];
                } else if (stride * step == 1) {
                    for (; begin < end; ++begin) to[begin] = from[begin];
                } else {
                    for (; begin < end; ++begin) to[begin * stride * step] = from[begin];
                }
            }
            first = next;
        }
    }

    template <typename Element>
    void store_as(const Product& product, int64_t group, const Row* at, int count, int64_t n,
                  int used, const Element* c) const {
        if (phases_.order == Order::kRows)
            store_rows(product, group, at, count, n, used, c);
        else if (phases_.order == Order::kPhasesInner)
            store_phases(product, group, at, count, n, used, c);
        else
            store_channels(product, group, at, count, n, used, c);
    }

    const ConvTransposeParams& p_;
    const Phases& phases_;
};

}  // namespace
}  // namespace fastgen::FASTGEN_ISA

// float32 tiles on every instruction set. Partial sums are added up, which keeps the rounding error
// small.
#include "multiply.h"

#include "kernels.h"
#include "tile.h"
#include "vector.h"

namespace fastgen::FASTGEN_ISA {
namespace {

constexpr int kRows = kLanes == 16 ? 14 : kLanes == 8 ? 6 : 4;  // as the registers allow
constexpr int kColumns = 2 * kLanes;

// Products of a partial sum. A short sum must not be one chain: PyTorch has one for each tap.
int64_t partial_of(int64_t products) { return products < 256 ? 16 : 64; }

FASTGEN_INLINE Vector multiply_add(float a, Vector b, Vector c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(_mm512_set1_ps(a), b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(_mm256_set1_ps(a), b, c);
#else
    return a * b + c;
#endif
}

template <int R, int V, Way W>
void multiply_tile(const Inputs& x, const float* weights, float* c) {
    constexpr bool kRowsApart = W == Way::kRows, C = W == Way::kColumns;
    Vector sum[R][V];
    for (int i = 0; i < R; ++i)
        for (int v = 0; v < V; ++v) sum[i][v] = Vector{};
    int64_t pitch = x.pitch, pending = 0;
    const char *ahead = x.ahead, *ahead_end = ahead + 64 * x.ahead_lines;
    const int64_t partial = partial_of(x.products);
    const int64_t chunks = x.taps * ((x.depth + partial - 1) / partial);
    const int64_t ahead_step = chunks > 0 ? 64 * ((x.ahead_lines + chunks - 1) / chunks) : 0;
    bool first = !x.add;
    for (int tap = 0; tap < x.taps; ++tap) {
        const float* inputs = static_cast<const float*>(x.base) + x.offsets[tap];
        for (int64_t done = 0; done < x.depth; done += partial) {
            const int64_t count = x.depth - done < partial ? x.depth - done : partial;
            RowPointers<R, float> rows(inputs + done, pitch);
            const float* a = C ? weights : inputs + done * pitch;
            const float* b = C ? inputs + done * pitch : weights;
            for (int64_t k = 0; k < count; ++k) {
                Vector lane[V];
                for (int v = 0; v < V; ++v)
                    lane[v] = *reinterpret_cast<const Vector*>(b + v * kLanes);
                if (kRowsApart)
                    asm volatile("" : "+r"(pitch));  // keeps the addresses as they are written
                for (int i = 0; i < R; ++i) {
                    const float row = kRowsApart ? rows.at(i, pitch) : a[i];
                    for (int v = 0; v < V; ++v) sum[i][v] = multiply_add(row, lane[v], sum[i][v]);
                }
                b += C ? pitch : V * kLanes;
                a += C ? R : pitch;
                if (kRowsApart) rows.next();
            }
            weights = C ? a : b;
            for (int64_t line = 0; line < ahead_step && ahead < ahead_end; line += 64, ahead += 64)
                __builtin_prefetch(ahead, 0, 2);
            pending += count;
            if (pending < partial) continue;
            pending = 0;
            for (int i = 0; i < R; ++i)
                for (int v = 0; v < V; ++v) {
                    Vector* to = reinterpret_cast<Vector*>(c + i * kMostColumns + v * kLanes);
                    *to = first ? sum[i][v] : *to + sum[i][v];
                    sum[i][v] = Vector{};
                }
            first = false;
        }
    }
    if (pending == 0 && !first) return;
    for (int i = 0; i < R; ++i)
        for (int v = 0; v < V; ++v) {
            Vector* to = reinterpret_cast<Vector*>(c + i * kMostColumns + v * kLanes);
            *to = first ? sum[i][v] : *to + sum[i][v];
        }
}

template <Way W, int R = kRows>
void multiply(const Inputs& x, const void* weights, float* c, int rows, int columns) {
    if constexpr (R > 1)
        if (rows < R) return multiply<W, R - 1>(x, weights, c, rows, columns);
    const float* w = static_cast<const float*>(weights);
    columns > kLanes ? multiply_tile<R, 2, W>(x, w, c) : multiply_tile<R, 1, W>(x, w, c);
}

}  // namespace

extern const Multiplier multiplier = {Operands::kFloats,
                                      kRows,
                                      kColumns,
                                      1,
                                      multiply<Way::kRows>,
                                      multiply<Way::kPanels>,
                                      multiply<Way::kColumns>,
                                      nullptr,
                                      nullptr,
                                      nullptr};

}  // namespace fastgen::FASTGEN_ISA

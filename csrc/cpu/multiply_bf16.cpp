// bfloat16 tiles with float32 sums: the dot products of AVX512-BF16, and the tiles of AMX.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernels.h"
#include "multiply.h"

namespace fastgen {
namespace {

void narrow(const float* c, int rows, uint16_t* to) {
    for (int i = 0; i < rows; ++i, c += kMostColumns, to += kMostColumns) {
        const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(c + 16), _mm512_loadu_ps(c));
        _mm512_storeu_si512(to, (__m512i)both);
    }
}

}  // namespace

// ---- avx512_bf16 ------------------------------------------------------------------------------

namespace avx512_bf16 {
namespace {

constexpr int kRows = 14, kColumns = 32;

template <int R, int V, Way W>
void multiply_tile(const Inputs& x, const uint32_t* weights, float* c) {
    constexpr bool kRowsApart = W == Way::kRows, C = W == Way::kColumns;
    __m512 sum[R][V];
    for (int i = 0; i < R; ++i)
        for (int v = 0; v < V; ++v)
            sum[i][v] =
                x.add ? _mm512_loadu_ps(c + i * kMostColumns + v * 16) : _mm512_setzero_ps();
    constexpr int kWords = kRowsApart ? 2 : 1;  // numbers of a word
    int64_t pitch = x.pitch / kWords;
    for (int tap = 0; tap < x.taps; ++tap) {
        const uint32_t* inputs = static_cast<const uint32_t*>(x.base) + x.offsets[tap] / kWords;
        RowPointers<R, uint32_t> rows(inputs, pitch);
        const uint32_t *a = C ? weights : inputs, *b = C ? inputs : weights;
        for (int64_t k = 0; k < x.depth; k += 2) {
            __m512i lane[V];
            for (int v = 0; v < V; ++v) lane[v] = _mm512_loadu_si512(b + v * 16);
            if (kRowsApart)
                asm volatile("" : "+r"(pitch));  // keeps the addresses as they are written
            for (int i = 0; i < R; ++i) {
                const __m512i row = _mm512_set1_epi32(int(kRowsApart ? rows.at(i, pitch) : a[i]));
                for (int v = 0; v < V; ++v)
                    sum[i][v] = _mm512_dpbf16_ps(sum[i][v], (__m512bh)row, (__m512bh)lane[v]);
            }
            b += C ? pitch : V * 16;
            a += C ? R : pitch;
            if (kRowsApart) rows.next();
        }
        weights = C ? a : b;
    }
    for (int i = 0; i < R; ++i)
        for (int v = 0; v < V; ++v) _mm512_storeu_ps(c + i * kMostColumns + v * 16, sum[i][v]);
}

template <Way W, int R = kRows>
void multiply(const Inputs& x, const void* weights, float* c, int rows, int columns) {
    if constexpr (R > 1)
        if (rows < R) return multiply<W, R - 1>(x, weights, c, rows, columns);
    const uint32_t* w = static_cast<const uint32_t*>(weights);
    columns > 16 ? multiply_tile<R, 2, W>(x, w, c) : multiply_tile<R, 1, W>(x, w, c);
}

}  // namespace

extern const Multiplier multiplier = {
    Operands::kPairs,        kRows,  kColumns, 2,      multiply<Way::kRows>, multiply<Way::kPanels>,
    multiply<Way::kColumns>, narrow, nullptr,  nullptr};

}  // namespace avx512_bf16

// ---- amx --------------------------------------------------------------------------------------

namespace amx {
namespace {

constexpr int kTile = 512;  // bfloat16 of one tile

struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

const Configuration configuration;  // in memory: GCC does not see that all of it is read

void begin() { _tile_loadconfig(&configuration); }

void end() { _tile_release(); }

// A tile of c for each 16 rows and 16 columns: c 0 to 3, a 4 and 5, b 6 and 7. A and B are the
// halves beside each other. C: inputs as columns, and weights as rows.
template <int A, int B, bool C>
void multiply_tiles(const Inputs& x, const uint16_t* weights, float* c) {
    constexpr int kPitch = kMostColumns * 4;
    if (x.add) {
        _tile_loadd(0, c, kPitch);
        if constexpr (B == 2) _tile_loadd(1, c + 16, kPitch);
        if constexpr (A == 2) _tile_loadd(2, c + 16 * kMostColumns, kPitch);
        if constexpr (A == 2 && B == 2) _tile_loadd(3, c + 16 * kMostColumns + 16, kPitch);
    } else {
        _tile_zero(0);
        if constexpr (B == 2) _tile_zero(1);
        if constexpr (A == 2) _tile_zero(2);
        if constexpr (A == 2 && B == 2) _tile_zero(3);
    }
    constexpr int64_t kWeights = kTile * (C ? A : B);
    const int64_t bytes = x.pitch * (C ? 4 : 2);  // from row to row of a tile
    const int64_t step = C ? 16 * bytes : 64, half = C ? 64 : 16 * bytes;
    const int64_t steps = x.taps * (x.depth / 32);
    const int64_t share = steps > 0 ? (x.ahead_lines + steps - 1) / steps * 64 : 0;
    const char *ahead = x.ahead, *ahead_end = ahead + 64 * x.ahead_lines;
    for (int tap = 0; tap < x.taps; ++tap) {
        const char* inputs = static_cast<const char*>(x.base) + x.offsets[tap] * (C ? 4 : 2);
        for (int64_t k = 0; k < x.depth; k += 32, inputs += step, weights += kWeights) {
            const void *a = C ? static_cast<const void*>(weights) : inputs,
                       *b = C ? static_cast<const void*>(inputs) : weights;
            const int64_t a_bytes = C ? 64 : bytes, b_bytes = C ? bytes : 64;
            _tile_loadd(4, a, a_bytes);
            _tile_loadd(6, b, b_bytes);
            if constexpr (B == 2)
                _tile_loadd(7, static_cast<const char*>(b) + (C ? half : 2 * kTile), b_bytes);
            if constexpr (A == 2)
                _tile_loadd(5, static_cast<const char*>(a) + (C ? 2 * kTile : half), a_bytes);
            const char* until = ahead_end - ahead < share ? ahead_end : ahead + share;
            for (; ahead < until; ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
            _tile_dpbf16ps(0, 4, 6);
            if constexpr (B == 2) _tile_dpbf16ps(1, 4, 7);
            if constexpr (A == 2) _tile_dpbf16ps(2, 5, 6);
            if constexpr (A == 2 && B == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, kPitch);
    if constexpr (B == 2) _tile_stored(1, c + 16, kPitch);
    if constexpr (A == 2) _tile_stored(2, c + 16 * kMostColumns, kPitch);
    if constexpr (A == 2 && B == 2) _tile_stored(3, c + 16 * kMostColumns + 16, kPitch);
}

template <bool C>
void multiply(const Inputs& x, const void* weights, float* c, int rows, int columns) {
    const uint16_t* w = static_cast<const uint16_t*>(weights);
    if (rows > 16)
        columns > 16 ? multiply_tiles<2, 2, C>(x, w, c) : multiply_tiles<2, 1, C>(x, w, c);
    else
        columns > 16 ? multiply_tiles<1, 2, C>(x, w, c) : multiply_tiles<1, 1, C>(x, w, c);
}

// Bits of CPUID leaf 7's edx.
bool has_tiles() {
    unsigned a = 7, b = 0, c = 0, d = 0;
    asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return (d >> 22 & 1) && (d >> 24 & 1);
}

}  // namespace

// The system gives a process the state of the tiles only when it is asked for.
bool is_permitted() {
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool permitted = has_tiles() && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
    return permitted;
}

extern const Multiplier multiplier = {
    Operands::kTiles, 32,     kMostColumns, 32, multiply<false>, multiply<false>,
    multiply<true>,   narrow, begin,        end};

}  // namespace amx
}  // namespace fastgen

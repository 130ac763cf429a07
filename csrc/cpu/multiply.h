// Tile products, of which the transposed convolution is made: positions by outputs, summed over
// taps and input channels. Every sum runs in one order, whatever lies beside it.
#pragma once

#include <stdint.h>

namespace fastgen {

// What a tile multiplies.
enum class Operands {
    kFloats,  // weights[k][n]
    kPairs,   // of bfloat16: weights[k / 2][n][2]
    kTiles  // of bfloat16: weights[k / 32][n / 16][16][32] as rows, [k / 32][n / 16][16][16][2] as
            // columns
};

// A tile's inputs: of each tap, `depth` channels at `base` + its offset: [position][channel], or
// [channel][position], of bfloat16 [pair of channels][position][2]; `pitch` from row to row of it.
// Offsets and pitch count numbers in the first, in the second words: floats, or pairs.
struct Inputs {
    const void* base;
    const int64_t* offsets;
    int64_t pitch;
    int taps;
    int64_t depth;
    int64_t products;  // of the whole sum, which may go on from one part of the taps to the next
    bool add;          // to what c holds
    // What to fetch into the second cache meanwhile: the weights of a later tile.
    const char* ahead;
    int64_t ahead_lines;
};

struct Multiplier {
    Operands operands;
    int rows;     // of a tile, at most
    int columns;  // of a tile; where it has half of them or fewer, half
    int depth;    // what the channels of a tap are rounded up to
    // c (rows, kMostColumns) = inputs as rows by weights as columns; the inputs [position][channel]
    void (*by_rows)(const Inputs&, const void* weights, float* c, int rows, int columns);
    // the same; the inputs [channel][position], but for kTiles, which have them the other way
    void (*by_panels)(const Inputs&, const void* weights, float* c, int rows, int columns);
    // c = weights as rows by inputs as columns
    void (*by_columns)(const Inputs&, const void* weights, float* c, int rows, int columns);
    // to (rows, kMostColumns) = c in bfloat16, denormals as zero; null: without an instruction for
    // it
    void (*narrow)(const float* c, int rows, uint16_t* to);
    void (*begin)();  // before and behind a thread's tiles; null: nothing is to be done
    void (*end)();
};

// Rows of a matrix, three to a base: addresses that the processor adds up by itself.
template <int R, typename T>
struct RowPointers {
    static constexpr int kBases = (R + 2) / 3;
    const T* base[kBases];

    RowPointers(const T* first, int64_t pitch) {
        for (int i = 0; i < kBases; ++i) base[i] = first + 3 * i * pitch;
    }
    __attribute__((always_inline)) T at(int row, int64_t pitch) const {
        return base[row / 3][row % 3 * pitch];
    }
    __attribute__((always_inline)) void next() {
        for (int i = 0; i < kBases; ++i) ++base[i];
    }
};

enum class Way { kRows, kPanels, kColumns };

constexpr int kMostRows = 32, kMostColumns = 32;  // of any Multiplier

}  // namespace fastgen

// How a call of the transposed convolution is cut into tasks.
// Patches: a task is some of the patches of one product (winograd.h), laid out once a patch.
// Exact: a task is a block of positions of one product, laid out once a tap, with no gap. For small
// inputs, where rows of a few positions would be mostly edges.
// Bands: a task is a part of the input with its edges, laid out once for all products and taps; a
// row of zeros between its rows makes every tap of a tile the same tile, moved.
#pragma once

#include <vector>

#include "phases.h"

namespace fastgen {

// Where inputs go: [channel][position], of floats or of words of two bfloat16 channels; or
// [position][channel], of floats or bfloat16.
enum class Place { kChannels, kPositions };

// Exact, or patches, of one product.
struct Cut {
    int64_t positions;  // all of them; of patches: the pieces of rows that they are in
    int64_t across;     // patches: pieces of a row
    int64_t width;      // patches: of a piece, but for the last
    int tile;           // exact: positions of a tile, but for the last
    int64_t block;      // tiles, or pieces, of a block
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

    int64_t halo(int dim) const { return offset[dim].end - offset[dim].low; }
};

struct Cutting {
    Place place;
    int64_t word;           // bytes of a word
    int64_t pitch;          // words from position to position, in [position][channel]
    int64_t words;          // of a position
    int most;               // positions of a tile
    bool fixed;             // that every tile has as many, but for the last
    bool patches, banded;   // or exact
    Bands bands;            // where it is
    std::vector<Cut> cuts;  // of the products, where it is not
    int64_t tasks;

    // Positions of a tile of so many.
    int tile_of(int64_t positions) const {
        const int64_t tiles = (positions + most - 1) / most;
        return fixed ? most : int((positions + tiles - 1) / tiles);
    }

    // Words of a tap of a tile that is laid out by itself.
    int64_t tap_words(int tile) const {
        return words * (place == Place::kPositions ? (tile + 15) / 16 * 16 : tile);
    }
};

// Made and ended here: the library's functions are not to be compiled for an instruction set.
const Cutting* new_cutting(const Phases& phases, int64_t batch, int threads);
void delete_cutting(const Cutting* cutting);

}  // namespace fastgen

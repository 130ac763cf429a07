// The matrix product of a transposed convolution: every weight tap times every input position, with
// the weights as they lie in memory. Written order, no contraction: the same bits on every
// instruction set. Sums of kDepth products are added up, which keeps the rounding error small.
#include "kernels.h"
#include "tile.h"

namespace fastgen::FASTGEN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 12;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kTileRows = 6;
#else
constexpr int kLanes = 4, kTileRows = 4;
#endif
constexpr int64_t kDepth = 32;             // products of one partial sum
constexpr int64_t kBlockColumns = 128;     // of one task
constexpr int64_t kBlockElements = 32768;  // of out, of one task

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// c[i, j] = (first ? 0 : c[i, j]) + sum over k < depth of a[k, i] b[k, j], j over V vectors of
// lanes.
template <int R, int V>
FASTGEN_INLINE void multiply_tile(const float* a, int64_t a_row, const float* b, int64_t b_row,
                                  float* c, int64_t c_row, int64_t depth, bool first) {
    Vector sum[R][V];
    for (int i = 0; i < R; ++i)
        for (int v = 0; v < V; ++v) sum[i][v] = Vector{};
    for (int64_t k = 0; k < depth; ++k, a += a_row, b += b_row) {
        // What the next block of k starts with: rows lie too far apart for the processor to guess.
        __builtin_prefetch(a + kDepth * a_row);
        Vector lane[V];
        for (int v = 0; v < V; ++v) lane[v] = *reinterpret_cast<const Vector*>(b + v * kLanes);
        for (int i = 0; i < R; ++i)
            for (int v = 0; v < V; ++v) sum[i][v] = sum[i][v] + a[i] * lane[v];
    }
    for (int i = 0; i < R; ++i)
        for (int v = 0; v < V; ++v) {
            Vector* to = reinterpret_cast<Vector*>(c + i * c_row + v * kLanes);
            *to = first ? sum[i][v] : *to + sum[i][v];
        }
}

template <int R>
void multiply_rows(const ProductParams& p, int64_t sample, int64_t row, int64_t column,
                   int64_t columns, int64_t k, int64_t depth) {
    const float* a = p.weight + k * p.rows + row;
    const float* b = p.input + (sample * p.depth + k) * p.columns + column;
    float* c = p.out + (sample * p.rows + row) * p.columns + column;
    int64_t j = 0;
    for (; j + 2 * kLanes <= columns; j += 2 * kLanes)
        multiply_tile<R, 2>(a, p.rows, b + j, p.columns, c + j, p.columns, depth, k == 0);
    for (; j < columns; j += kLanes)
        multiply_tile<R, 1>(a, p.rows, b + j, p.columns, c + j, p.columns, depth, k == 0);
}

void multiply_block(const ProductParams& p, int64_t sample, int64_t row, int64_t row_end,
                    int64_t column, int64_t columns) {
    for (int64_t k = 0; k < p.depth; k += kDepth) {
        const int64_t depth = p.depth - k < kDepth ? p.depth - k : kDepth;
        int64_t r = row;
        for (; r + kTileRows <= row_end; r += kTileRows)
            multiply_rows<kTileRows>(p, sample, r, column, columns, k, depth);
        for (; r < row_end; ++r) multiply_rows<1>(p, sample, r, column, columns, k, depth);
    }
}

// One input position: rows are the lanes, and nothing is read again.
void multiply_vector(const ProductParams& p, int64_t sample, int64_t row, int64_t row_end) {
    alignas(64) float sum[kBlockElements / kBlockColumns];
    const int64_t rows = row_end - row;
    for (int64_t k = 0; k < p.depth; k += kDepth) {
        const int64_t depth = p.depth - k < kDepth ? p.depth - k : kDepth;
        for (int64_t r = 0; r < rows; ++r) sum[r] = 0.0f;
        const float* w = p.weight + k * p.rows + row;
        const float* x = p.input + sample * p.depth + k;
        int64_t i = 0;
        for (; i + 4 <= depth; i += 4) {
            const float *w0 = w + i * p.rows, *w1 = w0 + p.rows, *w2 = w1 + p.rows,
                        *w3 = w2 + p.rows;
            const float x0 = x[i], x1 = x[i + 1], x2 = x[i + 2], x3 = x[i + 3];
            for (int64_t r = 0; r < rows; ++r)
                sum[r] = (((sum[r] + x0 * w0[r]) + x1 * w1[r]) + x2 * w2[r]) + x3 * w3[r];
        }
        for (; i < depth; ++i)
            for (int64_t r = 0; r < rows; ++r) sum[r] = sum[r] + x[i] * w[i * p.rows + r];
        float* to = p.out + sample * p.rows + row;
        for (int64_t r = 0; r < rows; ++r) to[r] = k == 0 ? sum[r] : to[r] + sum[r];
    }
}

}  // namespace

void conv_transpose_product(const ProductParams& p, int threads) {
    const bool vector = p.columns == 1;
    const int64_t width = vector || p.columns > kBlockColumns ? kBlockColumns : p.columns;
    int64_t height = kBlockElements / width;
    if (!vector) height = (height + kTileRows - 1) / kTileRows * kTileRows;
    const int64_t row_blocks = (p.rows + height - 1) / height;
    const int64_t column_blocks = (p.columns + width - 1) / width;
    const int64_t blocks = row_blocks * column_blocks;
    parallel_for(p.batch * blocks, threads, [&](int64_t begin, int64_t end) {
        IeeeMode ieee;
        for (int64_t index = begin; index < end; ++index) {
            const int64_t sample = index / blocks, block = index % blocks;
            const int64_t row = block % row_blocks * height, column = block / row_blocks * width;
            const int64_t row_end = row + height < p.rows ? row + height : p.rows;
            const int64_t left = p.columns - column;
            if (vector)
                multiply_vector(p, sample, row, row_end);
            else
                multiply_block(p, sample, row, row_end, column, left < width ? left : width);
        }
    });
}

}  // namespace fastgen::FASTGEN_ISA

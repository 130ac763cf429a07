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
constexpr int kPanel = 48;              // rows packed together: whole cache lines of the weights
constexpr int64_t kDepth = 32;          // products of one partial sum
constexpr int64_t kBlockColumns = 128;  // of one task
constexpr int64_t kBlockElements = 32768;

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// c[i, j] = (first ? 0 : c[i, j]) + sum over k < depth of a[k, i] b[k, j], j over V vectors of lanes;
// the first `rows` of R rows are stored.
template <int R, int V>
FASTGEN_INLINE void multiply_tile(const float* a, const float* b, int64_t b_row, float* c,
                                  int64_t c_row, int64_t rows, int64_t depth, bool first) {
    Vector sum[R][V];
    for (int i = 0; i < R; ++i)
        for (int v = 0; v < V; ++v) sum[i][v] = Vector{};
    for (int64_t k = 0; k < depth; ++k, a += kPanel, b += b_row) {
        Vector lane[V];
        for (int v = 0; v < V; ++v) lane[v] = *reinterpret_cast<const Vector*>(b + v * kLanes);
        for (int i = 0; i < R; ++i)
            for (int v = 0; v < V; ++v) sum[i][v] = sum[i][v] + a[i] * lane[v];
    }
    for (int i = 0; i < R; ++i)
        for (int v = 0; v < V; ++v) {
            if (i >= rows) continue;
            Vector* to = reinterpret_cast<Vector*>(c + i * c_row + v * kLanes);
            *to = first ? sum[i][v] : *to + sum[i][v];
        }
}

// Rows that lie a power of two apart share few cache sets, so what is read again is packed.
void pack(float* to, int64_t width, const float* from, int64_t from_row, int64_t columns,
          int64_t depth) {
    for (int64_t k = 0; k < depth; ++k, to += width, from += from_row) {
        for (int64_t i = 0; i < columns; ++i) to[i] = from[i];
        for (int64_t i = columns; i < width; ++i) to[i] = 0.0f;
    }
}

void multiply_block(const ProductParams& p, int64_t row, int64_t row_end, int64_t column,
                    int64_t columns) {
    alignas(64) float a[kDepth * kPanel], b[kDepth * kBlockColumns];
    for (int64_t k = 0; k < p.depth; k += kDepth) {
        const int64_t depth = p.depth - k < kDepth ? p.depth - k : kDepth;
        pack(b, columns, p.input + k * p.input_stride + column, p.input_stride, columns, depth);
        for (int64_t panel = row; panel < row_end; panel += kPanel) {
            const int64_t rows = row_end - panel < kPanel ? row_end - panel : kPanel;
            pack(a, kPanel, p.weight + k * p.rows + panel, p.rows, rows, depth);
            for (int64_t r = 0; r < rows; r += kTileRows) {
                float* c = p.out + (panel + r) * p.columns + column;
                int64_t j = 0;
                for (; j + 2 * kLanes <= columns; j += 2 * kLanes)
                    multiply_tile<kTileRows, 2>(a + r, b + j, columns, c + j, p.columns, rows - r,
                                                depth, k == 0);
                for (; j < columns; j += kLanes)
                    multiply_tile<kTileRows, 1>(a + r, b + j, columns, c + j, p.columns, rows - r,
                                                depth, k == 0);
            }
        }
    }
}

// One input position: rows are the lanes, and nothing is read again.
void multiply_vector(const ProductParams& p, int64_t row, int64_t row_end) {
    alignas(64) float sum[kBlockElements / kBlockColumns];
    const int64_t rows = row_end - row;
    for (int64_t k = 0; k < p.depth; k += kDepth) {
        const int64_t depth = p.depth - k < kDepth ? p.depth - k : kDepth;
        for (int64_t r = 0; r < rows; ++r) sum[r] = 0.0f;
        const float* w = p.weight + k * p.rows + row;
        const float* x = p.input + k * p.input_stride;
        int64_t i = 0;
        for (; i + 4 <= depth; i += 4) {
            const float *w0 = w + i * p.rows, *w1 = w0 + p.rows, *w2 = w1 + p.rows,
                        *w3 = w2 + p.rows;
            const float x0 = x[i * p.input_stride], x1 = x[(i + 1) * p.input_stride],
                        x2 = x[(i + 2) * p.input_stride], x3 = x[(i + 3) * p.input_stride];
            for (int64_t r = 0; r < rows; ++r)
                sum[r] = (((sum[r] + x0 * w0[r]) + x1 * w1[r]) + x2 * w2[r]) + x3 * w3[r];
        }
        for (; i < depth; ++i)
            for (int64_t r = 0; r < rows; ++r)
                sum[r] = sum[r] + x[i * p.input_stride] * w[i * p.rows + r];
        float* to = p.out + row;
        for (int64_t r = 0; r < rows; ++r) to[r] = k == 0 ? sum[r] : to[r] + sum[r];
    }
}

}  // namespace

void conv_transpose_product(const ProductParams& p, int threads) {
    const bool vector = p.columns == 1;
    const int64_t width = vector || p.columns > kBlockColumns ? kBlockColumns : p.columns;
    int64_t height = kBlockElements / width;
    if (!vector) height = height / kPanel * kPanel;
    const int64_t row_blocks = (p.rows + height - 1) / height;
    const int64_t column_blocks = (p.columns + width - 1) / width;
    parallel_for(row_blocks * column_blocks, threads, [&](int64_t begin, int64_t end) {
        IeeeMode ieee;
        for (int64_t index = begin; index < end; ++index) {
            const int64_t row = index % row_blocks * height, column = index / row_blocks * width;
            const int64_t row_end = row + height < p.rows ? row + height : p.rows;
            const int64_t left = p.columns - column;
            if (vector)
                multiply_vector(p, row, row_end);
            else
                multiply_block(p, row, row_end, column, left < width ? left : width);
        }
    });
}

}  // namespace fastgen::FASTGEN_ISA

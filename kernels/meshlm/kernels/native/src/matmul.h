// Products of activations with packed matrices, a block of 16 output rows at a time.
//
// Batch invariance: a token's result is summed over groups (or columns) in ascending order, whatever other tokens are
// multiplied with it. Within a group sums are integers, hence exact.
#pragma once
#include "matrix.h"
#include "simd.h"

// Tokens that one pass over a block's weights serves: as many as the registers hold sums for beside the weights.
#if defined(__AVX512F__)
constexpr int MAX_TILE = 8;
#else
constexpr int MAX_TILE = 4;
#endif

// out[i] = rows [16 * block, 16 * block + 16) of the product with token tokens[i]; 1 <= count <= MAX_TILE.
void multiply_tile(const Matrix& m, int block, const Activations& x, const int32_t* tokens, int count, V16* out);

// One row of the matrix as floats: out[cols].
void read_row(const Matrix& m, int row, float* out);

// Calls body(first, width, tokens) for tiles of the tokens index[0, count), or of 0..count - 1 without an index.
template <class Body>
void each_tile_of(const int32_t* index, int count, Body body) {
    int32_t tokens[MAX_TILE];
    for (int first = 0, width; first < count; first += width) {
        const int left = count - first, passes = (left + MAX_TILE - 1) / MAX_TILE;
        width = (left + passes - 1) / passes;  // 9 tokens are 5 and 4, not 8 and 1
        for (int i = 0; i < width; i++) tokens[i] = index ? index[first + i] : first + i;
        body(first, width, tokens);
    }
}

// Blocks whose weights stay in the first cache while tile after tile of tokens is multiplied with them: what many tokens
// write then lies together. Few tokens go block by block, so that memory is read evenly.
static inline int blocks_at_once(const Matrix& m, int count) {
    constexpr size_t ROOM = 24 << 10;
    const size_t fit = ROOM / block_bytes(m);
    return count <= 4 * MAX_TILE || fit < 2 ? 1 : fit < 8 ? (int)fit : 8;
}

// Calls sink(block, i, v) for the blocks [begin, end) and i in [0, count), v being that block of the product with token
// index[i] (or token i without an index). Sinks may not write what `x` holds.
template <class Sink>
void multiply_blocks(const Matrix& m, int begin, int end, const Activations& x, const int32_t* index, int count, Sink sink) {
    V16 out[MAX_TILE];
    for (int from = begin, step = blocks_at_once(m, count); from < end; from += step) {
        const int to = from + step < end ? from + step : end;
        each_tile_of(index, count, [&](int first, int width, const int32_t* tokens) {
            for (int block = from; block < to; block++) {
                multiply_tile(m, block, x, tokens, width, out);
                for (int i = 0; i < width; i++) sink(block, first + i, out[i]);
            }
        });
    }
}

template <class Sink>
void multiply_blocks(const Matrix& m, int begin, int end, const Activations& x, int rows, Sink sink) {
    multiply_blocks(m, begin, end, x, nullptr, rows, sink);
}

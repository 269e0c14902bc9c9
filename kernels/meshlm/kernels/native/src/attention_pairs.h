// The products of attention over a cache in pairs of bfloat16 (`pairs.h`). A row's sum goes over pairs of channels or tokens
// that begin at even places, in ascending order.
#pragma once
#include "kv_tile.h"
#include "pairs.h"

#if defined(__AVX512F__)

// scores[r][t] = q[r] . key[t] over P pieces of 16 keys from piece `first` on; q is [head_dim / 2][R] pairs of channels.
template <int R, int P>
static inline void multiply_key_pairs(const uint32_t* q, const KvTile& tile, int first, int dim, float* scores) {
    V acc[R][P];
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) acc[r][p] = zero();
    for (int d = 0; d < dim / 2; d++) {
        Pairs key[P];
        for (int p = 0; p < P; p++) key[p] = load_pairs(tile.keys[first + p] + d * 64);
        for (int r = 0; r < R; r++) {
            const Pairs x = set1_pair(q[d * R + r]);
            for (int p = 0; p < P; p++) acc[r][p] = add_pairs(acc[r][p], x, key[p]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) store(scores + r * KV_TILE + p * PIECE, acc[r][p]);
}

template <int R>
static inline void score_pairs(const uint32_t* q, const KvTile& tile, int dim, int first, int last, float* scores) {
    int p = first;
    for (; p + WIDE_PIECES <= last; p += WIDE_PIECES)
        multiply_key_pairs<R, WIDE_PIECES>(q, tile, p, dim, scores + p * PIECE);
    for (; p < last; p++) multiply_key_pairs<R, 1>(q, tile, p, dim, scores + p * PIECE);
}

// out[r] = out[r] * corrections[r] + sum of p[r][t] * value[t] over t in [begin, end), C vectors of channels. A row of p is
// KV_TILE bfloat16 in the room of as many floats. What a token outside of [begin, end) holds does not matter.
template <int R, int C>
static inline void multiply_value_pairs(
    float* out, int width, const float* corrections, const float* p, const KvTile& tile, int channel, int begin, int end
) {
    V acc[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) acc[r][c] = mul(load(out + r * width + channel + c * W), set1(corrections[r]));
    auto add_two = [&](int t, auto choose) {  // tokens t and t + 1, t being even
        const uint16_t* value = (const uint16_t*)tile.values[t / PIECE] + ((size_t)(t % PIECE / 2) * width + channel) * 2;
        Pairs v[C];
        for (int c = 0; c < C; c++) v[c] = choose(load_pairs(value + c * 2 * W));
        for (int r = 0; r < R; r++) {
            const Pairs x = set1_pair(((const uint32_t*)(p + r * KV_TILE))[t / 2]);
            for (int c = 0; c < C; c++) acc[r][c] = add_pairs(acc[r][c], x, v[c]);
        }
    };
    if (begin < end && begin % 2) add_two(begin++ - 1, only_second);
    for (; begin + 2 <= end; begin += 2) add_two(begin, [](Pairs v) { return v; });
    if (begin < end) add_two(begin, only_first);
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(out + r * width + channel + c * W, acc[r][c]);
}

template <int R>
static inline void add_value_pairs(
    float* out, int width, const float* corrections, const float* p, const KvTile& tile, int begin, int end
) {
    int channel = 0;
    for (; channel + 4 * W <= width; channel += 4 * W)
        multiply_value_pairs<R, 4>(out, width, corrections, p, tile, channel, begin, end);
    for (; channel < width; channel += W)
        multiply_value_pairs<R, 1>(out, width, corrections, p, tile, channel, begin, end);
}

#endif

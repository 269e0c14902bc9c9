// One tile of attention: scores, a step of the online softmax, and the sums of values, for a few queries at a time whose
// sums fill the registers. See `attention.h` for what it is part of.
#pragma once
#include <algorithm>
#include <type_traits>

#include "attention_pairs.h"
#include "kv_cache.h"
#include "kv_read.h"
#include "kv_tile.h"

constexpr int TILE_ROWS = 32;  // query rows of a call
constexpr int QUERIES = 6;     // (row, head) pairs computed together: their sums fill the registers
constexpr float NOTHING = -3.0e38f;  // below every score: the maximum of no keys

// Rows [row, row + count) of the batch are the cache indices [start, start + count) of one sequence. The row at cache index
// c sees the indices [0, c] or, with a window w, the last w of them and those below `sinks`.
struct Span {
    int32_t row;
    int32_t count;
    int32_t start;
    int32_t sinks;
    const int32_t* table;
};

// The queries of one kv head's group, and what they read.
struct Attention {
    const KvCache* cache;
    int layer;
    int kv_head;
    int group;  // query heads to a kv head
    float scale;
    int window;              // 0: none
    const float* q;          // [batch][q_stride], head h at h * head_dim
    const float* q_rebased;  // the same, used at cache indices below `sinks`; or null
    int q_stride;
};

// What a call works in; all of it lies in its scratch. M is the number of (row, head) pairs.
struct AttentionWork {
    float* q;          // [M][head_dim], times scale, by blocks of QUERIES transposed; of BF16_PAIRS half as long
    float* q_rebased;  // the same
    float* out;        // [M][width], of the segment
    float* top;        // [M] greatest score so far
    float* total;      // [M][W] partial sums of exp(score - top)
    float* segment;    // [M][partial_floats], what the segment gave
    float* all;        // [M][partial_floats], of the segments so far
    float* scores;     // [QUERIES][KV_TILE]
    float* rebased;    // [QUERIES][KV_TILE]
    float* keys;       // [TILE_PIECES][head_dim][PIECE]
    float* values;     // [TILE_PIECES][PIECE][width]
    float* key_scales; // [KV_TILE]
    float* value_scales;
};

static inline AttentionWork attention_work(const KvCache& c, int pairs, float* at) {
    size_t dim = c.head_dim, width = kv_width(c), m = (size_t)(pairs + 15) / 16 * 16;
    auto take = [&at](size_t n) { float* p = at; at += (n + 15) / 16 * 16; return p; };
    AttentionWork w;
    w.q = take(m * dim);
    w.q_rebased = take(m * dim);
    w.out = take(m * width);
    w.top = take(m);
    w.total = take(m * W);
    w.segment = take(m * (width + 2));
    w.all = take(m * (width + 2));
    w.scores = take(QUERIES * KV_TILE);
    w.rebased = take(QUERIES * KV_TILE);
    w.keys = take(dim * KV_TILE);
    w.values = take(width * KV_TILE);
    w.key_scales = take(KV_TILE);
    w.value_scales = take(KV_TILE);
    return w;
}

// Bytes of scratch for calls with up to `rows` query rows; it should be 64-byte aligned.
static inline size_t attention_scratch(const KvCache& c, int group, int rows = TILE_ROWS) {
    size_t dim = c.head_dim, width = kv_width(c), m = ((size_t)rows * group + 15) / 16 * 16;
    return sizeof(float) * (m * (2 * dim + 3 * width + 5 + W) + (2 * QUERIES + 2 + dim + width) * KV_TILE + 16 * 16);
}

// Pieces [first, last) of the tile at cache index `from`. Formats with cheap loads are converted only where `many` queries
// share the work.
static inline KvTile read_tile(
    const Attention& a, const int32_t* table, int from, int first, int last, bool many, AttentionWork& w
) {
    const KvCache& c = *a.cache;
    PieceLayout part = piece_layout(c);
    const bool floats = c.type == KV_F32 || c.type == KV_INT4 || (many && c.type != KV_BF16_PAIRS);
    KvTile tile{from, first, last, floats, {}, {}, nullptr, nullptr};
    size_t dim = c.head_dim, width = kv_width(c);
    for (int p = first; p < last; p++) {
        const uint8_t* piece = kv_piece(c, a.layer, a.kv_head, table, from + p * PIECE);
        tile.keys[p] = piece;
        tile.values[p] = piece + part.values;
        if (c.type >= KV_INT8) std::memcpy(w.key_scales + p * PIECE, piece + part.key_scales, PIECE * sizeof(float));
        if (c.type == KV_INT8) std::memcpy(w.value_scales + p * PIECE, piece + part.value_scales, PIECE * sizeof(float));
        if (!tile.floats || c.type == KV_F32) continue;
        float* keys = w.keys + (size_t)p * dim * PIECE;
        float* values = w.values + (size_t)p * PIECE * width;
        read_keys(c, piece, keys);
        read_values(c, piece, part, values);
        tile.keys[p] = (const uint8_t*)keys;
        tile.values[p] = (const uint8_t*)values;
    }
    if (c.type >= KV_INT8) tile.key_scales = w.key_scales;
    if (c.type == KV_INT8) tile.value_scales = w.value_scales;
    return tile;
}

// Calls f with the compile-time constant r, 1 <= r <= R.
template <int R, class F>
static inline void with_constant(int r, F f) {
    if constexpr (R > 1) {
        if (r < R) return with_constant<R - 1>(r, f);
    }
    f(std::integral_constant<int, R>());
}

// scores[r][t] = q[r] . key[t] over P pieces of 16 keys; q is [head_dim][R].
template <int R, int P, class Source>
static inline void multiply_keys(const float* q, const uint8_t* const* pieces, int dim, float* scores) {
    constexpr int C = PIECE / W;
    const typename Source::Code* keys[P];
    for (int p = 0; p < P; p++) keys[p] = (const typename Source::Code*)pieces[p];
    V acc[R][P * C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < P * C; c++) acc[r][c] = zero();
    for (int d = 0; d < dim; d++) {
        V key[P * C];
        for (int p = 0; p < P; p++)
            for (int c = 0; c < C; c++) key[p * C + c] = Source::load(keys[p] + d * PIECE + c * W);
        for (int r = 0; r < R; r++) {
            V x = set1(q[d * R + r]);
            for (int c = 0; c < P * C; c++) acc[r][c] = fma(x, key[c], acc[r][c]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < P * C; c++) store(scores + r * KV_TILE + c * W, acc[r][c]);
}

template <int R, class Source>
static inline void score_floats(const float* q, const KvTile& tile, int dim, int first, int last, float* scores) {
    int p = first;
    for (; p + WIDE_PIECES <= last; p += WIDE_PIECES)
        multiply_keys<R, WIDE_PIECES, Source>(q, tile.keys + p, dim, scores + p * PIECE);
    for (; p < last; p++) multiply_keys<R, 1, Source>(q, tile.keys + p, dim, scores + p * PIECE);
}

template <class Source>
constexpr bool PAIRED = std::is_same_v<Source, PairSource>;

template <int R, class Source>
static inline void score_pieces(const float* q, const KvTile& tile, int dim, int first, int last, float* scores) {
#if defined(__AVX512F__)
    if constexpr (PAIRED<Source>) return score_pairs<R>((const uint32_t*)q, tile, dim, first, last, scores);
    else
#endif
        score_floats<R, Source>(q, tile, dim, first, last, scores);
    if (!tile.key_scales) return;
    for (int r = 0; r < R; r++)
        for (int t = first * PIECE; t < last * PIECE; t += W)
            store(scores + r * KV_TILE + t, mul(load(scores + r * KV_TILE + t), load(tile.key_scales + t)));
}

// Which of a tile's keys a row sees: [0, sinks) and [low, high) of 64, sinks <= low.
struct Visible {
    int sinks, low, high;
    bool none() const { return sinks == 0 && low >= high; }
    bool all() const { return sinks == low && high == KV_TILE; }
};

static inline Visible visible_keys(const Span& s, int window, int index, int from) {
    auto inside = [from](int i) { return std::clamp(i - from, 0, KV_TILE); };
    int high = inside(index + 1), sinks = std::min(inside(s.sinks), high);
    int low = window > 0 ? inside(index + 1 - window) : 0;
    return {sinks, std::max(low, sinks), high};
}

// Scores of up to QUERIES queries against a tile, into w.scores.
template <int R, class Source>
static inline void score_tile(
    const Attention& a, const Span& s, const KvTile& tile, const float* q, const float* q_rebased, AttentionWork& w
) {
    int dim = a.cache->head_dim, sinks = s.sinks - tile.from;
    score_pieces<R, Source>(q, tile, dim, tile.first, tile.last, w.scores);
    if (!a.q_rebased || sinks <= 0) return;
    sinks = std::min(sinks, KV_TILE);
    score_pieces<R, Source>(q_rebased, tile, dim, tile.first, std::min(tile.last, (sinks + PIECE - 1) / PIECE), w.rebased);
    int begin = tile.first * PIECE, end = std::min(sinks, tile.last * PIECE);
    for (int r = 0; r < R && begin < end; r++)
        std::memcpy(w.scores + r * KV_TILE + begin, w.rebased + r * KV_TILE + begin, sizeof(float) * (end - begin));
}

static inline void fill_hidden(float* row, const Visible& v, float x) {
    for (int t = v.sinks; t < v.low; t++) row[t] = x;
    for (int t = v.high; t < KV_TILE; t++) row[t] = x;
}

// Replaces one row's scores by exp(score - top). A score that is not finite makes its row's result no number.
static inline void exponentials(float* row, const Visible& v, float top, float* total, float correction) {
    V shift = set1(top), parts[4] = {zero(), zero(), zero(), zero()};
    for (int t = 0; t < KV_TILE; t += W) {
        V x = sub(load(row + t), shift);
        store(row + t, add(vexp(x), sub(x, x)));
    }
    if (!v.all()) fill_hidden(row, v, 0.0f);
    for (int t = 0; t < KV_TILE; t += W) parts[t / W % 4] = add(parts[t / W % 4], load(row + t));
    V fresh = add(add(parts[0], parts[1]), add(parts[2], parts[3]));
    store(total, fma(load(total), set1(correction), fresh));
}

// One step of the online softmax for R queries: w.scores become probabilities, corrections what earlier sums shrink by.
template <int R>
static inline void softmax_step(
    const Visible* seen, const KvTile& tile, float* top, float* total, float* corrections, float* scores
) {
    alignas(64) float before[PIECE] = {};
    for (int r = 0; r < R; r++) {
        float* row = scores + r * KV_TILE;
        if (!seen[r].all()) fill_hidden(row, seen[r], NOTHING);
        V most = load(row);
        for (int t = W; t < KV_TILE; t += W) most = vmax(load(row + t), most);
        float now = std::max(top[r], highest(most));
        before[r] = top[r] - now;
        top[r] = now;
    }
    for (int r = 0; r < R; r += W) store(corrections + r, vexp(load(before + r)));
    for (int r = 0; r < R; r++) {
        float* row = scores + r * KV_TILE;
        exponentials(row, seen[r], top[r], total + r * W, corrections[r]);
        if (!tile.value_scales) continue;
        for (int t = 0; t < KV_TILE; t += W) store(row + t, mul(load(row + t), load(tile.value_scales + t)));
    }
}

// out[r] = out[r] * corrections[r] + sum of p[r][t] * value[t] over t in [begin, end), C vectors of channels.
template <int R, int C, class Source>
static inline void multiply_values(
    float* out, int width, const float* corrections, const float* p, const KvTile& tile, int channel, int begin, int end
) {
    V acc[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) acc[r][c] = mul(load(out + r * width + channel + c * W), set1(corrections[r]));
    for (int t = begin; t < end;) {
        auto* value = (const typename Source::Code*)tile.values[t / PIECE] + t % PIECE * width + channel;
        for (int stop = std::min(end, t / PIECE * PIECE + PIECE); t < stop; t++, value += width) {
            V v[C];
            for (int c = 0; c < C; c++) v[c] = Source::load(value + c * W);
            for (int r = 0; r < R; r++) {
                V x = set1(p[r * KV_TILE + t]);
                for (int c = 0; c < C; c++) acc[r][c] = fma(x, v[c], acc[r][c]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(out + r * width + channel + c * W, acc[r][c]);
}

template <int R, class Source>
static inline void add_floats(
    float* out, int width, const float* corrections, const float* p, const KvTile& tile, int begin, int end
) {
    constexpr int C = W == 8 ? 2 : 4;
    int channel = 0;
    for (; channel + C * W <= width; channel += C * W)
        multiply_values<R, C, Source>(out, width, corrections, p, tile, channel, begin, end);
    for (; channel < width; channel += W)
        multiply_values<R, 1, Source>(out, width, corrections, p, tile, channel, begin, end);
}

template <int R, class Source>
static inline void add_values(
    float* out, int width, const float* corrections, const float* p, const KvTile& tile, int begin, int end
) {
#if defined(__AVX512F__)
    if constexpr (PAIRED<Source>) return add_value_pairs<R>(out, width, corrections, p, tile, begin, end);
    else
#endif
        add_floats<R, Source>(out, width, corrections, p, tile, begin, end);
}

// The same where the rows see different ranges: what they share together, and before and behind it each its own. Pairs of
// tokens are not cut apart, for their products are one sum.
template <int R, class Source>
static inline void add_ranges(
    float* out, int width, float* corrections, const float* p, const KvTile& tile, const int* low, const int* high
) {
    int begin = low[0], end = high[0];
    bool alike = true;
    for (int r = 1; r < R; r++) {
        alike = alike && low[r] == low[0] && high[r] == high[0];
        begin = std::max(begin, low[r]);
        end = std::min(end, high[r]);
    }
    if (PAIRED<Source> && !alike) begin += begin % 2, end -= end % 2;
    auto alone = [&](int r, int from, int to) {
        if (from < to) add_values<1, Source>(out + r * width, width, corrections + r, p + r * KV_TILE, tile, from, to);
        if (from < to) corrections[r] = 1.0f;
    };
    if (alike || begin >= end) {
        if (alike) add_values<R, Source>(out, width, corrections, p, tile, begin, end);
        for (int r = 0; r < R; r++) alike ? (void)(corrections[r] = 1.0f) : alone(r, low[r], high[r]);
        return;
    }
    for (int r = 0; r < R; r++) alone(r, low[r], begin);
    add_values<R, Source>(out, width, corrections, p, tile, begin, end);
    for (int r = 0; r < R; r++) corrections[r] = 1.0f;
    for (int r = 0; r < R; r++) alone(r, end, high[r]);
}

// Adds a tile to R queries from `pair` on; `first` is the span's row of pair 0.
template <int R, class Source>
static inline void attend(
    const Attention& a, const Span& s, const KvTile& tile, int first, int pair, AttentionWork& w
) {
    int width = kv_width(*a.cache), dim = a.cache->head_dim;
    Visible seen[R];
    bool nothing = true;
    int sinks_low[R], sinks_high[R], low[R], high[R];
    for (int r = 0; r < R; r++) {
        seen[r] = visible_keys(s, a.window, s.start + first + (pair + r) / a.group, tile.from);
        nothing = nothing && seen[r].none();
        sinks_low[r] = 0;
        sinks_high[r] = seen[r].sinks;
        low[r] = seen[r].low;
        high[r] = std::max(seen[r].low, seen[r].high);
    }
    if (nothing) return;
    alignas(64) float corrections[PIECE];
    score_tile<R, Source>(a, s, tile, w.q + (size_t)pair * dim, w.q_rebased + (size_t)pair * dim, w);
    softmax_step<R>(seen, tile, w.top + pair, w.total + (size_t)pair * W, corrections, w.scores);
#if defined(__AVX512F__)
    if constexpr (PAIRED<Source>)  // in place: a row's halves fill the first half of its room
        for (int r = 0; r < R; r++) {
            float* row = w.scores + r * KV_TILE;
            for (int t = 0; t < KV_TILE; t += W) store_bf16((uint16_t*)row + t, load(row + t));
        }
#endif
    float* out = w.out + (size_t)pair * width;
    if (*std::max_element(sinks_high, sinks_high + R) > 0)
        add_ranges<R, Source>(out, width, corrections, w.scores, tile, sinks_low, sinks_high);
    add_ranges<R, Source>(out, width, corrections, w.scores, tile, low, high);
}

// Calls f.template operator()<R, Source>(pair) for blocks of up to QUERIES pairs.
template <class F>
static inline void each_block(const KvCache& c, const KvTile& tile, int pairs, F f) {
    for (int pair = 0; pair < pairs; pair += QUERIES) {
        with_constant<QUERIES>(std::min(QUERIES, pairs - pair), [&](auto r) {
            constexpr int R = decltype(r)::value;
#if defined(__AVX512F__)
            if (c.type == KV_BF16_PAIRS) return f.template operator()<R, PairSource>(pair);
#endif
            if (tile.floats) f.template operator()<R, FloatSource>(pair);
            else if (c.type == KV_BF16) f.template operator()<R, Bf16Source>(pair);
            else f.template operator()<R, Int8Source>(pair);
        });
    }
}

// All queries over one tile.
static inline void attend_tile(
    const Attention& a, const Span& s, const KvTile& tile, int first, int pairs, AttentionWork& w
) {
    each_block(*a.cache, tile, pairs, [&]<int R, class Source>(int pair) {
        attend<R, Source>(a, s, tile, first, pair, w);
    });
}

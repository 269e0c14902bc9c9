// Which cached tokens matter: attention that they received, summed up beside the cache, and keeping those with the most.
//
// Scores lie as the cache does, so that they move with its blocks: [layer][block][kv head][block_size] floats.
#pragma once
#include <algorithm>

#include "attention.h"

static inline size_t score_index(const KvCache& c, int layer, int kv_head, const int32_t* table, int index) {
    size_t block = ((size_t)layer * c.blocks + table[index / c.block_size]) * c.kv_heads + kv_head;
    return block * c.block_size + index % c.block_size;
}

// Finds w.top and w.total of R queries over one tile.
template <int R, class Source>
static inline void observe_totals(
    const Attention& a, const Span& s, const KvTile& tile, int first, int pair, AttentionWork& w
) {
    int dim = a.cache->head_dim;
    Visible seen[R];
    for (int r = 0; r < R; r++) seen[r] = visible_keys(s, a.window, s.start + first + (pair + r) / a.group, tile.from);
    alignas(64) float corrections[PIECE];
    score_tile<R, Source>(a, s, tile, w.q + (size_t)pair * dim, w.q_rebased + (size_t)pair * dim, w);
    softmax_step<R>(seen, tile, w.top + pair, w.total + (size_t)pair * W, corrections, w.scores);
}

// Adds the probabilities of R queries over one tile to received[KV_TILE].
template <int R, class Source>
static inline void observe_probabilities(
    const Attention& a, const Span& s, const KvTile& tile, int first, int pair, AttentionWork& w, float* received
) {
    int dim = a.cache->head_dim;
    score_tile<R, Source>(a, s, tile, w.q + (size_t)pair * dim, w.q_rebased + (size_t)pair * dim, w);
    for (int r = 0; r < R; r++) {
        Visible seen = visible_keys(s, a.window, s.start + first + (pair + r) / a.group, tile.from);
        float* row = w.scores + r * KV_TILE;
        V share = set1(1.0f / sum(load(w.total + (size_t)(pair + r) * W))), shift = set1(w.top[pair + r]);
        for (int t = 0; t < KV_TILE; t += W) store(row + t, mul(vexp(sub(load(row + t), shift)), share));
        fill_hidden(row, seen, 0.0f);
        for (int t = 0; t < KV_TILE; t += W) store(received + t, add(load(received + t), load(row + t)));
    }
}

// Adds to each cached token's score the probabilities with which the last `last` <= TILE_ROWS rows of a span attend to it,
// over the query heads of one kv head. The span's own tokens begin at zero: what their slots held before is not read. So
// every span of a sequence whose scores are wanted must be observed once, after its keys are stored. Scratch as for
// attention_tile.
//
// For prompts this is SnapKV's observation window (Li et al. 2024, arXiv:2404.14469), for single tokens H2O's running sum
// (Zhang et al. 2023, arXiv:2306.14048).
static inline void observe(const Attention& a, const Span& s, int last, float* scores, void* scratch) {
    const KvCache& c = *a.cache;
    int rows = std::min({last, s.count, TILE_ROWS}), pairs = rows * a.group;
    int first = s.count - rows, end = s.start + s.count;
    for (int i = s.start; i < end; i++) scores[score_index(c, a.layer, a.kv_head, s.table, i)] = 0.0f;
    if (rows <= 0) return;
    AttentionWork w = attention_work(c, pairs, (float*)scratch);
    attention_begin(a, s, first, rows, w);
    clear_segment(c, pairs, w);
    each_tile(a, s, first, rows, 0, end, w, [&](const KvTile& tile) {
        each_block(c, tile, pairs, [&]<int R, class Source>(int pair) {
            observe_totals<R, Source>(a, s, tile, first, pair, w);
        });
    });
    each_tile(a, s, first, rows, 0, end, w, [&](const KvTile& tile) {
        alignas(64) float received[KV_TILE] = {};
        each_block(c, tile, pairs, [&]<int R, class Source>(int pair) {
            observe_probabilities<R, Source>(a, s, tile, first, pair, w, received);
        });
        for (int i = tile.first * PIECE; i < tile.last * PIECE && tile.from + i < end; i++)
            scores[score_index(c, a.layer, a.kv_head, s.table, tile.from + i)] += received[i];
    });
}

// Copies one token's key and value, bit by bit.
static inline void move_token(const KvCache& c, const uint8_t* from, int at, uint8_t* to, int place) {
    PieceLayout part = piece_layout(c);
    auto copy = [&](size_t begin, size_t stride, size_t bytes, int count) {  // the token's items of `bytes`, `stride` apart
        for (int i = 0; i < count; i++)
            std::memmove(to + begin + i * stride + place * bytes, from + begin + i * stride + at * bytes, bytes);
    };
    if (c.type == KV_BF16_PAIRS) {
        copy(0, 2 * PIECE * sizeof(uint16_t), 2 * sizeof(uint16_t), c.head_dim / 2);
        const uint16_t* source = (const uint16_t*)(from + part.values);
        uint16_t* target = (uint16_t*)(to + part.values);
        for (int i = 0, width = kv_width(c); i < width; i++)
            target[value_pair_place(width, i, place)] = source[value_pair_place(width, i, at)];
        return;
    }
    size_t code = c.type == KV_INT4 ? 1 : kv_code_bytes(c.type, 1);
    copy(0, code * PIECE, code, c.type == KV_INT4 ? c.head_dim / 2 : c.head_dim);
    copy(part.values, 0, kv_code_bytes(c.type, kv_width(c)), 1);
    if (c.type >= KV_INT8) copy(part.key_scales, 0, sizeof(float), 1);
    if (c.type == KV_INT8) copy(part.value_scales, 0, sizeof(float), 1);
    if (c.type == KV_INT4) copy(part.value_scales, 0, (size_t)value_groups(c) * 2 * sizeof(uint16_t), 1);
}

// Bytes of scratch of `compact`.
static inline size_t compact_scratch(int length) { return (size_t)length * (2 * sizeof(float) + sizeof(int32_t)); }

// The `count` of n tokens with the greatest scores, of equals the earlier ones, in their order. Scores are first replaced by
// the greatest within `kernel` neighbours (odd; 1: none), as SnapKV does: a token counts little without those around it.
static inline void choose_tokens(const float* scores, int n, int count, int kernel, float* pooled, int32_t* chosen) {
    for (int i = 0; i < n; i++) {
        int begin = std::max(0, i - kernel / 2), end = std::min(n, i + kernel / 2 + 1);
        pooled[i] = scores[begin];
        for (int j = begin; j < end; j++) pooled[i] = scores[j] > pooled[i] ? scores[j] : pooled[i];
        if (pooled[i] != pooled[i]) pooled[i] = 0.0f;  // an order needs numbers
        chosen[i] = i;
    }
    auto before = [pooled](int32_t a, int32_t b) { return pooled[a] > pooled[b] || (pooled[a] == pooled[b] && a < b); };
    if (count < n) std::nth_element(chosen, chosen + count, chosen + n, before);
    std::sort(chosen, chosen + std::min(count, n));
}

// Of a sequence of `length` cached tokens keeps `keep` for one layer and kv head: the `recent` last ones and, of those before
// them, the ones with the highest scores. They are moved to the cache indices [0, keep), in their order and unchanged, and
// their scores with them. Scratch: compact_scratch(length) bytes.
static inline void compact(
    const KvCache& c, int layer, int kv_head, const int32_t* table, int length, int keep, int recent, int kernel,
    float* scores, void* scratch
) {
    if (keep >= length || keep < 0) return;
    recent = std::clamp(recent, 0, keep);
    int older = length - recent;
    float *gathered = (float*)scratch, *pooled = gathered + length;
    int32_t* kept = (int32_t*)(pooled + length);
    for (int i = 0; i < older; i++) gathered[i] = scores[score_index(c, layer, kv_head, table, i)];
    choose_tokens(gathered, older, keep - recent, kernel, pooled, kept);
    for (int i = 0; i < recent; i++) kept[keep - recent + i] = older + i;
    for (int to = 0; to < keep; to++) {  // never behind where it comes from: nothing is overwritten before it is read
        int from = kept[to];
        if (from == to) continue;
        uint8_t *source = kv_piece(c, layer, kv_head, table, from), *target = kv_piece(c, layer, kv_head, table, to);
        move_token(c, source, from % PIECE, target, to % PIECE);
        scores[score_index(c, layer, kv_head, table, to)] = scores[score_index(c, layer, kv_head, table, from)];
    }
}

// Attention of query rows over their sequence's paged cache: prefill and decode are the same computation.
//
// Online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867; tiled as in FlashAttention, Dao et al. 2022,
// arXiv:2205.14135) over tiles of 64 cache indices, within segments of 512 whose results are merged in order. Tiles and
// segments begin at fixed cache indices, and each row goes over exactly the keys that it sees, in their order: its bits
// depend neither on the rows beside it, nor on how its prompt was cut, nor on which thread takes which segment.
#pragma once
#include "attention_tile.h"

constexpr int SEGMENT = 512;  // cache indices of one partial result

// One query times the scale, as pairs of bfloat16 `stride` apart.
static inline void pack_pairs(const float* from, int dim, float scale, uint32_t* to, int stride) {
    for (int d = 0; d < dim; d += PIECE) {
        float scaled[PIECE];
        uint16_t halves[PIECE];
        const int count = std::min(PIECE, dim - d);
        for (int i = 0; i < count; i++) scaled[i] = from[d + i] * scale;
        to_bf16(scaled, count, halves);
        for (int i = 0; i < count; i += 2, to += stride) std::memcpy(to, halves + i, 4);
    }
}

// Copies the queries of rows [first, first + rows) of a span, times the scale, by blocks of up to QUERIES pairs as
// [head_dim][pairs of the block].
static inline void pack_queries(
    const Attention& a, const Span& s, int first, int pairs, const float* q, float* packed
) {
    const KvCache& c = *a.cache;
    int dim = c.head_dim;
    const float* factor = c.type == KV_INT4 ? c.key_scale : nullptr;
    if (factor) factor += ((size_t)a.layer * c.kv_heads + a.kv_head) * dim;
    for (int pair = 0; pair < pairs; pair++) {
        int head = a.kv_head * a.group + pair % a.group, block = pair / QUERIES * QUERIES;
        int stride = std::min(QUERIES, pairs - block);
        const float* from = q + (size_t)(s.row + first + pair / a.group) * a.q_stride + (size_t)head * dim;
        if (c.type == KV_BF16_PAIRS) {
            pack_pairs(from, dim, a.scale, (uint32_t*)packed + (size_t)block * dim + (pair - block), stride);
            continue;
        }
        float* to = packed + (size_t)block * dim + (pair - block);
        for (int d = 0; d < dim; d++) to[d * stride] = from[d] * a.scale * (factor ? factor[d] : 1.0f);
    }
}

// Calls body(tile) for each tile of cache indices [begin, end), aligned, of which a row in [first, first + rows) sees a key.
template <class Body>
static inline void each_tile(
    const Attention& a, const Span& s, int first, int rows, int begin, int end, AttentionWork& w, Body body
) {
    int stop = std::min(end, s.start + first + rows);
    int low = a.window > 0 ? std::max(0, s.start + first + 1 - a.window) : 0;
    bool many = rows * a.group > 2 * QUERIES;
    for (int from = begin; from < stop; from += KV_TILE) {
        bool sinks = from < s.sinks;
        if (!sinks && from + KV_TILE <= low) continue;
        int piece = sinks ? 0 : std::max(0, low - from) / PIECE;
        int last = (std::min(stop - from, KV_TILE) + PIECE - 1) / PIECE;
        body(read_tile(a, s.table, from, piece, last, many, w));
    }
}

static inline void clear_segment(const KvCache& c, int pairs, AttentionWork& w) {
    std::fill_n(w.out, (size_t)pairs * kv_width(c), 0.0f);
    std::fill_n(w.total, (size_t)pairs * W, 0.0f);
    std::fill_n(w.top, pairs, NOTHING);
}

// The result over one segment: w.out, w.top and w.total of each pair.
static inline void attention_segment(
    const Attention& a, const Span& s, int first, int rows, int segment, AttentionWork& w
) {
    int pairs = rows * a.group;
    clear_segment(*a.cache, pairs, w);
    each_tile(a, s, first, rows, segment * SEGMENT, (segment + 1) * SEGMENT, w, [&](const KvTile& tile) {
        attend_tile(a, s, tile, first, pairs, w);
    });
}

// Floats of one pair's partial result: the sum of p * value, the greatest score, the sum of p.
static inline int partial_floats(const KvCache& c) { return kv_width(c) + 2; }

// Merges a segment's results [pairs][partial_floats] into those of the segments before it.
static inline void merge_segment(const float* segment, int pairs, int width, float* all) {
    for (int pair = 0; pair < pairs; pair++, segment += width + 2, all += width + 2) {
        if (segment[width + 1] == 0.0f) continue;  // saw nothing here
        float top = std::max(all[width], segment[width]);
        alignas(64) float shift[16] = {all[width] - top, segment[width] - top};
        store(shift, vexp(load(shift)));
        if (all[width + 1] == 0.0f) shift[0] = 0.0f;
        V a = set1(shift[0]), b = set1(shift[1]);
        for (int c = 0; c < width; c += W) store(all + c, fma(load(segment + c), b, mul(load(all + c), a)));
        all[width + 1] = all[width + 1] * shift[0] + segment[width + 1] * shift[1];
        all[width] = top;
    }
}

static inline void clear_partials(float* all, int pairs, int width) {
    std::fill_n(all, (size_t)pairs * (width + 2), 0.0f);
    for (int pair = 0; pair < pairs; pair++) all[(size_t)pair * (width + 2) + width] = NOTHING;
}

// Puts a segment's results from w into [pairs][partial_floats].
static inline void write_partials(const AttentionWork& w, int pairs, int width, float* out) {
    for (int pair = 0; pair < pairs; pair++, out += width + 2) {
        std::copy_n(w.out + (size_t)pair * width, width, out);
        out[width] = w.top[pair];
        out[width + 1] = sum(load(w.total + (size_t)pair * W));
    }
}

static inline void write_rows(
    const Attention& a, const Span& s, int first, int rows, const float* all, float* out, int out_stride
) {
    int dim = a.cache->head_dim, width = kv_width(*a.cache);
    for (int pair = 0; pair < rows * a.group; pair++, all += width + 2) {
        int head = a.kv_head * a.group + pair % a.group;
        float* to = out + (size_t)(s.row + first + pair / a.group) * out_stride + (size_t)head * dim;
        float inverse = 1.0f / all[width + 1];
        for (int d = 0; d < dim; d++) to[d] = all[d] * inverse;
    }
}

static inline int attention_segments(const Span& s, int first, int rows) {
    return (s.start + first + rows + SEGMENT - 1) / SEGMENT;
}

static inline void attention_begin(const Attention& a, const Span& s, int first, int rows, AttentionWork& w) {
    pack_queries(a, s, first, rows * a.group, a.q, w.q);
    if (a.q_rebased && s.sinks > 0) pack_queries(a, s, first, rows * a.group, a.q_rebased, w.q_rebased);
}

// Attention of rows [first, first + rows) of a span, rows <= TILE_ROWS, for the query heads of one kv head. out:
// [batch][out_stride], head h at h * head_dim.
static inline void attention_tile(
    const Attention& a, const Span& s, int first, int rows, float* out, int out_stride, void* scratch
) {
    int pairs = rows * a.group, width = kv_width(*a.cache);
    AttentionWork w = attention_work(*a.cache, pairs, (float*)scratch);
    attention_begin(a, s, first, rows, w);
    const int segments = attention_segments(s, first, rows);
    if (segments == 1) {  // merged with nothing it would be the same
        attention_segment(a, s, first, rows, 0, w);
        write_partials(w, pairs, width, w.all);
        return write_rows(a, s, first, rows, w.all, out, out_stride);
    }
    clear_partials(w.all, pairs, width);
    for (int segment = 0; segment < segments; segment++) {
        attention_segment(a, s, first, rows, segment, w);
        write_partials(w, pairs, width, w.segment);
        merge_segment(w.segment, pairs, width, w.all);
    }
    write_rows(a, s, first, rows, w.all, out, out_stride);
}

// The same in two steps, for one long sequence on many threads: the result of one segment into partials
// [rows * group][partial_floats], and then, when all of them are there one behind the other, their merge.
static inline void attention_partial(
    const Attention& a, const Span& s, int first, int rows, int segment, float* partials, void* scratch
) {
    int pairs = rows * a.group;
    AttentionWork w = attention_work(*a.cache, pairs, (float*)scratch);
    attention_begin(a, s, first, rows, w);
    attention_segment(a, s, first, rows, segment, w);
    write_partials(w, pairs, kv_width(*a.cache), partials);
}

static inline void attention_merge(
    const Attention& a, const Span& s, int first, int rows, const float* partials, float* out, int out_stride, void* scratch
) {
    int pairs = rows * a.group, width = kv_width(*a.cache);
    AttentionWork w = attention_work(*a.cache, pairs, (float*)scratch);
    clear_partials(w.all, pairs, width);
    for (int segment = 0; segment < attention_segments(s, first, rows); segment++)
        merge_segment(partials + (size_t)segment * pairs * (width + 2), pairs, width, w.all);
    write_rows(a, s, first, rows, w.all, out, out_stride);
}

// The same, with its arguments one by one.
static inline void attention_tile(
    const KvCache& cache, int layer, const Span& span, int first, int rows, int kv_head, int group, float scale, int window,
    const float* q, const float* q_rebased, int q_stride, float* out, int out_stride, void* scratch
) {
    Attention a{&cache, layer, kv_head, group, scale, window, q, q_rebased, q_stride};
    attention_tile(a, span, first, rows, out, out_stride, scratch);
}

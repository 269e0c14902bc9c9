// The operations of a step one by one, for tests, and those that are done between steps.
#include <cstdlib>
#include <new>

#include "activation.h"
#include "export.h"
#include "importance.h"
#include "norm.h"
#include "pool.h"
#include "rope.h"
#include "score.h"

namespace {

// 64-byte aligned memory; where there is none the process ends, for an exception could not pass the C functions.
class Scratch {
  public:
    explicit Scratch(size_t bytes) : data_(std::aligned_alloc(64, (bytes + 127) / 64 * 64)) {
        if (!data_) std::abort();
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    void* get() const { return data_; }

  private:
    void* data_;
};

// The members of Attention that tests set, for all kv heads.
struct Request {
    const KvCache* cache;
    int32_t layer, group, window, q_stride;
    float scale;
    const float* q;
    const float* q_rebased;
};

Attention for_head(const Request& r, int kv_head) {
    return {r.cache, r.layer, kv_head, r.group, r.scale, r.window, r.q, r.q_rebased, r.q_stride};
}

template <class Body>
void each_piece(const Request& r, const Span& s, int tile_rows, Body body) {
    for (int head = 0; head < r.cache->kv_heads; head++)
        for (int first = 0; first < s.count; first += tile_rows)
            body(for_head(r, head), first, std::min(tile_rows, s.count - first));
}

struct Compaction {
    const KvCache* cache;
    const int32_t* table;
    int32_t length, keep, recent, kernel;
    float* scores;
    uint8_t* scratch;  // compact_scratch(length) bytes a thread
};

void compact_step(void* argument, Member& member) {
    const Compaction& c = *(const Compaction*)argument;
    void* scratch = c.scratch + member.id() * compact_scratch(c.length);
    member.share(c.cache->layers * c.cache->kv_heads, 1, [&](int begin, int end) {
        for (int unit = begin; unit < end; unit++) {
            int layer = unit / c.cache->kv_heads, head = unit % c.cache->kv_heads;
            compact(*c.cache, layer, head, c.table, c.length, c.keep, c.recent, c.kernel, c.scores, scratch);
        }
    });
}

}  // namespace

EXPORT void native_rms_norm(const float* x, const float* weight, float eps, int rows, int n, float* out) {
    for (int r = 0; r < rows; r++) rms_norm_row(x + (size_t)r * n, weight, eps, n, out + (size_t)r * n);
}

// x: [rows][heads][head_dim], turned in place; angles: scratch of 2 * half floats.
EXPORT void native_rope(
    float* x, const double* positions, const float* frequencies, float factor, int rows, int heads, int head_dim, int half,
    float* angles
) {
    for (int r = 0; r < rows; r++) {
        rope_angles(frequencies, half, positions[r], factor, angles, angles + half);
        for (int h = 0; h < heads; h++) rope_head(x + ((size_t)r * heads + h) * head_dim, angles, angles + half, half);
    }
}

// kind: 0 silu, 1 gelu_tanh. n is a multiple of 16.
EXPORT void native_activation(int kind, const float* x, int n, float* out) {
    for (int i = 0; i < n; i += W) store(out + i, kind == 0 ? silu(load(x + i)) : gelu_tanh(load(x + i)));
}

EXPORT size_t native_kv_block_bytes(const KvCache* cache) { return kv_block_bytes(*cache); }

// key, value: [batch][kv_heads][head_dim].
EXPORT void native_store(const KvCache* cache, int layer, const Span* span, const float* key, const float* value) {
    size_t stride = (size_t)cache->kv_heads * cache->head_dim;
    for (int i = 0; i < span->count; i++) {
        for (int h = 0; h < cache->kv_heads; h++) {
            size_t at = (size_t)(span->row + i) * stride + (size_t)h * cache->head_dim;
            store_key_value(*cache, layer, h, span->table, span->start + i, key + at, value + at);
        }
    }
}

// out: as q. Rows are computed `tile_rows` <= TILE_ROWS at a time.
EXPORT void native_attention(const Request* request, const Span* span, int tile_rows, float* out) {
    Scratch scratch(attention_scratch(*request->cache, request->group));
    each_piece(*request, *span, tile_rows, [&](const Attention& a, int first, int rows) {
        attention_tile(a, *span, first, rows, out, a.q_stride, scratch.get());
    });
}

// The same, segment by segment, the last one first.
EXPORT void native_attention_split(const Request* request, const Span* span, int tile_rows, float* out) {
    const KvCache& c = *request->cache;
    Scratch scratch(attention_scratch(c, request->group));
    each_piece(*request, *span, tile_rows, [&](const Attention& a, int first, int rows) {
        size_t size = (size_t)rows * a.group * partial_floats(c);
        int segments = attention_segments(*span, first, rows);
        Scratch partials(segments * size * sizeof(float));
        for (int i = segments - 1; i >= 0; i--)
            attention_partial(a, *span, first, rows, i, (float*)partials.get() + i * size, scratch.get());
        attention_merge(a, *span, first, rows, (const float*)partials.get(), out, a.q_stride, scratch.get());
    });
}

EXPORT void native_observe(const Request* request, const Span* span, int last, float* scores) {
    Scratch scratch(attention_scratch(*request->cache, request->group));
    for (int h = 0; h < request->cache->kv_heads; h++) observe(for_head(*request, h), *span, last, scores, scratch.get());
}

// All layers and heads, on the pool's threads.
EXPORT void native_compact(
    Pool* pool, const KvCache* cache, const int32_t* table, int length, int keep, int recent, int kernel, float* scores
) {
    Scratch scratch(compact_scratch(length) * pool->size());
    Compaction c{cache, table, length, keep, recent, kernel, scores, (uint8_t*)scratch.get()};
    pool->run(compact_step, &c);
}

// logits: [rows][n], overwritten.
EXPORT void native_sample(float* logits, int rows, int n, const Draw* draws, int32_t* tokens) {
    Scratch scratch(sample_scratch(n));
    for (int r = 0; r < rows; r++) tokens[r] = sample_row(logits + (size_t)r * n, n, draws[r], scratch.get());
}

EXPORT float native_log_sum_exp(const float* x, int n) { return log_sum_exp_row(x, n); }

EXPORT void native_top(const float* x, int n, int k, int32_t* ids, float* values) { top_row(x, n, k, ids, values); }

EXPORT void native_score(const float* logits, int rows, int n, const int32_t* targets, float* logprobs, float* entropies) {
    for (int r = 0; r < rows; r++) {
        TokenScore score = score_row(logits + (size_t)r * n, n, targets[r]);
        logprobs[r] = score.logprob;
        entropies[r] = score.entropy;
    }
}

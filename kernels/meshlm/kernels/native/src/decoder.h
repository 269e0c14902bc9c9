// What a decoder is and what a step is asked: plain structures, mirrored by `native/decoder.py` for ctypes.
#pragma once
#include <cstdint>

#include "attention.h"
#include "kv_cache.h"
#include "matrix.h"
#include "sample.h"

struct Projection {
    Matrix weight;
    const float* bias;  // [rows] or null
};

struct Mlp {
    Projection gate, up, down;
};

enum Activation : int32_t { SILU = 0, GELU_TANH = 1 };

struct LayerSpec {
    const float* attention_norm;       // [width]
    const float* attention_post_norm;  // [width] or null
    const float* mlp_norm;             // [width]
    const float* mlp_post_norm;        // [width] or null
    const float* query_norm;           // [head_dim] or null
    const float* key_norm;             // [head_dim] or null
    Projection query, key, value, output;
    const Mlp* mlps;      // one, or one an expert
    const float* router;  // [experts][width] or null
    int32_t experts;      // 1 where there is no router
    int32_t active;       // experts of a token
    int32_t rope;         // which of the decoder's
    int32_t window;       // tokens that a position sees, itself included; 0 is all
};

struct RopeSpec {
    const float* frequencies;  // [half]
    int32_t half;
    float factor;
};

struct DecoderSpec {
    int32_t width, heads, middle, vocab;
    int32_t layers, ropes;
    int32_t activation;
    int32_t max_rows;     // of a step
    int32_t max_outputs;  // rows of logits that are kept at once
    float eps, attention_scale, embedding_scale;
    Matrix embedding, head;
    const float* norm;  // [width]
    const LayerSpec* layer;
    const RopeSpec* rope;
    KvCache cache;
    float* importance;  // [layer][block][kv_head][block_size] or null
};

// Rows [row, row + count) of a step: consecutive positions of one sequence.
struct StepSpan {
    int32_t row, count;
    int32_t start;     // cache index of the first row
    int32_t sinks;     // cache indices below it are seen by the query at its re-based position; 0: none
    int64_t position;  // of the first row
    int64_t rebased;   // position of the first row for the sinks
    int32_t observe;   // last rows whose attention is added to `importance`
    int32_t reserved;
    const int32_t* table;
};

struct ScoreRow {
    int32_t row, target;
    float logprob, entropy;  // results, nats
};

struct PoolRows {
    int32_t row, count;
    double* sum;  // [width], the sum of the rows' final hidden states
};

struct Step {
    int32_t rows, spans;
    const int32_t* tokens;  // [rows]
    const StepSpan* span;
    // Rows whose logits are wanted, and their tokens where `draw` is not null (temperature 0 is greedy).
    int32_t outputs, scores, pools, reserved;
    const int32_t* output_rows;
    float* logits;     // [outputs][vocab], overwritten by draws
    const Draw* draw;  // [outputs] or null
    int32_t* drawn;    // [outputs]
    ScoreRow* score;
    PoolRows* pool;
};

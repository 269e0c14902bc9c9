// How a model judges a token: its log-probability, and the entropy of the distribution it would be drawn from.
#pragma once
#include "sample.h"

struct TokenScore {
    float logprob;  // nats
    float entropy;  // nats
};

// Of a row of n logits. With top the greatest, s = sum(exp(x - top)) and t = sum(exp(x - top) * (x - top)), the entropy is
// log(s) - t / s; neither is a number where a logit is none. Sums are taken over pieces in a fixed order, in double between them.
static inline TokenScore score_row(const float* x, int n, int32_t target) {
    if (has_nan(x, n)) return {NAN, NAN};
    const float top = highest_of(x, n);
    double total = 0.0, weighted = 0.0;
    alignas(64) float p[DRAW_PIECE], shifted[DRAW_PIECE];
    for (int at = 0; at < n; at += DRAW_PIECE) {
        const int count = std::min(DRAW_PIECE, n - at);
        weigh(x + at, count, top, -INFINITY, p);
        for (int i = 0; i < count; i++) shifted[i] = p[i] > 0.0f ? p[i] * (x[at + i] - top) : 0.0f;
        total += sum_piece(p, count);
        weighted += sum_piece(shifted, count);
    }
    const double log_total = std::log(total);
    return {(float)((double)x[target] - top - log_total), (float)(log_total - weighted / total)};
}

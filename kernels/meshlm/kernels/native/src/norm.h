// Root-mean-square normalization (Zhang and Sennrich 2019, arXiv:1910.07467) of one row.
#pragma once
#include "simd.h"

// out = x / sqrt(mean(x^2) + eps) * weight over n floats; `out` may be `x`. Any n.
static inline void rms_norm_row(const float* x, const float* weight, float eps, int n, float* out) {
    V squares[4] = {zero(), zero(), zero(), zero()};
    int i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        for (int j = 0; j < 4; j++) {
            V v = load(x + i + j * W);
            squares[j] = fma(v, v, squares[j]);
        }
    }
    for (; i + W <= n; i += W) {
        V v = load(x + i);
        squares[0] = fma(v, v, squares[0]);
    }
    float total = sum(add(add(squares[0], squares[1]), add(squares[2], squares[3])));
    for (; i < n; i++) total += x[i] * x[i];
    float scale = 1.0f / std::sqrt(total / (float)n + eps);
    V factor = set1(scale);
    for (i = 0; i + W <= n; i += W) store(out + i, mul(mul(load(x + i), factor), load(weight + i)));
    for (; i < n; i++) out[i] = x[i] * scale * weight[i];
}

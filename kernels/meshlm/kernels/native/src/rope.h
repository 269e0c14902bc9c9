// Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the half-split form of Hugging Face models.
#pragma once
#include "simd.h"

// Cosines and sines of `half` pairs at one position, times `factor` (YaRN's attention factor; 1 otherwise). The angle is
// a double: in a float, positions past some ten thousands would turn by visibly wrong angles.
static inline void rope_angles(
    const float* frequencies, int half, double position, float factor, float* cos, float* sin
) {
    for (int i = 0; i < half; i++) {
        double angle = position * (double)frequencies[i];
        cos[i] = (float)std::cos(angle) * factor;
        sin[i] = (float)std::sin(angle) * factor;
    }
}

// Turns each pair (head[i], head[i + half]) in place. Elements from 2 * half on stay (partial rotation).
static inline void rope_head(float* head, const float* cos, const float* sin, int half) {
    int i = 0;
    for (; i + W <= half; i += W) {
        V c = load(cos + i), s = load(sin + i), a = load(head + i), b = load(head + half + i);
        store(head + i, sub(mul(a, c), mul(b, s)));
        store(head + half + i, add(mul(b, c), mul(a, s)));
    }
    for (; i < half; i++) {
        float a = head[i], b = head[half + i];
        head[i] = a * cos[i] - b * sin[i];
        head[half + i] = b * cos[i] + a * sin[i];
    }
}

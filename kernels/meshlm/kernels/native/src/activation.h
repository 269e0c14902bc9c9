// Activations of gated feed-forward layers.
#pragma once
#include "simd.h"

// x * sigmoid(x)
static inline V silu(V x) { return div(x, add(set1(1.0f), vexp(sub(zero(), x)))); }

// GELU in its tanh form (Hendrycks and Gimpel 2016, arXiv:1606.08415). With 1 + tanh(u) = 2 * sigmoid(2 u) there is no
// cancellation for negative x.
static inline V gelu_tanh(V x) {
    V cubic = fma(mul(mul(x, x), x), set1(0.044715f), x);
    return div(x, add(set1(1.0f), vexp(mul(cubic, set1(-1.5957691216057308f)))));
}

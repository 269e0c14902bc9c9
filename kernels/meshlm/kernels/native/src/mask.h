// Comparisons of vectors and choices by them. A comparison with what is no number is false.
#pragma once
#include "simd.h"

#if defined(__AVX512F__)

using Mask = __mmask16;
static inline Mask at_least(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
static inline Mask above(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
static inline V only(Mask m, V v) { return _mm512_maskz_mov_ps(m, v); }
static inline uint32_t bits_of(Mask m) { return m; }

#elif defined(__AVX2__)

using Mask = __m256;
static inline Mask at_least(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
static inline Mask above(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
static inline V only(Mask m, V v) { return _mm256_and_ps(m, v); }
static inline uint32_t bits_of(Mask m) { return (uint32_t)_mm256_movemask_ps(m); }

#else

typedef int32_t Mask __attribute__((vector_size(16)));
static inline Mask at_least(V a, V b) { return a >= b; }
static inline Mask above(V a, V b) { return a > b; }
static inline V only(Mask m, V v) { return (V)(m & (Mask)v); }
static inline uint32_t bits_of(Mask m) {
    uint32_t bits = 0;
    for (int i = 0; i < W; i++) bits |= (uint32_t)(m[i] & 1) << i;
    return bits;
}

#endif

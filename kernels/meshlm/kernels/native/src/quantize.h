// Activations to int8, one scale for each group of 32 columns.
#pragma once
#include <cfloat>

#include "matrix.h"
#include "simd.h"

// Whole numbers in [-127, 127] to bytes. NaN has been turned into a bound before.
static inline void store_codes(int8_t* to, V whole) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(whole)));
#elif defined(__AVX2__)
    __m256i wide = _mm256_cvtps_epi32(whole);
    __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64((__m128i*)to, _mm_packs_epi16(half, half));
#else
    for (int i = 0; i < W; i++) to[i] = (int8_t)whole[i];
#endif
}

// x: [cols], whole groups. codes: [cols]; scales and sums: [cols / GROUP]. A group's scale is its largest magnitude / 127,
// codes are rounded to nearest, ties to even, and sums = scale * (the sum of the codes). A group too small for a normal
// scale counts as zeros. A group with an infinity or NaN has arbitrary codes.
static inline void quantize_row(const float* x, int cols, int8_t* codes, float* scales, float* sums) {
    constexpr int PARTS = GROUP / W;
    const V most = set1(127.0f), least = set1(-127.0f);
    for (int g = 0; g < cols / GROUP; g++) {
        const float* from = x + g * GROUP;
        V top = vabs(load(from));
        for (int i = 1; i < PARTS; i++) top = vmax(vabs(load(from + i * W)), top);
        float scale = highest(top) / 127.0f;
        if (scale < FLT_MIN) scale = 0.0f;
        const V divisor = set1(scale == 0.0f ? FLT_MAX : scale);
        V sum_of_codes = zero();
        for (int i = 0; i < PARTS; i++) {
            V code = vmax(vmin(rounded(div(load(from + i * W), divisor)), most), least);
            store_codes(codes + g * GROUP + i * W, code);
            sum_of_codes = add(sum_of_codes, code);
        }
        scales[g] = scale;
        sums[g] = scale * sum(sum_of_codes);  // the sum itself is exact
    }
}

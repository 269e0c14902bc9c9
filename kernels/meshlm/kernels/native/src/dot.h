// The products of a group's codes: 32 columns of 16 rows with 32 columns of T tokens, as 16 int32 sums a token.
//
// One section an instruction set. The codes at `p` (32-byte aligned) are read once for all tokens.
#pragma once
#include "matrix.h"
#include "simd.h"

// 16 sums of products of codes, as floats; exact, being below 2^24.
using Sums = V16;

static inline int32_t four(const int8_t* codes) {
    int32_t x;
    std::memcpy(&x, codes, 4);
    return x;
}

#if defined(__AVX512F__)

template <Format F, int T>
static inline __attribute__((always_inline)) void dots(const uint8_t* p, const int8_t* const (&x)[T], Sums (&out)[T]) {
    __m512i w[8];
    if constexpr (F == Q8) {
        for (int j = 0; j < 8; j++) w[j] = _mm512_loadu_si512(p + 64 * j);
    } else {
        const __m512i low = _mm512_set1_epi8(15);
        for (int j = 0; j < 4; j++) {
            __m512i both = _mm512_loadu_si512(p + 64 * j);
            w[j] = _mm512_and_si512(both, low);
            w[4 + j] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) sum = _mm512_dpbusd_epi32(sum, w[j], _mm512_set1_epi32(four(x[t] + 4 * j)));
        out[t].v[0] = _mm512_cvtepi32_ps(sum);
    }
}

#elif defined(__AVX2__)

static inline __m256i four_times_8(const int8_t* codes) { return _mm256_set1_epi32(four(codes)); }

// 4-bit codes: a pair of products is at most 2 * 15 * 127, and 8 of them fit 16 bits.
template <Format F, int T>
    requires(F != Q8)
static inline __attribute__((always_inline)) void dots(const uint8_t* p, const int8_t* const (&x)[T], Sums (&out)[T]) {
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i sum[T][2];
    for (int t = 0; t < T; t++) sum[t][0] = sum[t][1] = _mm256_setzero_si256();
    for (int j = 0; j < 4; j++) {
        for (int half = 0; half < 2; half++) {
            __m256i both = _mm256_load_si256((const __m256i*)(p + 64 * j + 32 * half));
            __m256i first = _mm256_and_si256(both, low), second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                __m256i a = _mm256_maddubs_epi16(first, four_times_8(x[t] + 4 * j));
                __m256i b = _mm256_maddubs_epi16(second, four_times_8(x[t] + 16 + 4 * j));
                sum[t][half] = _mm256_add_epi16(sum[t][half], _mm256_add_epi16(a, b));
            }
        }
    }
    for (int t = 0; t < T; t++)
        for (int half = 0; half < 2; half++)
            out[t].v[half] = _mm256_cvtepi32_ps(_mm256_madd_epi16(sum[t][half], ones));
}

// 8-bit codes as sign and magnitude: |code - 128| * (x with that sign). A pair of products is at most 2 * 128 * 127, which
// fits 16 bits; the plain codes would pass it. These sums are of code - 128: no offset is left to take away.
template <Format F, int T>
    requires(F == Q8)
static inline __attribute__((always_inline)) void dots(const uint8_t* p, const int8_t* const (&x)[T], Sums (&out)[T]) {
    const __m256i offset = _mm256_set1_epi8(-128), ones = _mm256_set1_epi16(1);
    __m256i sum[T][2];
    for (int t = 0; t < T; t++) sum[t][0] = sum[t][1] = _mm256_setzero_si256();
    for (int j = 0; j < 8; j++) {
        for (int half = 0; half < 2; half++) {
            __m256i w = _mm256_load_si256((const __m256i*)(p + 64 * j + 32 * half));
            w = _mm256_xor_si256(w, offset);
            __m256i magnitude = _mm256_abs_epi8(w);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(four_times_8(x[t] + 4 * j), w));
                sum[t][half] = _mm256_add_epi32(sum[t][half], _mm256_madd_epi16(pairs, ones));
            }
        }
    }
    for (int t = 0; t < T; t++)
        for (int half = 0; half < 2; half++) out[t].v[half] = _mm256_cvtepi32_ps(sum[t][half]);
}

#else

template <Format F, int T>
static inline void dots(const uint8_t* p, const int8_t* const (&x)[T], Sums (&out)[T]) {
    for (int t = 0; t < T; t++) {
        int32_t sum[BLOCK] = {};
        for (int j = 0; j < (F == Q8 ? 8 : 4); j++) {
            for (int row = 0; row < BLOCK; row++) {
                const uint8_t* w = p + (j * BLOCK + row) * 4;
                for (int i = 0; i < 4; i++) {
                    if constexpr (F == Q8)
                        sum[row] += w[i] * x[t][4 * j + i];
                    else
                        sum[row] += (w[i] & 15) * x[t][4 * j + i] + (w[i] >> 4) * x[t][16 + 4 * j + i];
                }
            }
        }
        for (int row = 0; row < BLOCK; row++) out[t].v[row / W][row % W] = (float)sum[row];
    }
}

#endif

// What a code has too much in `dots`' sums: w = scale * (code - OFFSET).
template <Format F>
constexpr float OFFSET = F == Q4 ? 8.0f : 128.0f;
#if defined(__AVX2__) && !defined(__AVX512F__)
template <>
constexpr float OFFSET<Q8> = 0.0f;
#endif

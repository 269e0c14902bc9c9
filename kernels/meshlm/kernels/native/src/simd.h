// A vector of W floats on whatever the library is compiled for: AVX-512, AVX2, or a compiler's own vectors elsewhere.
//
// Every function is exact in the order of its operations: nothing is contracted or reassociated (-ffp-contract=off), so a
// row's result does not depend on how many other rows are computed beside it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

// By hand, for not every compiler has a type of 16 bits. The factor puts the exponent right, subnormals' too.
static inline float f16_to_float(uint16_t half) {
    const bool finite = (half & 0x7c00) != 0x7c00;
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13 | (finite ? 0 : 0x7f800000u);
    float x;
    std::memcpy(&x, &bits, 4);
    if (finite) x *= 0x1p112f;
    return half & 0x8000 ? -x : x;
}

#if defined(__AVX512F__)

constexpr int W = 16;
using V = __m512;

static inline V load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
// Past the caches, to memory aligned to a vector: for what is written once and read much later. `fence` before others read.
static inline void stream(float* p, V v) { _mm512_stream_ps(p, v); }
static inline void fence() { _mm_sfence(); }
static inline V set1(float x) { return _mm512_set1_ps(x); }
static inline V add(V a, V b) { return _mm512_add_ps(a, b); }
static inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
static inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
static inline V div(V a, V b) { return _mm512_div_ps(a, b); }
static inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
static inline V vmax(V a, V b) { return _mm512_max_ps(a, b); }
static inline V vmin(V a, V b) { return _mm512_min_ps(a, b); }
static inline V vabs(V a) { return _mm512_abs_ps(a); }
static inline float sum(V v) { return _mm512_reduce_add_ps(v); }
static inline float highest(V v) { return _mm512_reduce_max_ps(v); }
static inline V rounded(V v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// 2 ** n for whole n in [-126, 127].
static inline V exp2_whole(V n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
static inline V load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static inline V load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline V load_s8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}

#elif defined(__AVX2__)

constexpr int W = 8;
using V = __m256;

static inline V load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
static inline void stream(float* p, V v) { _mm256_stream_ps(p, v); }
static inline void fence() { _mm_sfence(); }
static inline V set1(float x) { return _mm256_set1_ps(x); }
static inline V add(V a, V b) { return _mm256_add_ps(a, b); }
static inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
static inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
static inline V div(V a, V b) { return _mm256_div_ps(a, b); }
static inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
static inline V vmax(V a, V b) { return _mm256_max_ps(a, b); }
static inline V vmin(V a, V b) { return _mm256_min_ps(a, b); }
static inline V vabs(V a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline __m128 halves_add(V v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }
static inline __m128 halves_max(V v) { return _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }
static inline float sum(V v) {
    __m128 a = halves_add(v);
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}
static inline float highest(V v) {
    __m128 a = halves_max(v);
    a = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)));
}
static inline V rounded(V v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline V exp2_whole(V n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline V load_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline V load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline V load_s8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}

#else

constexpr int W = 4;
typedef float V __attribute__((vector_size(16)));

static inline V load(const float* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
static inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
static inline void stream(float* p, V v) { store(p, v); }
static inline void fence() {}
static inline V set1(float x) { return V{x, x, x, x}; }
static inline V add(V a, V b) { return a + b; }
static inline V sub(V a, V b) { return a - b; }
static inline V mul(V a, V b) { return a * b; }
static inline V div(V a, V b) { return a / b; }
static inline V fma(V a, V b, V c) { return a * b + c; }
static inline V vmax(V a, V b) { for (int i = 0; i < W; i++) a[i] = a[i] > b[i] ? a[i] : b[i]; return a; }
static inline V vmin(V a, V b) { for (int i = 0; i < W; i++) a[i] = a[i] < b[i] ? a[i] : b[i]; return a; }
static inline V vabs(V a) { for (int i = 0; i < W; i++) a[i] = std::fabs(a[i]); return a; }
static inline float sum(V v) { return (v[0] + v[2]) + (v[1] + v[3]); }
static inline float highest(V v) {
    float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
    return a > b ? a : b;
}
static inline V rounded(V v) { for (int i = 0; i < W; i++) v[i] = std::nearbyintf(v[i]); return v; }
static inline V exp2_whole(V n) { for (int i = 0; i < W; i++) n[i] = std::ldexp(1.0f, (int)n[i]); return n; }
static inline V load_bf16(const uint16_t* p) {
    V v;
    for (int i = 0; i < W; i++) { uint32_t bits = (uint32_t)p[i] << 16; float x; std::memcpy(&x, &bits, 4); v[i] = x; }
    return v;
}
static inline V load_f16(const uint16_t* p) { V v; for (int i = 0; i < W; i++) v[i] = f16_to_float(p[i]); return v; }
static inline V load_s8(const int8_t* p) { V v; for (int i = 0; i < W; i++) v[i] = p[i]; return v; }

#endif

static inline V zero() { return set1(0.0f); }

// e ** x, within 2 units in the last place for x in [-87, 88]; clamped outside. Cephes' expf polynomial.
static inline V vexp(V x) {
    x = vmax(vmin(x, set1(88.0f)), set1(-87.0f));
    V n = rounded(mul(x, set1(1.44269504f)));
    V r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    V p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(mul(r, r), p, add(r, set1(1.0f)));
    return mul(p, exp2_whole(n));
}

// 16 floats: a block of rows of a matrix, whatever W is.
struct V16 {
    V v[16 / W];
};

static inline float bf16_to_float(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// Round to nearest, ties to even. NaN stays NaN.
static inline uint16_t float_to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

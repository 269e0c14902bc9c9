// Products of pairs of bfloat16: what AVX512_BF16 adds to AVX-512.
//
// One instruction multiplies 32 elements where a fused multiply-add has 16, and nothing is converted on the way. It is
// written by its name, and reached only where the CPU has it (`has_pair_products`): the library is one for both kinds.
#pragma once
#include "simd.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

// Whether this library has such products and this CPU runs them.
static inline bool has_pair_products() {
#if defined(__AVX512F__)
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
#else
    return false;
#endif
}

#if defined(__AVX512F__)

using Pairs = __m512i;  // 16 times two bfloat16

static inline Pairs load_pairs(const void* p) { return _mm512_loadu_si512(p); }
static inline Pairs set1_pair(uint32_t two) { return _mm512_set1_epi32((int)two); }
// Of each pair the first element alone, or the second: whatever stands beside it is not read, were it no number.
static inline Pairs only_first(Pairs v) { return _mm512_and_si512(v, _mm512_set1_epi32(0xffff)); }
static inline Pairs only_second(Pairs v) { return _mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000)); }

// sum[i] + a[i].first * b[i].first + a[i].second * b[i].second, in the one order that the CPU has.
static inline __attribute__((always_inline)) V add_pairs(V sum, Pairs a, Pairs b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}

// 16 floats to bfloat16, to nearest, ties to even. `to` may be where they came from, or before it.
static inline void store_bf16(uint16_t* to, V v) {
    __m256i halves;
    asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(v));
    _mm256_storeu_si256((__m256i*)to, halves);
}

// The first `count` <= 16 floats to bfloat16, zeros behind them.
static inline void to_bf16(const float* from, int count, uint16_t* to) {
    store_bf16(to, _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from));
}

#else

static inline void to_bf16(const float* from, int count, uint16_t* to) {
    for (int i = 0; i < 16; i++) to[i] = i < count ? float_to_bf16(from[i]) : 0;
}

#endif

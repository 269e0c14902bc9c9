// Keys and values of the cache as floats: loads of each format, and whole pieces converted.
#pragma once
#include "kv_cache.h"

struct FloatSource {
    using Code = float;
    static V load(const float* p) { return ::load(p); }
};

struct Bf16Source {
    using Code = uint16_t;
    static V load(const uint16_t* p) { return load_bf16(p); }
};

struct Int8Source {
    using Code = int8_t;
    static V load(const int8_t* p) { return load_s8(p); }
};

template <class Source>
static inline void convert(const uint8_t* codes, size_t count, float* out) {
    for (size_t i = 0; i < count; i += W) store(out + i, Source::load((const typename Source::Code*)codes + i));
}

// 4-bit codes of one token's `count` <= 32 value channels.
static inline void read_int4_value(const uint8_t* codes, int count, float step, float minimum, float* out) {
    alignas(64) int8_t wide[VALUE_GROUP];
    for (int from = 0; from < count; from += 16) {
        for (int i = 0; i < 8; i++) {
            wide[from + i] = codes[from / 2 + i] & 15;
            wide[from + 8 + i] = codes[from / 2 + i] >> 4;
        }
    }
    V scale = set1(step), least = set1(minimum);
    for (int i = 0; i < count; i += W) store(out + i, fma(load_s8(wide + i), scale, least));
}

// A piece's keys as [head_dim][16]; of INT8 and INT4 without their scales.
static inline void read_keys(const KvCache& c, const uint8_t* piece, float* keys) {
    size_t count = (size_t)c.head_dim * PIECE;
    if (c.type == KV_F32) return convert<FloatSource>(piece, count, keys);
    if (c.type == KV_BF16) return convert<Bf16Source>(piece, count, keys);
    if (c.type == KV_INT8) return convert<Int8Source>(piece, count, keys);
    for (int pair = 0; pair < c.head_dim / 2; pair++, piece += PIECE, keys += 2 * PIECE) {
        alignas(64) int8_t low[PIECE], high[PIECE];
        for (int t = 0; t < PIECE; t++) {
            low[t] = (int8_t)((piece[t] & 15) - 8);
            high[t] = (int8_t)((piece[t] >> 4) - 8);
        }
        for (int t = 0; t < PIECE; t += W) {
            store(keys + t, load_s8(low + t));
            store(keys + PIECE + t, load_s8(high + t));
        }
    }
}

// A piece's values as [16][width]; of INT8 without their scales.
static inline void read_values(const KvCache& c, const uint8_t* piece, const PieceLayout& part, float* values) {
    int width = kv_width(c);
    const uint8_t* codes = piece + part.values;
    if (c.type == KV_F32) return convert<FloatSource>(codes, (size_t)PIECE * width, values);
    if (c.type == KV_BF16) return convert<Bf16Source>(codes, (size_t)PIECE * width, values);
    if (c.type == KV_INT8) return convert<Int8Source>(codes, (size_t)PIECE * width, values);
    const uint16_t* scales = (const uint16_t*)(piece + part.value_scales);
    for (int t = 0; t < PIECE; t++) {
        for (int from = 0; from < width; from += VALUE_GROUP, scales += 2) {
            int count = width - from < VALUE_GROUP ? width - from : VALUE_GROUP;
            const uint8_t* at = codes + ((size_t)t * width + from) / 2;
            read_int4_value(at, count, bf16_to_float(scales[0]), bf16_to_float(scales[1]), values + (size_t)t * width + from);
        }
    }
}

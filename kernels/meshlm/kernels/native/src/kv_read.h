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

// Only a name: products of pairs load for themselves (`pairs.h`).
struct PairSource {
    using Code = uint16_t;
};

struct Int8Source {
    using Code = int8_t;
    static V load(const int8_t* p) { return load_s8(p); }
};

template <class Source>
static inline void convert(const uint8_t* codes, size_t count, float* out) {
    for (size_t i = 0; i < count; i += W) store(out + i, Source::load((const typename Source::Code*)codes + i));
}

typedef uint8_t Bytes __attribute__((vector_size(16)));

static inline Bytes load_bytes(const uint8_t* p) {
    Bytes b;
    std::memcpy(&b, p, sizeof b);
    return b;
}

// 16 codes, no more than 127, as floats.
static inline V16 bytes_to_floats(Bytes b) {
    alignas(16) int8_t wide[16];
    std::memcpy(wide, &b, sizeof b);
    V16 out;
    for (int i = 0; i < 16 / W; i++) out.v[i] = load_s8(wide + i * W);
    return out;
}

// The codes of one token's `count` <= 32 value channels. Reads 16 bytes.
static inline void read_int4_value(const uint8_t* codes, int count, float step, float minimum, float* out) {
    Bytes both = load_bytes(codes), low = both & 15, high = both >> 4;
    V16 parts[2] = {
        bytes_to_floats(__builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)),
        bytes_to_floats(__builtin_shufflevector(low, high, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)),
    };
    V scale = set1(step), least = set1(minimum);
    for (int i = 0; i < count; i += W) store(out + i, fma(parts[i / 16].v[i % 16 / W], scale, least));
}

// A piece's keys as [head_dim][16]; of INT8 and INT4 without their scales.
static inline void read_keys(const KvCache& c, const uint8_t* piece, float* keys) {
    size_t count = (size_t)c.head_dim * PIECE;
    if (c.type == KV_F32) return convert<FloatSource>(piece, count, keys);
    if (c.type == KV_BF16) return convert<Bf16Source>(piece, count, keys);
    if (c.type == KV_INT8) return convert<Int8Source>(piece, count, keys);
    V middle = set1(8.0f);
    for (int pair = 0; pair < c.head_dim / 2; pair++, piece += PIECE, keys += 2 * PIECE) {
        Bytes both = load_bytes(piece);
        V16 low = bytes_to_floats(both & 15), high = bytes_to_floats(both >> 4);
        for (int i = 0; i < PIECE / W; i++) {
            store(keys + i * W, sub(low.v[i], middle));
            store(keys + PIECE + i * W, sub(high.v[i], middle));
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
            float step = bf16_to_float(scales[0]), minimum = bf16_to_float(scales[1]);
            read_int4_value(at, count, step, minimum, values + (size_t)t * width + from);
        }
    }
}

// The paged key-value cache: [layer][block][kv head] and, within one of those, pieces of 16 tokens:
//
//   F32, BF16   keys [head_dim][16], values [16][width]
//   BF16_PAIRS  the same elements by twos, as products of pairs read them: keys [head_dim / 2][16][2], values [8][width][2]
//   INT8        codes like these, then 16 key scales and 16 value scales (float): value = scale * code
//   INT4        codes of 4 bits like these, then 16 key scales (float), then scale and minimum (bfloat16) of each token
//               and group of 32 channels of its values
//
// Keys lie transposed, so that the products of a query with 16 keys need no horizontal sums. `width` is head_dim rounded up
// to 16; the channels behind are zeros. Two 4-bit codes of one token share a byte, so that threads may store different tokens
// at once: of keys, channels 2 i and 2 i + 1, as [head_dim / 2][16]; of values, channels c and c + 8 of each 16.
//
// A token whose key or value is not finite is stored with a scale that is not a number: whoever attends to it sees that.
#pragma once
#include <cstddef>

#include "pairs.h"
#include "simd.h"

enum KvType : int32_t { KV_F32 = 0, KV_BF16 = 1, KV_BF16_PAIRS = 2, KV_INT8 = 3, KV_INT4 = 4 };

constexpr int PIECE = 16;        // tokens
constexpr int VALUE_GROUP = 32;  // channels that share scale and minimum in 4-bit values

struct KvCache {
    int32_t type;  // KvType
    int32_t layers;
    int32_t blocks;
    int32_t kv_heads;
    int32_t block_size;  // tokens, a multiple of PIECE
    int32_t head_dim;
    uint8_t* data;           // layers * blocks * kv_heads * kv_block_bytes, 64-byte aligned
    const float* key_scale;  // INT4: [layer][kv head][head_dim] that keys are divided by when stored, or null
};

static inline int kv_width(const KvCache& c) { return (c.head_dim + 15) / 16 * 16; }

static inline int value_groups(const KvCache& c) { return (kv_width(c) + VALUE_GROUP - 1) / VALUE_GROUP; }

// Bytes of `count` elements as codes.
static inline size_t kv_code_bytes(int32_t type, size_t count) {
    return type == KV_F32 ? count * 4 : type < KV_INT8 ? count * 2 : type == KV_INT8 ? count : count / 2;
}

// Where the parts of a piece begin, in bytes from its start.
struct PieceLayout {
    size_t values, key_scales, value_scales, size;
};

static inline PieceLayout piece_layout(const KvCache& c) {
    PieceLayout at;
    at.values = kv_code_bytes(c.type, (size_t)c.head_dim * PIECE);
    at.key_scales = at.values + kv_code_bytes(c.type, (size_t)kv_width(c) * PIECE);
    at.value_scales = at.key_scales + (c.type >= KV_INT8 ? PIECE * sizeof(float) : 0);
    size_t scales = c.type == KV_INT8 ? PIECE * sizeof(float) : 0;
    if (c.type == KV_INT4) scales = (size_t)PIECE * value_groups(c) * 2 * sizeof(uint16_t);
    at.size = (at.value_scales + scales + 63) / 64 * 64;
    return at;
}

// Bytes of one layer's and kv head's part of a block.
static inline size_t kv_block_bytes(const KvCache& c) { return (size_t)(c.block_size / PIECE) * piece_layout(c).size; }

// The piece that cache index `index` of a sequence lies in; `table` names the sequence's blocks.
static inline uint8_t* kv_piece(const KvCache& c, int layer, int kv_head, const int32_t* table, int index) {
    size_t block = ((size_t)layer * c.blocks + table[index / c.block_size]) * c.kv_heads + kv_head;
    return c.data + block * kv_block_bytes(c) + (size_t)(index % c.block_size / PIECE) * piece_layout(c).size;
}

// The greatest |x[i]|; no number where one of them is none.
static inline float largest_magnitude(const float* x, int n) {
    V most = zero(), odd = zero();
    int i = 0;
    for (; i + W <= n; i += W) {
        V v = load(x + i);
        most = vmax(most, vabs(v));
        odd = add(odd, sub(v, v));  // infinity less infinity is no number either
    }
    float top = highest(most) + sum(odd);
    for (; i < n; i++) top = (std::fabs(x[i]) > top ? std::fabs(x[i]) : top) + (x[i] - x[i]);
    return top;
}

// 8-bit codes of n floats at `stride`; returns their scale.
static inline float store_int8(const float* x, int n, int8_t* codes, int stride) {
    float most = largest_magnitude(x, n);
    bool finite = most <= 3.0e38f;
    float inverse = finite && most > 1.0e-36f ? 127.0f / most : 0.0f;
    float rounded_to[PIECE];
    for (int from = 0; from < n; from += PIECE) {
        const int count = n - from < PIECE ? n - from : PIECE;
        for (int i = 0; i < PIECE; i++) rounded_to[i] = finite && i < count ? x[from + i] : 0.0f;
        for (int i = 0; i < PIECE; i += W) store(rounded_to + i, rounded(mul(load(rounded_to + i), set1(inverse))));
        for (int i = 0; i < count; i++) codes[(size_t)(from + i) * stride] = (int8_t)rounded_to[i];
    }
    return finite ? most / 127.0f : NAN;
}

static inline int clamp_code(float x) { return (int)(x < 0.0f ? 0.0f : x > 15.0f ? 15.0f : x); }

// 4-bit codes of a key of n channels (even), PIECE bytes apart; returns their scale. The channel furthest from zero gets the
// end of the range that is 8 steps wide.
static inline float store_int4_key(const float* key, const float* factor, int n, uint8_t* codes) {
    float most = 0.0f;
    bool finite = true;
    for (int i = 0; i < n; i++) {
        float x = factor ? key[i] / factor[i] : key[i];
        finite = finite && std::fabs(x) <= 3.0e38f;
        if (std::fabs(x) > std::fabs(most)) most = x;
    }
    float inverse = std::fabs(most) > 1.0e-36f ? -8.0f / most : 0.0f;
    auto code = [&](int i) {
        float x = factor ? key[i] / factor[i] : key[i];
        return finite ? clamp_code(std::nearbyintf(x * inverse) + 8.0f) : 8;
    };
    for (int i = 0; i < n; i += 2) codes[(size_t)i / 2 * PIECE] = (uint8_t)(code(i) | code(i + 1) << 4);
    return finite ? most / -8.0f : NAN;
}

// 4-bit codes of n <= 32 channels of one token's value; writes scale and minimum.
static inline void store_int4_value(const float* value, int n, uint8_t* codes, uint16_t* scales) {
    float least = value[0], most = value[0];
    bool finite = true;
    for (int i = 0; i < n; i++) {
        finite = finite && std::fabs(value[i]) <= 1.0e38f;
        if (value[i] < least) least = value[i];
        if (value[i] > most) most = value[i];
    }
    scales[0] = float_to_bf16(finite ? (most - least) / 15.0f : NAN);
    scales[1] = float_to_bf16(least);
    float step = bf16_to_float(scales[0]), minimum = bf16_to_float(scales[1]);
    float inverse = finite && step > 1.0e-36f ? 1.0f / step : 0.0f;
    auto code = [&](int i) { return finite && i < n ? clamp_code(std::nearbyintf((value[i] - minimum) * inverse)) : 0; };
    for (int from = 0; from < n; from += 16) {
        for (int i = from; i < from + 8; i++) codes[from / 2 + i - from] = (uint8_t)(code(i) | code(i + 8) << 4);
    }
}

static inline void store_plain(
    const KvCache& c, uint8_t* piece, uint8_t* values, int at, const float* key, const float* value
) {
    int dim = c.head_dim, width = kv_width(c);
    for (int i = 0; i < dim; i++) {
        if (c.type == KV_F32) ((float*)piece)[i * PIECE + at] = key[i];
        else ((uint16_t*)piece)[i * PIECE + at] = float_to_bf16(key[i]);
    }
    for (int i = 0; i < width; i++) {
        float x = i < dim ? value[i] : 0.0f;
        if (c.type == KV_F32) ((float*)values)[at * width + i] = x;
        else ((uint16_t*)values)[at * width + i] = float_to_bf16(x);
    }
}

// The place of channel `channel` of a piece's token `at`, among 2-byte elements.
static inline size_t value_pair_place(int width, int channel, int at) {
    return ((size_t)(at / 2) * width + channel) * 2 + at % 2;
}

static inline void store_pairs(const KvCache& c, uint8_t* piece, uint8_t* values, int at, const float* key, const float* value) {
    const int dim = c.head_dim, width = kv_width(c);
    uint16_t halves[PIECE];
    for (int from = 0; from < width; from += PIECE) {
        const int count = dim - from < PIECE ? dim - from : PIECE;
        to_bf16(key + from, count, halves);
        for (int i = 0; i < count; i += 2)  // a channel pair of one token is 4 bytes
            std::memcpy(piece + ((size_t)(from + i) / 2 * PIECE + at) * 4, halves + i, 4);
        to_bf16(value + from, count, halves);
        uint16_t* to = (uint16_t*)values + value_pair_place(width, from, at);
        for (int i = 0; i < PIECE; i++) to[2 * i] = halves[i];
    }
}

// Stores one token's key and value (head_dim floats each) at cache index `index` of the sequence with block table `table`.
static inline void store_key_value(
    const KvCache& c, int layer, int kv_head, const int32_t* table, int index, const float* key, const float* value
) {
    uint8_t* piece = kv_piece(c, layer, kv_head, table, index);
    PieceLayout part = piece_layout(c);
    int at = index % PIECE, dim = c.head_dim, width = kv_width(c);
    if (c.type <= KV_BF16) return store_plain(c, piece, piece + part.values, at, key, value);
    if (c.type == KV_BF16_PAIRS) return store_pairs(c, piece, piece + part.values, at, key, value);
    float* key_scales = (float*)(piece + part.key_scales);
    if (c.type == KV_INT8) {
        int8_t* codes = (int8_t*)(piece + part.values) + (size_t)at * width;
        key_scales[at] = store_int8(key, dim, (int8_t*)piece + at, PIECE);
        ((float*)(piece + part.value_scales))[at] = store_int8(value, dim, codes, 1);
        for (int i = dim; i < width; i++) codes[i] = 0;
        return;
    }
    const float* factor = c.key_scale ? c.key_scale + ((size_t)layer * c.kv_heads + kv_head) * dim : nullptr;
    key_scales[at] = store_int4_key(key, factor, dim, piece + at);
    uint16_t* scales = (uint16_t*)(piece + part.value_scales) + (size_t)at * value_groups(c) * 2;
    for (int from = 0; from < dim; from += VALUE_GROUP) {
        int n = dim - from < VALUE_GROUP ? dim - from : VALUE_GROUP;
        uint8_t* codes = piece + part.values + ((size_t)at * width + from) / 2;
        store_int4_value(value + from, n, codes, scales + from / VALUE_GROUP * 2);
    }
}

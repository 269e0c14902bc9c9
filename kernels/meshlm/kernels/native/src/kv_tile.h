// A tile of 64 cache indices: what one step of the online softmax goes over.
#pragma once
#include "kv_cache.h"

constexpr int KV_TILE = 64;    // cache indices of one softmax step
constexpr int TILE_PIECES = KV_TILE / PIECE;
#if defined(__AVX512F__)
constexpr int WIDE_PIECES = TILE_PIECES;  // pieces of keys multiplied together
#else
constexpr int WIDE_PIECES = 1;
#endif

// One tile of keys and values as the products read it: in the cache, or converted to floats.
struct KvTile {
    int from;    // first cache index
    int first;   // pieces [first, last) are there
    int last;
    bool floats;  // converted
    const uint8_t* keys[TILE_PIECES];
    const uint8_t* values[TILE_PIECES];
    const float* key_scales;    // [KV_TILE], or null
    const float* value_scales;  // [KV_TILE], or null
};

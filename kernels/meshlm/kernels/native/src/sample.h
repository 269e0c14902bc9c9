// From a row of logits to a token: greedy, or by temperature, min-p (arXiv:2407.01082), top-k and top-p (arXiv:1904.09751)
// and then by inverse distribution in the order of token ids.
//
// Nothing is sorted. Each filter keeps the logits above a threshold, which is searched by bisection: how many tokens, or how
// much probability, lies above a value is one pass over the row at the speed of the cache.
#pragma once
#include <algorithm>
#include <cfloat>

#include "mask.h"

struct Draw {
    float temperature;  // 0 is greedy
    float top_p;        // (0, 1]
    float min_p;        // [0, 1]
    int32_t top_k;      // 0 keeps all
    double uniform;     // [0, 1)
};

constexpr float COLDEST = 1.0e-5f;   // a lower temperature draws the same token, and would divide logits to infinity
constexpr int CANDIDATES = 256;      // as few as are sorted
constexpr int DRAW_PIECE = 256;      // tokens whose probabilities are summed at once
constexpr int32_t NO_TOKEN = -1;     // what is drawn of a row that is no distribution

// Bytes of scratch of `sample_row`.
static inline size_t sample_scratch(int n) { return sizeof(float) * ((size_t)n + CANDIDATES); }

// The greatest number of n; -inf where there is none.
static inline float highest_of(const float* x, int n) {
    V most = set1(-INFINITY);
    int i = 0;
    for (; i + W <= n; i += W) most = vmax(load(x + i), most);  // the second operand stands where the first is no number
    float top = highest(most);
    for (; i < n; i++) top = x[i] > top ? x[i] : top;
    return top;
}

// Whether one of n is no number.
static inline bool has_nan(const float* x, int n) {
    int i = 0;
    for (; i + W <= n; i += W) {
        V v = load(x + i);
        if (bits_of(at_least(v, v)) != (W == 32 ? ~0u : (1u << W) - 1)) return true;
    }
    for (; i < n; i++)
        if (x[i] != x[i]) return true;
    return false;
}

// The lowest index of the greatest number; 0 where nothing is above -inf.
static inline int32_t argmax_row(const float* x, int n) {
    const float top = highest_of(x, n);
    if (top == -INFINITY) return 0;
    int i = 0;
    for (V v = set1(top); i + W <= n; i += W) {
        if (uint32_t hits = bits_of(at_least(load(x + i), v))) return i + __builtin_ctz(hits);
    }
    while (i < n && !(x[i] == top)) i++;
    return i;
}

// What lies above a value: tokens, and their weights where those count instead.
struct Above {
    int count;
    double weight;
};

// weights: n floats, or null where each counts 1.
static inline Above sum_above(const float* x, const float* weights, int n, float value) {
    V limit = set1(value), sums[4] = {zero(), zero(), zero(), zero()};
    Above found{0, 0.0};
    int i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        for (int j = 0; j < 4; j++) {
            Mask m = above(load(x + i + j * W), limit);
            found.count += __builtin_popcount(bits_of(m));
            if (weights) sums[j] = add(sums[j], only(m, load(weights + i + j * W)));
        }
    }
    found.weight = weights ? sum(add(add(sums[0], sums[1]), add(sums[2], sums[3]))) : 0.0;
    for (; i < n; i++) {
        if (!(x[i] > value)) continue;
        found.count++;
        if (weights) found.weight += weights[i];
    }
    if (!weights) found.weight = found.count;
    return found;
}

// The float halfway between two in their own order, so that bisection ends after 32 steps whatever the numbers.
static inline float halfway_in_order(float a, float b) {
    auto rank = [](float x) {
        int32_t bits;
        std::memcpy(&bits, &x, 4);
        return (int64_t)(bits < 0 ? -(int64_t)(bits & 0x7fffffff) : bits);
    };
    int64_t low = rank(a), middle = low + (rank(b) - low) / 2;
    int32_t bits = (int32_t)(middle < 0 ? (-middle) | (int64_t)INT32_MIN : middle);
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// Where the answer of `smallest_kept` lies: not at `low` or below it, and not above `high`.
struct Bracket {
    float low, high;
    Above above_low, above_high;
};

static inline Bracket bracket(const float* x, const float* weights, int n, float top, double limit) {
    Bracket b{-INFINITY, top, {0, 0.0}, {0, 0.0}};
    for (float distance = 4.0f; distance < 1.0e4f; distance *= 2) {
        Above found = sum_above(x, weights, n, top - distance);
        if (found.weight < limit) {
            b.high = top - distance;
            b.above_high = found;
            continue;
        }
        b.low = top - distance;
        b.above_low = found;
        return b;
    }
    b.above_low = sum_above(x, weights, n, b.low);
    return b;
}

// Of the candidates in (low, high], the smallest whose weight above is below `limit`. found: CANDIDATES ids.
static inline float smallest_candidate(
    const float* x, const float* weights, int n, const Bracket& b, double limit, int32_t* found
) {
    int count = 0, i = 0;
    auto consider = [&](int at) { if (x[at] > b.low && x[at] <= b.high) found[count++] = at; };
    for (V low = set1(b.low); i + W <= n; i += W)
        for (uint32_t hits = bits_of(above(load(x + i), low)); hits; hits &= hits - 1) consider(i + __builtin_ctz(hits));
    for (; i < n; i++) consider(i);
    std::sort(found, found + count, [x](int32_t a, int32_t b) { return x[a] > x[b]; });
    double weight = b.above_high.weight;
    float kept = b.high;
    for (int first = 0, next; first < count && weight < limit; first = next) {
        kept = x[found[first]];
        for (next = first; next < count && x[found[next]] == kept; next++) weight += weights ? weights[found[next]] : 1.0;
    }
    return kept;
}

// The smallest value v in x for which the weight of what is above v stays below `limit` (> 0). top: x's greatest value.
// weights: [n], or null where each counts 1. found: scratch for CANDIDATES ids.
static inline float smallest_kept(
    const float* x, const float* weights, int n, float top, double limit, int32_t* found
) {
    Bracket b = bracket(x, weights, n, top, limit);
    if (b.above_low.weight < limit) return -INFINITY;
    for (int step = 0; b.above_low.count - b.above_high.count > CANDIDATES; step++) {
        bool even = step < 12 && b.low > -INFINITY;
        float middle = even ? b.low + (b.high - b.low) / 2 : halfway_in_order(b.low, b.high);
        if (!(middle > b.low && middle < b.high)) {
            if (even) continue;
            return b.high;  // neighbours in floats: all candidates are equal
        }
        Above found_above = sum_above(x, weights, n, middle);
        (found_above.weight < limit ? b.high : b.low) = middle;
        (found_above.weight < limit ? b.above_high : b.above_low) = found_above;
    }
    return smallest_candidate(x, weights, n, b, limit, found);
}

// x / temperature in place, no more than the greatest finite number; returns the greatest.
static inline float apply_temperature(float* x, int n, float temperature) {
    V divisor = set1(temperature), limit = set1(FLT_MAX);
    int i = 0;
    for (; i + W <= n; i += W) store(x + i, vmin(limit, div(load(x + i), divisor)));
    for (; i < n; i++) {
        x[i] /= temperature;
        if (x[i] > FLT_MAX) x[i] = FLT_MAX;
    }
    return highest_of(x, n);
}

// p = exp(x - top) where x is at least `floor`, else 0. Below e^-87 it is 0 too.
static inline void weigh(const float* x, int n, float top, float floor, float* p) {
    floor = std::max(floor, top - 87.0f);
    V limit = set1(floor), shift = set1(top);
    int i = 0;
    for (; i + W <= n; i += W) {
        V v = load(x + i);
        store(p + i, only(at_least(v, limit), vexp(sub(v, shift))));
    }
    alignas(64) float rest[16] = {};
    for (int j = i; j < n; j++) rest[j - i] = x[j] - top;
    store(rest, vexp(load(rest)));
    for (int j = i; j < n; j++) p[j] = x[j] >= floor ? rest[j - i] : 0.0f;
}

static inline double sum_piece(const float* p, int n) {
    double lanes[8] = {}, rest = 0.0;
    int i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++) lanes[j] += (double)p[i + j];
    for (; i < n; i++) rest += (double)p[i];
    return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7])) + rest;
}

static inline double sum_row(const float* p, int n) {
    double total = 0.0;
    for (int at = 0; at < n; at += DRAW_PIECE) total += sum_piece(p + at, std::min(DRAW_PIECE, n - at));
    return total;
}

// The first id at which the running sum of p passes `uniform` of the whole.
static inline int32_t draw_row(const float* p, int n, double uniform) {
    const double target = uniform * sum_row(p, n);
    double sum = 0.0;
    for (int at = 0; at < n; at += DRAW_PIECE) {
        const int end = std::min(at + DRAW_PIECE, n);
        const double piece = sum_piece(p + at, end - at);
        double within = sum;
        for (int i = at; sum + piece > target && i < end; i++) {
            within += (double)p[i];
            if (p[i] > 0.0f && within > target) return i;
        }
        sum += piece;
    }
    // Rounding hid the end of the row: the last token that may be drawn.
    while (n > 1 && !(p[n - 1] > 0.0f)) n--;
    return n - 1;
}

// The token that is drawn from n logits, which are overwritten; NO_TOKEN where one of them is no number, or none is above
// -inf: the model is broken, and any token would be made up. scratch: sample_scratch(n) bytes.
static inline int32_t sample_row(float* logits, int n, const Draw& draw, void* scratch) {
    if (has_nan(logits, n) || highest_of(logits, n) == -INFINITY) return NO_TOKEN;
    if (!(draw.temperature > 0.0f)) return argmax_row(logits, n);
    float* p = (float*)scratch;
    int32_t* found = (int32_t*)scratch + n;
    const float top = apply_temperature(logits, n, std::max(draw.temperature, COLDEST));
    float floor = draw.min_p > 0.0f ? top + (float)std::log((double)draw.min_p) : -INFINITY;
    if (draw.top_k > 0 && draw.top_k < n)
        floor = std::max(floor, smallest_kept(logits, nullptr, n, top, draw.top_k, found));
    weigh(logits, n, top, floor, p);
    if (draw.top_p < 1.0f) {
        double limit = std::max((double)draw.top_p * sum_row(p, n), 1.0e-30);
        float nucleus = smallest_kept(logits, p, n, top, limit, found);
        if (nucleus > floor) weigh(logits, n, top, nucleus, p);
    }
    return draw_row(p, n, draw.uniform);
}

// log(sum(exp(x))); no number where one of x is none.
static inline float log_sum_exp_row(const float* x, int n) {
    if (has_nan(x, n)) return NAN;
    const float top = highest_of(x, n);
    if (!(std::fabs(top) <= FLT_MAX)) return top;
    double total = 0.0;
    alignas(64) float p[DRAW_PIECE];
    for (int at = 0; at < n; at += DRAW_PIECE) {
        const int count = std::min(DRAW_PIECE, n - at);
        weigh(x + at, count, top, -INFINITY, p);
        total += sum_piece(p, count);
    }
    return top + (float)std::log(total);
}

// The k greatest of n values, the greatest first, of equals the lowest id first; fewer where fewer are above -inf, and then
// id -1. ids, values: [k].
static inline void top_row(const float* x, int n, int k, int32_t* ids, float* values) {
    std::fill_n(ids, k, -1);
    std::fill_n(values, k, -INFINITY);
    auto consider = [&](int id) {
        if (!(x[id] > values[k - 1])) return;
        int at = k - 1;
        for (; at > 0 && x[id] > values[at - 1]; at--) {
            values[at] = values[at - 1];
            ids[at] = ids[at - 1];
        }
        values[at] = x[id];
        ids[at] = id;
    };
    int i = 0;
    for (; k > 0 && i + W <= n; i += W) {
        uint32_t hits = bits_of(above(load(x + i), set1(values[k - 1])));
        for (; hits; hits &= hits - 1) consider(i + __builtin_ctz(hits));
    }
    for (; k > 0 && i < n; i++) consider(i);
}

// The tiles of products: T tokens with one block of 16 rows, for every format and every T that the registers hold.
//
// One token reads weights as fast as a plain loop reads memory (91 to 100% on Zen 4): they lie in the order of reading, and
// the hardware's own reading ahead does better than prefetch instructions at any distance (76 to 98%).
#include "matmul.h"

#include <array>
#include <utility>

#include "dot.h"
#include "export.h"
#include "pool.h"
#include "quantize.h"

namespace {

// What dots of a symmetric format have too much: OFFSET times the sum of a group's activations. Multiplied once for a run of
// groups, it leaves two operations for each group and token instead of three.
template <Format F, int T>
class Offsets {
  public:
    static constexpr int RUN = 64;  // groups

    // Groups [at[t], at[t] + count) of every token t.
    void fill(const float* sums, const size_t (&at)[T], int count) {
        for (int t = 0; t < T; t++)
            for (int g = 0; g < count; g++) offset_[t][g] = sums[at[t] + g] * -OFFSET<F>;
    }
    float at(int t, int g) const { return offset_[t][g]; }

  private:
    float offset_[T][RUN];
};

// total[t] += the product of the group at `p` with group at[t] + g of each token.
template <Format F, int T>
inline __attribute__((always_inline)) void add_group(const uint8_t* p, const Activations& x, const size_t (&at)[T], int g,
                                                     const Offsets<F, T>& offsets, V16 (&total)[T]) {
    const int8_t* codes[T];
    V16 dot[T];
    for (int t = 0; t < T; t++) codes[t] = x.codes + (at[t] + g) * GROUP;
    dots<F, T>(p, codes, dot);
    const uint16_t* halves = (const uint16_t*)(p + (F == Q8 ? 512 : 256));
    for (int i = 0; i < BLOCK / W; i++) {
        const V scale = load_f16(halves + i * W);
        const V minimum = F == Q4M ? load_f16(halves + BLOCK + i * W) : zero();
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const V activation = set1(x.scales[at[t] + g]);
            V& sum = total[t].v[i];
            if constexpr (F == Q4M)
                sum = fma(minimum, set1(x.sums[at[t] + g]), fma(mul(dot[t].v[i], activation), scale, sum));
            else if constexpr (OFFSET<F> == 0.0f)
                sum = fma(mul(dot[t].v[i], activation), scale, sum);
            else
                sum = fma(fma(dot[t].v[i], activation, set1(offsets.at(t, g))), scale, sum);
        }
    }
}

// Asks for the same group of the next block: many tokens keep a block's weights so long that the hardware, which looks ahead by
// lines, has not begun with the next when it is due.
inline void read_ahead(const uint8_t* p, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

template <Format F, int T>
void quantized_tile(const uint8_t* p, int cols, const Activations& x, const int32_t* tokens, V16* out) {
    constexpr int RUN = Offsets<F, T>::RUN;
    const int groups = cols / GROUP;
    size_t at[T];  // token t's first group of the run in scales and sums
    V16 total[T];
    Offsets<F, T> offsets;
    for (int t = 0; t < T; t++) {
        at[t] = (size_t)tokens[t] * groups;
        for (int i = 0; i < BLOCK / W; i++) total[t].v[i] = zero();
    }
    for (int first = 0; first < groups; first += RUN) {
        const int count = groups - first < RUN ? groups - first : RUN;
        if constexpr (F != Q4M && OFFSET<F> != 0.0f) offsets.fill(x.sums, at, count);
        for (int g = 0; g < count; g++, p += group_bytes(F)) {
            if constexpr (T > 1) read_ahead(p + (size_t)groups * group_bytes(F), group_bytes(F));
            add_group<F, T>(p, x, at, g, offsets, total);
        }
        for (int t = 0; t < T; t++) at[t] += count;
    }
    for (int t = 0; t < T; t++) out[t] = total[t];
}

template <Format F, int T>
void dense_tile(const uint8_t* p, int cols, const Activations& x, const int32_t* tokens, V16* out) {
    const float* values[T];
    V16 total[T];
    for (int t = 0; t < T; t++) {
        values[t] = x.values + (size_t)tokens[t] * cols;
        for (int i = 0; i < BLOCK / W; i++) total[t].v[i] = zero();
    }
    constexpr size_t STRIDE = BLOCK * (F == F32 ? 4 : 2);
    for (int c = 0; c < cols; c++, p += STRIDE) {
        for (int i = 0; i < BLOCK / W; i++) {
            V w;
            if constexpr (F == F32)
                w = load((const float*)p + i * W);
            else
                w = load_bf16((const uint16_t*)p + i * W);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) total[t].v[i] = fma(w, set1(values[t][c]), total[t].v[i]);
        }
    }
    for (int t = 0; t < T; t++) out[t] = total[t];
}

using Tile = void (*)(const uint8_t* block, int cols, const Activations& x, const int32_t* tokens, V16* out);

template <Format F, int T>
constexpr Tile tile() {
    if constexpr (F == F32 || F == BF16)
        return dense_tile<F, T>;
    else
        return quantized_tile<F, T>;
}

template <Format F, int... T>
constexpr std::array<Tile, MAX_TILE> widths(std::integer_sequence<int, T...>) {
    return {tile<F, T + 1>()...};
}

constexpr auto kWidths = std::make_integer_sequence<int, MAX_TILE>();
constexpr std::array<std::array<Tile, MAX_TILE>, 5> kTiles = {  // in the order of Format
    widths<F32>(kWidths), widths<BF16>(kWidths), widths<Q8>(kWidths), widths<Q4>(kWidths), widths<Q4M>(kWidths)};

float half_to_float(const uint8_t* p) {
    uint16_t half;
    std::memcpy(&half, p, 2);
    return f16_to_float(half);
}

void read_quantized(const Matrix& m, const uint8_t* block, int row, float* out) {
    const bool bytes = m.format == Q8;
    const int half = bytes ? GROUP : GROUP / 2;  // columns per byte of a row
    for (int g = 0; g < m.cols / GROUP; g++, block += group_bytes(m.format), out += GROUP) {
        const uint8_t* scales = block + BLOCK * half;
        const float scale = half_to_float(scales + 2 * row);
        const float offset = m.format == Q4M ? 0.0f : bytes ? 128.0f : 8.0f;
        const float minimum = m.format == Q4M ? half_to_float(scales + 2 * BLOCK + 2 * row) : 0.0f;
        for (int c = 0; c < half; c++) {
            const int code = block[(c / 4 * BLOCK + row) * 4 + c % 4];
            if (bytes) {
                out[c] = scale * ((float)code - offset);
            } else {
                out[c] = scale * ((float)(code & 15) - offset) + minimum;
                out[half + c] = scale * ((float)(code >> 4) - offset) + minimum;
            }
        }
    }
}

}  // namespace

void multiply_tile(const Matrix& m, int block, const Activations& x, const int32_t* tokens, int count, V16* out) {
    kTiles[m.format][count - 1](m.data + block * block_bytes(m), m.cols, x, tokens, out);
}

void read_row(const Matrix& m, int row, float* out) {
    const uint8_t* block = m.data + row / BLOCK * block_bytes(m);
    row %= BLOCK;
    if (quantized(m.format)) return read_quantized(m, block, row, out);
    for (int c = 0; c < m.cols; c++) {
        if (m.format == F32)
            out[c] = ((const float*)block)[c * BLOCK + row];
        else
            out[c] = bf16_to_float(((const uint16_t*)block)[c * BLOCK + row]);
    }
}

// x: [rows][cols] of values; codes, scales and sums as in Activations.
EXPORT void native_quantize(const float* x, int rows, int cols, int8_t* codes, float* scales, float* sums) {
    for (int t = 0; t < rows; t++) {
        const size_t groups = cols / GROUP;
        quantize_row(x + (size_t)t * cols, cols, codes + (size_t)t * cols, scales + t * groups, sums + t * groups);
    }
}

// out: [count][m.rows], the products with tokens index[i], or with tokens 0..count - 1 where index is null.
EXPORT void native_multiply(Pool* pool, const Matrix* m, const Activations* x, const int32_t* index, int count, float* out) {
    struct Work {
        const Matrix& m;
        const Activations& x;
        const int32_t* index;
        int count;
        float* out;

        void blocks(int begin, int end) const {
            multiply_blocks(m, begin, end, x, index, count, [&](int b, int i, V16 v) {
                const int width = m.rows - b * BLOCK < BLOCK ? m.rows - b * BLOCK : BLOCK;
                float all[BLOCK];
                for (int j = 0; j < BLOCK / W; j++) store(all + j * W, v.v[j]);
                std::memcpy(out + (size_t)i * m.rows + b * BLOCK, all, width * sizeof(float));
            });
        }
    } work{*m, *x, index, count, out};
    pool->run(
        [](void* argument, Member& member) {
            const Work& work = *(const Work*)argument;
            const int units = blocks(work.m), grain = units / (8 * member.size());
            member.share(units, grain > 1 ? grain : 1, [&](int begin, int end) { work.blocks(begin, end); });
        },
        &work);
}

EXPORT void native_read_row(const Matrix* m, int row, float* out) { read_row(*m, row, out); }

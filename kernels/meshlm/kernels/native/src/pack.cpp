// Weights as loaders have them, row by row, into the blocks of matrix.h. Rows after the last are zeros.
#include <cstring>

#include "export.h"
#include "matrix.h"

namespace {

constexpr int HALF = GROUP / 2;

// codes: the group's 32 codes of one row. to: the block's codes of that group.
void put_codes(int32_t format, const uint8_t* codes, int row, uint8_t* to) {
    if (format == Q8) {
        for (int j = 0; j < GROUP / 4; j++) std::memcpy(to + (j * BLOCK + row) * 4, codes + 4 * j, 4);
        return;
    }
    for (int j = 0; j < HALF / 4; j++) {
        for (int i = 0; i < 4; i++) {
            const int low = codes[4 * j + i] & 15, high = codes[HALF + 4 * j + i] & 15;
            to[(j * BLOCK + row) * 4 + i] = (uint8_t)(low | high << 4);
        }
    }
}

template <class T>
void put_dense(const Matrix& m, const T* values) {
    T* to = (T*)m.data;
    for (int first = 0; first < m.rows; first += BLOCK, to += (size_t)m.cols * BLOCK) {
        const int count = m.rows - first < BLOCK ? m.rows - first : BLOCK;
        if (count < BLOCK) std::memset((void*)to, 0, block_bytes(m));
        for (int c = 0; c < m.cols; c++)
            for (int row = 0; row < count; row++) to[(size_t)c * BLOCK + row] = values[(size_t)(first + row) * m.cols + c];
    }
}

}  // namespace

// codes: [rows][cols]; scales and minimums (Q4M only): fp16 [rows][cols / GROUP]. Writes all of m's memory.
EXPORT void native_pack(const Matrix* m, const uint8_t* codes, const uint16_t* scales, const uint16_t* minimums) {
    const int groups = m->cols / GROUP, code_bytes = m->format == Q8 ? BLOCK * GROUP : BLOCK * HALF;
    uint8_t* to = (uint8_t*)m->data;
    for (int first = 0; first < m->rows; first += BLOCK) {
        const int count = m->rows - first < BLOCK ? m->rows - first : BLOCK;
        for (int g = 0; g < groups; g++, to += group_bytes(m->format)) {
            if (count < BLOCK) std::memset(to, 0, group_bytes(m->format));
            for (int row = 0; row < count; row++) {
                const size_t at = (size_t)(first + row) * groups + g;
                put_codes(m->format, codes + at * GROUP, row, to);
                std::memcpy(to + code_bytes + 2 * row, scales + at, 2);
                if (m->format == Q4M) std::memcpy(to + code_bytes + 2 * (BLOCK + row), minimums + at, 2);
            }
        }
    }
}

// values: [rows][cols] of m's type, F32 or BF16.
EXPORT void native_pack_dense(const Matrix* m, const void* values) {
    if (m->format == F32)
        put_dense(*m, (const float*)values);
    else
        put_dense(*m, (const uint16_t*)values);
}

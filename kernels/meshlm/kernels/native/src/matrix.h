// Weight matrices and quantized activations: what the quantized products read.
//
// A matrix of `rows` x `cols` (out x in) is kept in blocks of 16 rows; rows are padded with zeros to whole blocks. Quantized
// formats cut a row into groups of 32 columns. One (block, group) lies together, and a block's groups follow each other:
//
//   Q4   256 B of codes, 16 fp16 scales              w = scale * (code - 8)      4.5 bits a weight
//   Q4M  256 B of codes, 16 fp16 scales, 16 fp16 minimums   w = scale * code + minimum   5 bits
//   Q8   512 B of codes, 16 fp16 scales              w = scale * (code - 128)    8.5 bits
//
// 8-bit codes: byte [j][row][i] (j < 8, i < 4) is column 4 j + i. 4-bit codes: byte [j][row][i] (j < 4, i < 4) has column
// 4 j + i in its low half and column 16 + 4 j + i in its high half. Codes are unsigned, as VNNI's first operand wants them.
//
//   BF16, F32   [cols][16] of the type, for matrices that are kept as they are (any `cols`).
#pragma once
#include <cstddef>
#include <cstdint>

constexpr int BLOCK = 16;  // rows
constexpr int GROUP = 32;  // columns

enum Format : int32_t { F32 = 0, BF16 = 1, Q8 = 2, Q4 = 3, Q4M = 4 };

struct Matrix {
    int32_t format;
    int32_t rows;  // as the model has them
    int32_t cols;
    int32_t reserved;
    const uint8_t* data;  // 64-byte aligned, blocks(m) * block_bytes(m) bytes
};

static inline int blocks(const Matrix& m) { return (m.rows + BLOCK - 1) / BLOCK; }

static inline bool quantized(int32_t format) { return format >= Q8; }

static inline size_t group_bytes(int32_t format) { return format == Q8 ? 544 : format == Q4 ? 288 : 320; }

static inline size_t block_bytes(const Matrix& m) {
    if (m.format == F32) return (size_t)m.cols * BLOCK * 4;
    if (m.format == BF16) return (size_t)m.cols * BLOCK * 2;
    return (size_t)(m.cols / GROUP) * group_bytes(m.format);
}

// The input of products: `rows` x `cols`. Quantized matrices read codes, scales and sums; F32 and BF16 ones read values.
struct Activations {
    int cols;
    float* values;   // [rows][cols]
    int8_t* codes;   // [rows][cols], in [-127, 127]
    float* scales;   // [rows][cols / GROUP]: value = scale * code
    float* sums;     // [rows][cols / GROUP]: scale * (the sum of the group's codes)
};

"""The product of many rows with a weight: bound by the tensor cores.

The weight is the left operand, which Hopper's tensor cores take from registers, where its codes have become floats,
and the rows of x are the right one: out^T = w x^T. The programs of a group of tiles of rows share a tile of the weight
while it is in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from meshlm.kernels.gpu.dequantize_tile import unpack_int4
from meshlm.kernels.gpu.dot import dot, dot_apart
from meshlm.kernels.gpu.matmul_epilogue import NOT_SPECIALIZED, finish_tile, weight_rows

SPAN = tl.constexpr(64)
HALF = tl.constexpr(32)
BAND = tl.constexpr(16)  # tiles of rows whose programs run beside one another


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "blocks"])
def tall_kernel(
    x,
    codes,
    scales,
    minimums,
    x_scales,
    bias,
    residual,
    out,
    partials,
    counters,
    block_experts,
    order,
    rows,
    N,
    cols,
    x_stride,
    codes_stride,
    scales_stride,
    out_stride,
    residual_stride,
    active,
    splits,
    steps,
    blocks,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    APART: tl.constexpr,
):
    """Grid: (tiles of N times blocks of rows, splits). See `matmul_launch.launch` for the arguments."""
    split = tl.program_id(1)
    block, tile = _place(tl.program_id(0), tl.num_programs(0) // blocks, blocks)
    m = block * BM + tl.arange(0, BM)
    expert = tl.full([], 0, tl.int64)
    if order is not None:
        expert = tl.load(block_experts + block).to(tl.int64)
        if expert < 0:
            return
        m = tl.load(order + m)
    valid = m < rows
    x_row = m // active if order is not None else m
    x_rows = x + x_row.to(tl.int64)[None, :] * x_stride
    n, exists = weight_rows(tile, N, BN, ACTIVATION is not None)
    w_rows = codes + (expert * N + n.to(tl.int64))[:, None] * codes_stride
    scale_rows = scales if scales is None else scales + expert * N + n
    minimum_rows = minimums if minimums is None else minimums + expert * N + n
    first = split * steps
    last = tl.minimum(first + steps, tl.cdiv(cols, STEP))
    if GROUP == 0:
        acc = tl.zeros([BN, BM], tl.float32)
        k = tl.arange(0, STEP)
        for step in tl.range(first, last, num_stages=STAGES):
            at = step * STEP + k
            inside = at < cols
            x_mask = valid[None, :] if EVEN else valid[None, :] & inside[:, None]
            w_mask = exists[:, None] if EVEN else exists[:, None] & inside[None, :]
            w_tile = tl.load(w_rows + at[None, :], mask=w_mask, other=0.0)
            x_tile = tl.load(x_rows + at[:, None], mask=x_mask, other=0.0)
            if APART:
                acc = dot_apart(w_tile.to(x_tile.dtype), x_tile, acc)
            else:
                acc = dot(w_tile.to(x_tile.dtype), x_tile, acc)
        if scales is not None:
            acc *= tl.load(scale_rows, mask=exists, other=0.0).to(tl.float32)[:, None]
    else:
        acc = _grouped(
            first, last, x_rows, w_rows, scale_rows, minimum_rows, valid, exists, cols, scales_stride,
            FORMAT, GROUP, EVEN, BM, BN, STAGES,
        )  # fmt: skip
    acc = tl.trans(acc)
    finish_tile(
        acc, x_scales, x_row, partials, counters, block * (tl.num_programs(0) // blocks) + tile, split, splits,
        bias, expert * N + n, exists, residual, out, m, valid, tile, N, out_stride, residual_stride, BM, BN, ACTIVATION,
    )  # fmt: skip


@triton.jit
def _place(program, tiles, blocks):
    """The block of rows and the tile of N of a program: bands of blocks, and in a band all blocks of a tile first."""
    band = program // (BAND * tiles)
    height = tl.minimum(blocks - band * BAND, BAND)
    within = program % (BAND * tiles)
    return band * BAND + within % height, within // height


@triton.jit
def _grouped(
    first,
    last,
    x_rows,
    w_rows,
    scale_rows,
    minimum_rows,
    valid,
    exists,
    cols,
    scales_stride,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The sums (BN, BM) over spans of columns from `first` to `last`. Scales are read a span ahead: they are not copied
    asynchronously, and their weights would wait for them."""
    acc = tl.zeros([BN, BM], tl.float32)
    j = tl.arange(0, HALF)
    low_scale, high_scale = _pair(scale_rows, first, last, exists, scales_stride, GROUP)
    low_minimum, high_minimum = low_scale, high_scale
    if minimum_rows is not None:
        low_minimum, high_minimum = _pair(minimum_rows, first, last, exists, scales_stride, GROUP)
    for span in tl.range(first, last, num_stages=STAGES):
        at = span * SPAN
        x_low_mask, x_high_mask = valid[None, :], valid[None, :]
        if not EVEN:
            x_low_mask = x_low_mask & (at + j < cols)[:, None]
            x_high_mask = x_high_mask & (at + HALF + j < cols)[:, None]
        if FORMAT == "int4":
            packed = tl.load(w_rows + (at // 2 + j)[None, :], mask=exists[:, None], other=0)
        else:
            low = tl.load(w_rows + (at + j)[None, :], mask=exists[:, None], other=0)
            high = tl.load(w_rows + (at + HALF + j)[None, :], mask=exists[:, None], other=0)
        x_low = tl.load(x_rows + (at + j)[:, None], mask=x_low_mask, other=0.0)
        x_high = tl.load(x_rows + (at + HALF + j)[:, None], mask=x_high_mask, other=0.0)
        next_low, next_high = _pair(scale_rows, span + 1, last, exists, scales_stride, GROUP)
        if FORMAT == "int4":
            low, high = unpack_int4(packed, minimum_rows is None, x_low.dtype)
        low = low.to(tl.float32) * low_scale.to(tl.float32)[:, None]
        high = high.to(tl.float32) * high_scale.to(tl.float32)[:, None]
        if minimum_rows is not None:
            low += low_minimum.to(tl.float32)[:, None]
            high += high_minimum.to(tl.float32)[:, None]
            low_minimum, high_minimum = _pair(minimum_rows, span + 1, last, exists, scales_stride, GROUP)
        acc = dot(low.to(x_low.dtype), x_low, acc)
        acc = dot(high.to(x_high.dtype), x_high, acc)
        low_scale, high_scale = next_low, next_high
    return acc


@triton.jit
def _pair(rows, span, last, exists, stride, GROUP: tl.constexpr):
    """Scales, or minimums, of the halves of a span, (BN,) each; those of no span are 0."""
    group = span * SPAN // GROUP * stride
    mask = exists & (tl.full(exists.shape, span, tl.int32) < last)
    low = tl.load(rows + group, mask=mask, other=0.0)
    if GROUP == HALF:
        return low, tl.load(rows + group + stride, mask=mask, other=0.0)
    return low, low

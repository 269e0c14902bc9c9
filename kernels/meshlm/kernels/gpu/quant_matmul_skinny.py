"""The product of a few rows with a weight: bound by reading the weight once.

The rows are the left operand of tensor cores, 16 or 32 of them whether they are there or not, so that a weight costs
the same few instructions at 1 row and at 16. Weights arrive through a pipeline of asynchronous copies; a group's scale
is applied to its sums, not to its weights. The columns may be split over programs, see `gather_splits`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from meshlm.kernels.gpu.dequantize_tile import unpack_int4
from meshlm.kernels.gpu.dot import dot, dot_apart
from meshlm.kernels.gpu.matmul_epilogue import NOT_SPECIALIZED, finish_tile, weight_rows

SPAN = tl.constexpr(64)
HALF = tl.constexpr(32)
GROUPS = tl.constexpr(16)  # whose minimums are multiplied at a time


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def skinny_kernel(
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
    """Grid: (tiles of N, splits, blocks of rows). See `matmul_launch.launch` for the arguments."""
    tile, split, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = block * BM + tl.arange(0, BM)
    expert = tl.full([], 0, tl.int64)
    if order is not None:
        expert = tl.load(block_experts + block).to(tl.int64)
        if expert < 0:
            return
        m = tl.load(order + m)
    valid = m < rows
    x_row = m // active if order is not None else m
    x_rows = x + x_row.to(tl.int64)[:, None] * x_stride
    n, exists = weight_rows(tile, N, BN, ACTIVATION is not None)
    w_rows = codes + (expert * N + n.to(tl.int64))[None, :] * codes_stride
    scale_rows = scales if scales is None else scales + expert * N + n
    minimum_rows = minimums if minimums is None else minimums + expert * N + n
    first = split * steps
    last = tl.minimum(first + steps, tl.cdiv(cols, STEP))
    if GROUP == 0:
        acc = tl.zeros([BM, BN], tl.float32)
        k = tl.arange(0, STEP)
        for step in tl.range(first, last, num_stages=STAGES):
            at = step * STEP + k
            inside = at < cols
            x_mask = valid[:, None] if EVEN else valid[:, None] & inside[None, :]
            w_mask = exists[None, :] if EVEN else exists[None, :] & inside[:, None]
            x_tile = tl.load(x_rows + at[None, :], mask=x_mask, other=0.0)
            w_tile = tl.load(w_rows + at[:, None], mask=w_mask, other=0.0)
            if APART:
                acc = dot_apart(x_tile, w_tile.to(x_tile.dtype), acc)
            else:
                acc = dot(x_tile, w_tile.to(x_tile.dtype), acc)
        if scales is not None:
            acc *= tl.load(scale_rows, mask=exists, other=0.0).to(tl.float32)[None, :]
    else:
        tl.static_assert(STEP == 4 * HALF)
        acc = _grouped(
            first, last, x_rows, w_rows, scale_rows, minimum_rows, valid, exists, cols, scales_stride,
            FORMAT, GROUP, EVEN, BM, BN, STAGES,
        )  # fmt: skip
    finish_tile(
        acc, x_scales, x_row, partials, counters, block * tl.num_programs(0) + tile, split, splits,
        bias, expert * N + n, exists, residual, out, m, valid, tile, N, out_stride, residual_stride, BM, BN, ACTIVATION,
    )  # fmt: skip


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
    """The sums (BM, BN) over steps of columns from `first` to `last`, of weights whose groups have scales."""
    acc = tl.zeros([BM, BN], tl.float32)
    SYMMETRIC: tl.constexpr = minimum_rows is None
    s0, s1, s2, s3 = _scales(scale_rows, first, last, exists, cols, scales_stride, GROUP, BN)
    for step in tl.range(first, last, num_stages=STAGES):
        # Read a step ahead: not all tiles have scales enough to be copied asynchronously.
        n0, n1, n2, n3 = _scales(scale_rows, step + 1, last, exists, cols, scales_stride, GROUP, BN)
        x0, x1, w0, w1 = _span(x_rows, w_rows, step * 2, valid, exists, cols, FORMAT, SYMMETRIC, EVEN, BN)
        x2, x3, w2, w3 = _span(x_rows, w_rows, step * 2 + 1, valid, exists, cols, FORMAT, SYMMETRIC, EVEN, BN)
        part = dot(x0, w0, tl.zeros([BM, BN], tl.float32))
        if GROUP == HALF:
            acc += part * s0[None, :]
            part = tl.zeros([BM, BN], tl.float32)
        part = dot(x1, w1, part)
        if GROUP <= SPAN:
            acc += part * s1[None, :]
            part = tl.zeros([BM, BN], tl.float32)
        part = dot(x2, w2, part)
        if GROUP == HALF:
            acc += part * s2[None, :]
            part = tl.zeros([BM, BN], tl.float32)
        acc += dot(x3, w3, part) * s3[None, :]
        s0, s1, s2, s3 = n0, n1, n2, n3
    if minimum_rows is not None:
        begin, end = first * 4 * HALF, tl.minimum(last * 4 * HALF, cols)
        acc = _add_minimums(acc, begin, end, x_rows, minimum_rows, valid, exists, scales_stride, GROUP, BM, BN)
    return acc


@triton.jit
def _scales(rows, step, last, exists, cols, stride, GROUP: tl.constexpr, BN: tl.constexpr):
    """Those of the four halves of spans of a step, (BN,) float32 each; 0 beyond the last step, or the last column."""
    at = step * 4 * HALF
    mask = exists & (tl.full([BN], step, tl.int32) < last)
    s0 = tl.load(rows + at // GROUP * stride, mask=mask, other=0.0).to(tl.float32)
    s1, s2, s3 = s0, s0, s0
    if GROUP == HALF:
        s1 = tl.load(rows + (at // GROUP + 1) * stride, mask=mask, other=0.0).to(tl.float32)
    if GROUP <= SPAN:  # a last step may be cut short
        mask = mask & (tl.full([BN], at + SPAN, tl.int32) < cols)
        s2 = tl.load(rows + (at + SPAN) // GROUP * stride, mask=mask, other=0.0).to(tl.float32)
        s3 = s2
    if GROUP == HALF:
        s3 = tl.load(rows + (at // GROUP + 3) * stride, mask=mask, other=0.0).to(tl.float32)
    return s0, s1, s2, s3


@triton.jit
def _span(
    x_rows,
    w_rows,
    span,
    valid,
    exists,
    cols,
    FORMAT: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    EVEN: tl.constexpr,
    BN: tl.constexpr,
):
    """Both halves of a span of columns of x, (BM, 32) each, and of the codes as floats, (32, BN) each."""
    at = span * SPAN
    j = tl.arange(0, HALF)
    low_mask, high_mask, w_mask = valid[:, None], valid[:, None], exists[None, :]
    if not EVEN:
        low_mask = low_mask & (at + j < cols)[None, :]
        high_mask = high_mask & (at + HALF + j < cols)[None, :]
        w_mask = (exists & (tl.full([BN], at, tl.int32) < cols))[None, :]
    x_low = tl.load(x_rows + (at + j)[None, :], mask=low_mask, other=0.0)
    x_high = tl.load(x_rows + (at + HALF + j)[None, :], mask=high_mask, other=0.0)
    if FORMAT == "int4":
        packed = tl.load(w_rows + (at // 2 + j)[:, None], mask=w_mask, other=0)
        low, high = unpack_int4(packed, SYMMETRIC, x_low.dtype)
    else:
        low = tl.load(w_rows + (at + j)[:, None], mask=w_mask, other=0).to(x_low.dtype)
        high = tl.load(w_rows + (at + HALF + j)[:, None], mask=w_mask, other=0).to(x_low.dtype)
    return x_low, x_high, low, high


@triton.jit
def _add_minimums(
    acc,
    first,
    last,
    x_rows,
    minimum_rows,
    valid,
    exists,
    scales_stride,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """`acc + sums @ minimums`, where sums are those of x over each group of columns from `first` to `last`: a product
    with as many columns as there are groups, so that the loop over the weights knows nothing of minimums."""
    i = tl.arange(0, GROUPS)
    j = tl.arange(0, HALF)
    for begin in tl.range(first, last, GROUPS * GROUP, num_stages=1):
        at = begin + i * GROUP
        sums = tl.zeros([BM, GROUPS], tl.float32)
        for part in tl.range(0, GROUP // HALF, num_stages=1):  # unrolled it spills
            columns = at[:, None] + part * HALF + j[None, :]
            mask = valid[:, None, None] & (columns < last)[None, :, :]
            x_tile = tl.load(x_rows[:, :, None] + columns[None, :, :], mask=mask, other=0.0)
            sums += tl.sum(x_tile.to(tl.float32), 2)
        mask = exists[None, :] & (at < last)[:, None]
        tile = tl.load(minimum_rows[None, :] + (at // GROUP * scales_stride)[:, None], mask=mask, other=0.0)
        acc = tl.dot(sums, tile.to(tl.float32), acc, input_precision="tf32x3")
    return acc

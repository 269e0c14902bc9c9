"""What a matrix product does with a tile of sums: adds up the parts of a split, activates, adds, stores."""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that change with the batch: a kernel that was compiled for one serves all.
NOT_SPECIALIZED = ["rows", "active", "splits", "steps"]


@triton.jit
def finish_tile(
    acc, x_scales, x_row, partials, counters, place, split, splits,
    bias, weight_row, exists, residual, out, rows, valid, tile, N, out_stride, residual_stride,
    BM: tl.constexpr, BN: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """From the sums of a program, (BM, BN), to the output: the scales of x's rows, the other splits, bias, activation
    and residual, each where it is given.

    x_row, rows, valid: (BM,), rows of x and of the output, and which there are; weight_row, exists: (BN,), likewise of
    the weight; place: the tile's number among all, for `gather_splits`.
    """
    if x_scales is not None:
        acc *= tl.load(x_scales + x_row, mask=valid, other=0.0)[:, None]
    done = True
    if partials is not None:
        acc, done = gather_splits(acc, partials, counters, place, split, splits, valid, BM, BN)
    if done:
        if bias is not None:
            acc += tl.load(bias + weight_row, mask=exists, other=0.0).to(tl.float32)[None, :]
        store_tile(acc, out, residual, rows, valid, tile, N, out_stride, residual_stride, BM, BN, ACTIVATION)


@triton.jit
def gather_splits(acc, partials, counters, tile, split, splits, valid, BM: tl.constexpr, BN: tl.constexpr):
    """The sum over all splits of a tile, and whether this program, which came last, is the one that has it.

    Each program puts its sums where the last one finds them. It adds them in the order of the splits, whoever comes
    last, so that equal inputs give equal outputs. acc: (BM, BN); valid: (BM,), rows that count; counters: 0 for each
    tile, and 0 again afterwards.
    """
    inside = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    part = partials + tile.to(tl.int64) * splits * (BM * BN) + inside
    mask = valid[:, None]
    tl.store(part + split * (BM * BN), acc, mask=mask)
    tl.debug_barrier()
    arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
    last = arrived == splits - 1
    if last:
        acc = tl.zeros([BM, BN], tl.float32)
        for other in range(splits):
            acc += tl.load(part + other * (BM * BN), mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(counters + tile, 0)
    return acc, last


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr):
    """`activation(gate) * up` in float32. The tanh of GELU's approximation (arXiv:1606.08415) is a sigmoid."""
    if ACTIVATION == "silu":
        return gate * tl.sigmoid(gate) * up
    inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 sqrt(2 / pi)
    return gate * tl.sigmoid(inner) * up


@triton.jit
def weight_rows(tile, N, BN: tl.constexpr, GATED: tl.constexpr):
    """The rows of the weight that a tile multiplies, and which of them exist: (BN,) each.

    Gated: half of them are rows of the gate, the other half the rows of `up` below them.
    """
    i = tl.arange(0, BN)
    if GATED:
        half: tl.constexpr = BN // 2
        n = tile * half + i + i // half * (N // 2 - half)
        return n, tile * half + i % half < N // 2
    n = tile * BN + i
    return n, n < N


@triton.jit
def store_tile(
    acc,
    out,
    residual,
    rows,
    valid,
    tile,
    N,
    out_stride,
    residual_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """acc: (BM, BN), with its bias; rows, valid: (BM,), rows of the output, and which there are."""
    if ACTIVATION is None:
        n, exists = weight_rows(tile, N, BN, False)
        value = acc
    else:
        half: tl.constexpr = BN // 2
        gate, up = tl.split(tl.permute(tl.reshape(acc, [BM, 2, half]), (0, 2, 1)))
        value = activate(gate, up, ACTIVATION)
        n = tile * half + tl.arange(0, half)
        exists = n < N // 2
    mask = valid[:, None] & exists[None, :]
    where = rows.to(tl.int64)[:, None]
    if residual is not None:
        value += tl.load(residual + where * residual_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + where * out_stride + n[None, :], value.to(out.dtype.element_ty), mask=mask)

"""Thresholds of a row of logits without a sort: how many tokens, or how much probability, lies above a value, by
bisection over floats in their own order.

A row is split into pieces of PIECE tokens, whose greatest logits are known. Only pieces that reach above a value are
read, by a list of their numbers: for top-k the list starts at about k pieces, because the k-th greatest of the pieces'
greatest is not above the k-th greatest of all. Once no more than CANDIDATES tokens are in question they are gathered,
and the search ends in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-2139095041)  # `key` of -inf
GREATEST = tl.constexpr(3.4028234663852886e38)  # finite float32
PIECE_STEPS = tl.constexpr(16)  # of bisection over the pieces' greatest: the bound need not be sharp


@triton.jit
def key(x):
    """float32 to int64 in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def value(of):
    """`key`'s inverse."""
    bits = of.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def cool(x, temperature):
    """x / temperature, finite above; what is no number is -inf."""
    x = tl.math.div_rn(x, tl.zeros_like(x) + temperature)
    return tl.where(x == x, tl.minimum(x, GREATEST), float("-inf"))


@triton.jit
def read(row, vocab, at, inside, ADJUSTS: tl.constexpr):
    """Logits of the tokens `at`, temperature applied; -inf where not inside or beyond the vocabulary.

    row: (logits, adjusted logits, whether those count, temperature) of this row.
    """
    logits, worked, adjusted, temperature = row
    inside = inside & (at < vocab)
    if ADJUSTS:
        ours = inside & (at < tl.where(adjusted != 0, vocab, 0))
        plain = tl.load(logits + at, mask=inside & (at >= tl.where(adjusted != 0, vocab, 0)), other=0.0)
        x = tl.where(ours, tl.load(worked + at, mask=ours, other=0.0), plain.to(tl.float32))
    else:
        x = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, cool(x, temperature), float("-inf"))


@triton.jit
def read_listed(row, vocab, listed, first, n, ADJUSTS: tl.constexpr, PIECE: tl.constexpr, GROUP: tl.constexpr):
    """Logits of the GROUP listed pieces from `first` on: (GROUP, PIECE)."""
    j = first + tl.arange(0, GROUP)
    pieces = tl.load(listed + j, mask=j < n, other=0)
    at = pieces[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
    return read(row, vocab, at, (j < n)[:, None], ADJUSTS)


@triton.jit
def list_pieces(wanted, listed, PIECES: tl.constexpr):
    """Writes the numbers of the pieces that are wanted, in order, and returns how many."""
    tl.debug_barrier()  # the list before this one has been read
    j = tl.arange(0, PIECES)
    position = tl.cumsum(wanted.to(tl.int32), 0) - 1
    tl.store(listed + position, j, mask=wanted)
    tl.debug_barrier()
    return tl.sum(wanted.to(tl.int32))


@triton.jit
def sum_above(
    row, vocab, listed, n, top, limit, ADJUSTS: tl.constexpr, PIECE: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Of the tokens of the listed pieces above `limit`: how many, int32, and their weight exp(x - top), float32."""
    count = tl.zeros([GROUP, PIECE], tl.int32)
    mass = tl.zeros([GROUP, PIECE], tl.float32)
    for first in range(0, n, GROUP):
        x = read_listed(row, vocab, listed, first, n, ADJUSTS, PIECE, GROUP)
        count += (x > limit).to(tl.int32)
        mass += tl.where(x > limit, tl.exp(x - top), 0.0)
    return tl.sum(count), tl.sum(mass)


@triton.jit
def gather_between(
    row, vocab, listed, n, low, high, found,
    ADJUSTS: tl.constexpr, PIECE: tl.constexpr, GROUP: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """The logits in (low, high], of which there are no more than CANDIDATES, and -inf: (CANDIDATES,)."""
    tl.debug_barrier()  # what was found before has been read
    count = 0
    for first in range(0, n, GROUP):
        x = read_listed(row, vocab, listed, first, n, ADJUSTS, PIECE, GROUP)
        x = tl.reshape(x, [GROUP * PIECE])
        hit = (x > low) & (x <= high)
        position = count + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(found + position, x, mask=hit & (position < CANDIDATES))
        count += tl.sum(hit.to(tl.int32))
    tl.debug_barrier()
    j = tl.arange(0, CANDIDATES)
    return tl.load(found + j, mask=j < count, other=float("-inf"))


@triton.jit
def bound(greatest, weights, limit, low, high):
    """A key of [low, high) above which the pieces' greatest alone weigh `limit`, or `low`."""
    for _ in range(PIECE_STEPS):
        middle = (low + high) >> 1
        enough = tl.sum(tl.where(greatest > value(middle), weights, 0.0)) >= limit
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def threshold(
    row, vocab, greatest, top, low, limit, listed, found, BY_MASS: tl.constexpr, ADJUSTS: tl.constexpr,
    PIECE: tl.constexpr, PIECES: tl.constexpr, GROUP: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """The key of the smallest logit above which there is less than `limit`, of tokens or of weight; `low` where all
    above `low` is less.

    greatest: (PIECES,), each piece's greatest logit; top: the row's; low: a key, int64.
    """
    high = key(top)
    if BY_MASS:
        weights = tl.exp(greatest - top)
    else:
        weights = tl.zeros_like(greatest) + 1.0
    low = bound(greatest, weights, limit, low, high)
    n = list_pieces(greatest > value(low), listed, PIECES)
    count_low, mass_low = sum_above(row, vocab, listed, n, top, value(low), ADJUSTS, PIECE, GROUP)
    count_high = tl.zeros_like(count_low)
    weight_high = tl.zeros_like(mass_low)
    if BY_MASS:
        weight_low = mass_low
    else:
        weight_low = count_low.to(tl.float32)
    high = tl.where(weight_low < limit, low, high)
    while (high - low > 1) & (count_low - count_high > CANDIDATES):
        middle = (low + high) >> 1
        count, mass = sum_above(row, vocab, listed, n, top, value(middle), ADJUSTS, PIECE, GROUP)
        if BY_MASS:
            weight = mass
        else:
            weight = count.to(tl.float32)
        enough = weight >= limit
        low = tl.where(enough, middle, low)
        count_low = tl.where(enough, count, count_low)
        high = tl.where(enough, high, middle)
        count_high = tl.where(enough, count_high, count)
        weight_high = tl.where(enough, weight_high, weight)
    if high - low > 1:
        x = gather_between(
            row, vocab, listed, n, value(low), value(high), found, ADJUSTS, PIECE, GROUP, CANDIDATES
        )  # fmt: skip
        if BY_MASS:
            each = tl.exp(x - top)
        else:
            each = tl.zeros_like(x) + 1.0
        while high - low > 1:
            middle = (low + high) >> 1
            enough = weight_high + tl.sum(tl.where(x > value(middle), each, 0.0)) >= limit
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
    return high


@triton.jit
def pick(
    row, vocab, top, floor, mass, pieces, uniform, ADJUSTS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr
):  # fmt: skip
    """The first token at which the running weight of those from `floor` on passes `uniform` of the whole.

    mass: (PIECES,) float32, the weights of the pieces whose numbers are in `pieces`, in their order.
    """
    j = tl.arange(0, PIECES)
    cumulative = tl.cumsum(mass.to(tl.float64), 0)
    total = tl.max(cumulative)
    target = uniform * total
    # The last piece of any weight, where rounding hid the end of the row.
    chosen = tl.minimum(tl.sum((cumulative <= target).to(tl.int32)), tl.sum((cumulative < total).to(tl.int32)))
    before = tl.sum(tl.where(j == chosen - 1, cumulative, 0.0))
    at = tl.sum(tl.where(j == chosen, pieces, 0)) * PIECE + tl.arange(0, PIECE)
    x = read(row, vocab, at, at >= 0, ADJUSTS)
    weight = tl.where(x >= value(floor), tl.exp(x - top), 0.0).to(tl.float64)
    passed = (before + tl.cumsum(weight, 0) > target) & (weight > 0)
    first = tl.min(tl.where(passed, at, vocab))
    last = tl.max(tl.where(weight > 0, at, 0))
    return tl.where(first < vocab, first, last)

"""The scales of groups of weights that give the least squared error, a tile of groups in registers.

The search of `kernels/quantize.py`, candidate by candidate: codes fixed by rounding, then the scale (and minimum) that
fits them best. All tiles are (groups, columns of a group), of float32; `w`: the weights of squared errors, or None.
"""

from __future__ import annotations

import triton
import triton.language as tl

from meshlm.kernels.quantize import REFINEMENTS, SPAN_STEPS, SYMMETRIC_DIVISORS

_REFINEMENTS = tl.constexpr(REFINEMENTS)
_DIVISORS_4 = tl.constexpr(SYMMETRIC_DIVISORS[4])
_DIVISORS_8 = tl.constexpr(SYMMETRIC_DIVISORS[8])
_SPAN_STEPS = tl.constexpr(SPAN_STEPS)
_COUNT_4, _COUNT_8, _COUNT_STEPS = (
    tl.constexpr(len(tried)) for tried in (SYMMETRIC_DIVISORS[4], SYMMETRIC_DIVISORS[8], SPAN_STEPS)
)
_TO_INTEGER = tl.constexpr(1.5 * 2.0**23)  # added to a small number it leaves no bit for a fraction
_LEAST = tl.constexpr(2.0**-126)  # the reciprocal of what is below it may overflow


@triton.jit
def nearest(x):
    """Rounded to integers, half to even. x: within 2 ** 22."""
    return (x + _TO_INTEGER) - _TO_INTEGER


@triton.jit
def reciprocal(x):
    """1 / x, and 0 for 0."""
    kept = tl.abs(x) >= _LEAST
    return tl.where(kept, tl.math.div_rn(tl.full(x.shape, 1.0, tl.float32), tl.where(kept, x, 1.0)), 0.0)


@triton.jit
def _weighted(values, w):
    if w is not None:
        values *= w
    return values


@triton.jit
def symmetric_codes(x, scales, HALF: tl.constexpr):
    """Codes from -HALF to HALF - 1. scales: (groups,)."""
    return nearest(tl.clamp(x * reciprocal(scales)[:, None], -HALF, HALF - 1.0))


@triton.jit
def _solve_symmetric(x, w, codes):
    """The best scales for these codes, and how much of the squares they explain."""
    product, square = tl.sum(_weighted(x * codes, w), 1), tl.sum(_weighted(codes * codes, w), 1)
    scales = product * reciprocal(square)
    return scales, scales * product


@triton.jit
def _stored_symmetric(x, w, scales, HALF: tl.constexpr):
    """Scales as float16 holds them, and their error."""
    scales = scales.to(tl.float16).to(tl.float32)
    missed = x - scales[:, None] * symmetric_codes(x, scales, HALF)
    return scales, tl.sum(_weighted(missed * missed, w), 1)


@triton.jit
def search_symmetric(x, w, BITS: tl.constexpr):
    """Scales (groups,), in float16's values, and squared errors."""
    half: tl.constexpr = 1 << (BITS - 1)
    divisors: tl.constexpr = _DIVISORS_4 if BITS == 4 else _DIVISORS_8
    count: tl.constexpr = _COUNT_4 if BITS == 4 else _COUNT_8
    low, high = tl.min(x, 1), tl.max(x, 1)
    extreme = tl.where(high > -low, high, low)
    best, explained = _solve_symmetric(x, w, symmetric_codes(x, extreme / divisors[0], half))
    for i in tl.static_range(1, count):
        scales, share = _solve_symmetric(x, w, symmetric_codes(x, extreme / divisors[i], half))
        best = tl.where(share > explained, scales, best)
        explained = tl.maximum(share, explained)
    for _ in tl.static_range(_REFINEMENTS):
        best, _explained = _solve_symmetric(x, w, symmetric_codes(x, best, half))
    best, error = _stored_symmetric(x, w, best, half)
    for i in tl.static_range(2):
        plain = tl.abs(extreme) / (half - 1) if i == 0 else extreme / -half
        scales, found = _stored_symmetric(x, w, plain, half)
        best = tl.where(found < error, scales, best)
        error = tl.where(found < error, found, error)  # what is no number stays none
    return best, error


@triton.jit
def codes_above(x, scales, minimums):
    """Codes from 0 to 15. scales, minimums: (groups,)."""
    return nearest(tl.clamp((x - minimums[:, None]) * reciprocal(scales)[:, None], 0.0, 15.0))


@triton.jit
def _solve_above(x, w, total, codes):
    """The best scales and minimums for these codes, and how much of the squares they explain. x: without its mean."""
    linear, square = tl.sum(w * codes, 1), tl.sum(w * codes * codes, 1)
    product = tl.sum(w * x * codes, 1)
    scales = total * product * reciprocal(total * square - linear * linear)
    return scales, -scales * linear * reciprocal(total), scales * product


@triton.jit
def _stored_above(x, w, scales, minimums):
    """Scales and minimums as float16 holds them, and their error."""
    scales = scales.to(tl.float16).to(tl.float32)
    minimums = minimums.to(tl.float16).to(tl.float32)
    missed = x - (scales[:, None] * codes_above(x, scales, minimums) + minimums[:, None])
    return scales, minimums, tl.sum(w * missed * missed, 1)


@triton.jit
def search_above(x, w):
    """Scales and minimums (groups,), in float16's values, and squared errors, for 4 bits. w: 0 where nothing is."""
    total = tl.sum(w, 1)
    mean = tl.sum(w * x, 1) * reciprocal(total)
    centered = x - mean[:, None]
    low = tl.where(total > 0, tl.min(tl.where(w > 0, centered, float("inf")), 1), 0.0)
    high = tl.where(total > 0, tl.max(tl.where(w > 0, centered, float("-inf")), 1), 0.0)
    span = high - low
    best, bottom, explained = _solve_above(centered, w, total, codes_above(centered, span / _SPAN_STEPS[0], low))
    for i in tl.static_range(1, _COUNT_STEPS):
        scales, minimums, share = _solve_above(
            centered, w, total, codes_above(centered, span / _SPAN_STEPS[i], low)
        )  # fmt: skip
        best = tl.where(share > explained, scales, best)
        bottom = tl.where(share > explained, minimums, bottom)
        explained = tl.maximum(share, explained)
    for _ in tl.static_range(_REFINEMENTS):
        best, bottom, _explained = _solve_above(centered, w, total, codes_above(centered, best, bottom))
    best, bottom, error = _stored_above(x, w, best, bottom + mean)
    scales, minimums, found = _stored_above(x, w, span / 15, low + mean)
    better = found < error
    return tl.where(better, scales, best), tl.where(better, minimums, bottom), tl.where(better, found, error)

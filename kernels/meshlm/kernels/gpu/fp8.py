"""Floats to 8 bits (E4M3), which the interpreter does wrongly."""

from __future__ import annotations

import triton
import triton.language as tl

from meshlm.kernels.gpu.dot import INTERPRETED
from meshlm.kernels.gpu.kv_cache import LARGEST_FP8

_LARGEST = tl.constexpr(LARGEST_FP8)
_LEAST_NORMAL = tl.constexpr(2.0**-6)
_SUBNORMAL_STEPS = tl.constexpr(2.0**9)  # a step of the numbers below is its reciprocal


@triton.jit
def to_fp8(x):
    """float32 to the nearest of E4M3; what is beyond its largest becomes that.

    The interpreter (3.6 to 3.9) loses the carry where a mantissa rounds up to the next power of two, so it gets numbers
    that need no rounding.
    """
    x = tl.clamp(x, -_LARGEST, _LARGEST)
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        subnormal = tl.floor(x * _SUBNORMAL_STEPS + 0.5) / _SUBNORMAL_STEPS
        x = tl.where(tl.abs(x) < _LEAST_NORMAL, subnormal, normal)
    return x.to(tl.float8e4nv)

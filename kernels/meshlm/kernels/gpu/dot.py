"""The product of tiles, which differs under the interpreter."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# The interpreter multiplies tiles of bfloat16 wrongly (seen in Triton 3.6 to 3.9): it gets them in float32.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def dot(a, b, accumulator):
    """`accumulator + a @ b` in float32; float32 operands are not rounded to tf32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def dot_apart(a, b, accumulator):
    """`accumulator + a @ b` where tensor cores sum products of fp8 in few bits (`capabilities.sums_fp8_exactly`): they
    sum this product alone, and it is added in float32. With 128 columns at a time it is what DeepGEMM does.

    max_num_imprecise_acc is given so that the compiler does not put the sum back into the product.
    """
    zeros = tl.zeros(accumulator.shape, tl.float32)
    if INTERPRETED:
        return accumulator + tl.dot(a.to(tl.float32), b.to(tl.float32), zeros)
    return accumulator + tl.dot(a, b, zeros, max_num_imprecise_acc=a.shape[1])

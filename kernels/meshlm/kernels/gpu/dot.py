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

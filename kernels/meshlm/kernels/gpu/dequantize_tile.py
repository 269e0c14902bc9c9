"""4-bit codes of a tile as floats, in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from meshlm.kernels.gpu.dot import INTERPRETED

# A word of four codes' bytes becomes pairs of bfloat16 without a conversion, which is four times dearer: bits 0x4300
# with a code below them are 128 + code, from which a fused multiply-add takes 128, and 8 where that stands for 0 (the
# trick is Kim et al.'s, arXiv:2211.10017, as Marlin has it, arXiv:2408.11743). Both steps are exact.
_TEMPLATE = """
{{
.reg .b32 a, b, c, d, one, zero;
mov.b32 one, 0x3F803F80;
mov.b32 zero, {zero};
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
shr.b32 c, a, 4;
shr.b32 d, b, 4;
lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 b, b, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 c, c, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 d, d, 0x000F000F, 0x43004300, 0xEA;
fma.rn.bf16x2 $0, a, one, zero;
fma.rn.bf16x2 $1, b, one, zero;
fma.rn.bf16x2 $2, c, one, zero;
fma.rn.bf16x2 $3, d, one, zero;
}}
"""
SIGNED = tl.constexpr(_TEMPLATE.format(zero="0xC308C308"))  # -136 twice
UNSIGNED = tl.constexpr(_TEMPLATE.format(zero="0xC300C300"))  # -128 twice


@triton.jit
def unpack_int4(codes, symmetric: tl.constexpr, dtype: tl.constexpr):
    """Bytes of codes to the codes of their low and of their high halves, both in `dtype`; symmetric: 8 becomes 0."""
    if INTERPRETED or dtype != tl.bfloat16:
        low, high = (codes & 0xF).to(tl.int8), (codes >> 4).to(tl.int8)
        if symmetric:
            low, high = low - 8, high - 8
        return low.to(dtype), high.to(dtype)
    if symmetric:
        return tl.inline_asm_elementwise(
            SIGNED, "=r,=r,=r,=r,r", [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    return tl.inline_asm_elementwise(
        UNSIGNED, "=r,=r,=r,=r,r", [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
    )

"""The rows of a table on a GPU, dense or quantized: token ids to vectors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from meshlm.kernels.gpu.checks import require, require_runs_on, require_tensor
from meshlm.kernels.gpu.matrix import Matrix, QuantizedMatrix
from meshlm.kernels.gpu.variants import Variant

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 1024
DENSE, FP8, INT8, INT4 = (tl.constexpr(number) for number in range(4))
_FORMATS = {"fp8": 1, "int8": 2, "int4": 3}


def embedding(
    tokens: torch.Tensor,
    matrix: Matrix,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The rows `tokens` of a table times `scale`: `out`, or a new (rows, width) of `dtype`.

    tokens: (rows,) int32; one that the table does not have gives zeros. matrix: (vocab, width), dense of a float type
    or quantized. Computed in float32 and rounded once. Raises ArgumentError.
    """
    require_runs_on(tokens.device, "tokens")
    require_tensor("tokens", tokens, shape=(None,), dtypes=(torch.int32,), device=tokens.device)
    require(dtype in FLOATS, "dtype", f"is {dtype}, must be float32, float16 or bfloat16")
    quantized = matrix if isinstance(matrix, QuantizedMatrix) else None
    if isinstance(matrix, torch.Tensor):
        require_tensor("matrix", matrix, shape=(None, None), dtypes=FLOATS, device=tokens.device)
        codes, scales, minimums, (vocab, width) = matrix, None, None, matrix.shape
    else:
        require(matrix.device == tokens.device, "matrix", f"is on {matrix.device}, must be on {tokens.device}")
        codes, scales, minimums, vocab, width = matrix.codes, matrix.scales, matrix.minimums, matrix.rows, matrix.cols
        for part in (codes, scales, minimums):
            require(part is None or part.stride(-1) == 1, "matrix", "has a stride other than 1 in its last dimension")
        alike = minimums is None or minimums.stride() == scales.stride()
        require(alike, "matrix", "has scales and minimums of different strides")
    if out is None:
        out = torch.empty(len(tokens), width, dtype=dtype, device=tokens.device)
    else:
        require_tensor("out", out, shape=(len(tokens), width), dtypes=(dtype,), device=tokens.device)
    if len(tokens):
        _embed[(len(tokens), triton.cdiv(width, BLOCK))](
            tokens, codes, codes.stride(0), scales, minimums, 0 if scales is None else scales.stride(0),
            out, out.stride(0), vocab, width, scale,
            FORMAT=0 if quantized is None else _FORMATS[quantized.format],
            GROUP=0 if quantized is None else quantized.group,
            MINIMUM=minimums is not None, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _embed(
    tokens, codes, stride, scales, minimums, scales_stride, out, out_stride, vocab, width, scale,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, MINIMUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    everywhere = tl.zeros([BLOCK], tl.int64) + token  # the interpreter makes no mask of a number's comparison
    held = inside & (everywhere >= 0) & (everywhere < vocab)
    if FORMAT == INT4:  # see QuantizedMatrix: spans of 64 columns, of which a byte has one of each half
        byte = tl.load(codes + token * stride + at // 64 * 32 + at % 32, mask=held, other=0)
        code = tl.where(at % 64 < 32, byte & 0xF, byte >> 4).to(tl.float32)
        values = code if MINIMUM else code - 8
    else:
        values = tl.load(codes + token * stride + at, mask=held, other=0.0).to(tl.float32)
    if FORMAT == FP8:
        values *= tl.load(scales + everywhere, mask=held, other=0.0)
    elif FORMAT != DENSE:
        group = (at // GROUP).to(tl.int64) * scales_stride + token
        values *= tl.load(scales + group, mask=held, other=0.0).to(tl.float32)
        if MINIMUM:
            values += tl.load(minimums + group, mask=held, other=0.0).to(tl.float32)
    values = tl.where(held, values * scale, 0.0)
    tl.store(out + row * out_stride + at, values.to(out.dtype.element_ty), mask=inside)


def variants() -> Iterator[Variant]:
    """Tables in bfloat16, and as GGUF files have them, in 8 and 4 bits."""
    types = {
        "tokens": "*i32:16", "stride": "i32:16", "out": "*bf16:16", "out_stride": "i32:16", "vocab": "i32:16",
        "scales_stride": "i32:16", "width": "i32:16", "scale": "fp32", "scales": "*fp16:16", "minimums": "*fp16:16",
    }  # fmt: skip
    for name, codes, number, absent in (
        ("bf16", "*bf16:16", 0, ("scales", "minimums")),
        ("int8", "*i8:16", 2, ("minimums",)),
        ("int4", "*u8:16", 3, ()),
    ):
        given = {key: value for key, value in types.items() if key not in absent} | {"codes": codes}
        constants = {"FORMAT": number, "GROUP": 32, "MINIMUM": number == 3, "BLOCK": BLOCK} | dict.fromkeys(absent)
        yield Variant(f"embedding {name}", _embed, given, constants, {"num_warps": 4})

"""Activations in 8 bits, each row with its own scale: in fp8 the left side of a product of fp8 with fp8."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from meshlm.kernels.gpu.checks import require, require_runs_on, require_tensor
from meshlm.kernels.gpu.fp8 import to_fp8
from meshlm.kernels.gpu.kv_cache import LARGEST_FP8
from meshlm.kernels.gpu.scale_search import nearest
from meshlm.kernels.gpu.variants import ARCHITECTURES, FP8_ARCHITECTURES, Variant

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LARGEST = {torch.float8_e4m3fn: LARGEST_FP8, torch.int8: 127.0}  # code, by which a row's largest number is stored
_LARGEST_FLOAT = tl.constexpr(3.4028234e38)
_LEAST = tl.constexpr(2.0**-100)  # a row of less is stored as zeros: its scale might not be a normal number


def quantize_rows(x: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[torch.Tensor, torch.Tensor]:
    """x (rows, cols) of a float type to codes (rows, cols) of `dtype`, float8_e4m3fn or int8, and scales (rows,)
    float32; `scale * code` is near x, the scale being the row's largest magnitude / 448 or / 127, or 1 where all are 0.

    No sync with the device: a row with what is no finite number has an infinite scale, so that products of it are no
    numbers. Raises ArgumentError.
    """
    require_runs_on(x.device, "x")
    require_tensor("x", x, shape=(None, None), dtypes=FLOATS, device=x.device)
    require(dtype in LARGEST, "dtype", f"is {dtype}, must be float8_e4m3fn or int8")
    rows, cols = x.shape
    codes = torch.empty(rows, cols, dtype=dtype, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        _quantize_rows[(rows,)](
            x, codes, scales, cols, x.stride(0), LARGEST=LARGEST[dtype], BLOCK=_block(cols), num_warps=8
        )
    return codes, scales


def _block(cols: int) -> int:
    return min(4096, int(triton.next_power_of_2(cols)))


@triton.jit
def _quantize_rows(x, codes, scales, cols, stride, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, cols, BLOCK):
        sizes = tl.abs(tl.load(x + row * stride + begin + i, mask=begin + i < cols, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, tl.where(sizes <= _LARGEST_FLOAT, sizes, float("inf")))
    most = tl.max(largest, 0)
    scale = tl.where(most >= _LEAST, most / LARGEST, 1.0)
    tl.store(scales + row, scale)
    for begin in range(0, cols, BLOCK):
        values = tl.load(x + row * stride + begin + i, mask=begin + i < cols, other=0.0).to(tl.float32) / scale
        if codes.dtype.element_ty == tl.int8:
            found = nearest(tl.clamp(values, -LARGEST, LARGEST)).to(tl.int8)
        else:
            found = to_fp8(values)
        tl.store(codes + row * cols + begin + i, found, mask=begin + i < cols)


def variants() -> Iterator[Variant]:
    types = {"x": "*bf16:16", "scales": "*fp32:16", "cols": "i32:16", "stride": "i32:16"}
    for name, codes, dtype in (("fp8", "*fp8e4nv:16", torch.float8_e4m3fn), ("int8", "*i8:16", torch.int8)):
        yield Variant(
            f"quantize_rows {name}",
            _quantize_rows,
            types | {"codes": codes},
            {"LARGEST": LARGEST[dtype], "BLOCK": 4096},
            {"num_warps": 8},
            architectures=FP8_ARCHITECTURES if name == "fp8" else ARCHITECTURES,
        )

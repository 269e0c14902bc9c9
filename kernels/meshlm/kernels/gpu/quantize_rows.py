"""Activations as fp8, each row with its own scale: the left side of a product of fp8 with fp8."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from meshlm.kernels.gpu.fp8 import to_fp8
from meshlm.kernels.gpu.kv_cache import LARGEST_FP8
from meshlm.kernels.gpu.variants import Variant

_LARGEST = tl.constexpr(LARGEST_FP8)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (rows, cols) of a float type to codes (rows, cols) float8_e4m3fn and scales (rows,) float32; `scale * code`
    is near x, the scale being the row's largest magnitude / 448, or 1 where all are 0."""
    rows, cols = x.shape
    codes = torch.empty(rows, cols, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        _quantize_rows[(rows,)](x, codes, scales, cols, x.stride(0), BLOCK=_block(cols), num_warps=8)
    return codes, scales


def _block(cols: int) -> int:
    return min(4096, triton.next_power_of_2(cols))


@triton.jit
def _quantize_rows(x, codes, scales, cols, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, cols, BLOCK):
        values = tl.load(x + row * stride + begin + i, mask=begin + i < cols, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
    most = tl.max(largest, 0)
    scale = tl.where(most > 0, most / _LARGEST, 1.0)
    tl.store(scales + row, scale)
    for begin in range(0, cols, BLOCK):
        values = tl.load(x + row * stride + begin + i, mask=begin + i < cols, other=0.0).to(tl.float32)
        tl.store(codes + row * cols + begin + i, to_fp8(values / scale), mask=begin + i < cols)


def variants() -> Iterator[Variant]:
    types = {"x": "*bf16:16", "codes": "*fp8e4nv:16", "scales": "*fp32:16", "cols": "i32:16", "stride": "i32:16"}
    options = {"num_warps": 8}
    yield Variant("quantize_rows", _quantize_rows, types, {"BLOCK": 4096}, options, architectures=(90, 100))

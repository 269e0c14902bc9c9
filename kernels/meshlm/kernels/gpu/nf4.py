"""4-bit NormalFloat with double quantization (QLoRA, Dettmers et al. 2023, arXiv:2305.14314) on a GPU, and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch.nn import functional

from meshlm.kernels.gpu.checks import require, require_runs_on, require_tensor
from meshlm.kernels.gpu.matrix import padded_cols
from meshlm.kernels.gpu.quantize import store_spans
from meshlm.kernels.gpu.scale_search import reciprocal
from meshlm.kernels.gpu.variants import Variant
from meshlm.kernels.low_bits import NF4_BLOCK, NF4_GROUP, NF4_LEVELS

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ROWS = 32  # of a tile of one group

_LEVELS = tl.constexpr(NF4_LEVELS)
_BORDERS = tl.constexpr(tuple((low + high) / 2 for low, high in pairwise(NF4_LEVELS)))
_GROUP = tl.constexpr(NF4_GROUP)
_LARGEST_FLOAT = tl.constexpr(3.4028234e38)


@dataclass(frozen=True, slots=True)
class Nf4Matrix:
    """A weight (rows, cols) as `level[code] * (scale_code * step + mean)`.

    codes: (rows, padded / 2) uint8, packed as the codes of QuantizedMatrix in int4; each numbers a level of NF4_LEVELS.
    scale_codes: (groups, rows) int8, of each 64 columns; steps: (groups * rows / 256, rounded up) float32, of each 256
    scale codes as they lie; mean: () float32.
    """

    codes: torch.Tensor
    scale_codes: torch.Tensor
    steps: torch.Tensor
    mean: torch.Tensor
    cols: int

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.scale_codes, self.steps, self.mean))


def quantize_nf4(weight: torch.Tensor) -> Nf4Matrix:
    """weight: (rows, cols) of a float type; rows may lie apart. Codes are the nearest by the scales as they are stored,
    which errs less than by those before their own quantization.

    Waits for the device, for errors: raises ArgumentError for another shape, or values that are not finite.
    """
    require_runs_on(weight.device, "weight")
    require_tensor("weight", weight, shape=(None, None), dtypes=FLOATS, device=weight.device)
    require(weight.numel() > 0, "weight", f"is of shape {tuple(weight.shape)}, must not be empty")
    (rows, cols), device = weight.shape, weight.device
    padded = padded_cols(cols)
    scales = torch.empty(padded // NF4_GROUP, rows, device=device)
    grid = (triton.cdiv(rows, ROWS), padded // NF4_GROUP)
    _group_maxima[grid](weight, weight.stride(0), scales, rows, cols, ROWS=ROWS, num_warps=4)
    mean = scales.mean()
    require(bool(torch.isfinite(mean)), "weight", "is not finite everywhere")
    blocks = functional.pad((scales - mean).view(-1), (0, -scales.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    steps = blocks.abs().amax(1) / 127
    inverse = torch.where(steps == 0, 0.0, 1 / steps).unsqueeze(1)
    scale_codes = (blocks * inverse).round_().to(torch.int8).view(-1)[: scales.numel()].view(scales.shape)
    codes = torch.empty(rows, padded // 2, dtype=torch.uint8, device=device)
    _nf4_codes[grid](
        weight, weight.stride(0), scale_codes, steps, mean, codes, rows, cols, padded, ROWS=ROWS, num_warps=4
    )
    return Nf4Matrix(codes, scale_codes, steps, mean, cols)


def dequantize_nf4(
    matrix: Nf4Matrix, *, dtype: torch.dtype = torch.bfloat16, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The weight (rows, cols) in `dtype`: `out`, or a new one. Raises ArgumentError."""
    require_runs_on(matrix.device, "matrix")
    require(dtype in FLOATS, "dtype", f"is {dtype}, must be float32, float16 or bfloat16")
    rows, cols = matrix.rows, matrix.cols
    if out is None:
        out = torch.empty(rows, cols, dtype=dtype, device=matrix.device)
    else:
        require_tensor("out", out, shape=(rows, cols), dtypes=(dtype,), device=matrix.device)
    grid = (triton.cdiv(rows, ROWS), len(matrix.scale_codes))
    _nf4_values[grid](
        matrix.codes, matrix.scale_codes, matrix.steps, matrix.mean, out, out.stride(0), rows, cols,
        ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _scales_of(scale_codes, steps, mean, group, number, rows):
    """(rows,) float32, of one group."""
    place = group.to(tl.int64) * rows + number
    code = tl.load(scale_codes + place, mask=number < rows, other=0).to(tl.float32)
    return code * tl.load(steps + place // 256, mask=number < rows, other=0.0) + tl.load(mean)


@triton.jit
def _tile(weight, stride, number, rows, cols):
    """Rows of the program's group, (ROWS, 64) float32."""
    column = tl.program_id(1) * _GROUP + tl.arange(0, _GROUP)
    mask = (number < rows)[:, None] & (column < cols)[None, :]
    place = weight + number.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _group_maxima(weight, stride, scales, rows, cols, ROWS: tl.constexpr):
    """Grid: (blocks of rows, groups), as of all here. Infinite where a number is none."""
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x = tl.abs(_tile(weight, stride, number, rows, cols))
    most = tl.max(tl.where(x <= _LARGEST_FLOAT, x, float("inf")), 1)
    tl.store(scales + tl.program_id(1).to(tl.int64) * rows + number, most, mask=number < rows)


@triton.jit
def _nf4_codes(weight, stride, scale_codes, steps, mean, codes, rows, cols, padded, ROWS: tl.constexpr):
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    scales = _scales_of(scale_codes, steps, mean, tl.program_id(1), number, rows)
    ratio = _tile(weight, stride, number, rows, cols) * reciprocal(scales)[:, None]
    found = tl.zeros([ROWS, _GROUP], tl.int32)
    for i in tl.static_range(15):
        found += (ratio > _BORDERS[i]).to(tl.int32)
    store_spans(codes, found, number.to(tl.int64), number < rows, tl.program_id(1) * _GROUP, padded, ROWS, _GROUP)


@triton.jit
def _level(code):
    value = tl.full(code.shape, _LEVELS[0], tl.float32)
    for i in tl.static_range(1, 16):
        value = tl.where(code == i, _LEVELS[i], value)
    return value


@triton.jit
def _nf4_values(codes, scale_codes, steps, mean, out, out_stride, rows, cols, ROWS: tl.constexpr):
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, real = number.to(tl.int64)[:, None], (number < rows)[:, None]
    scales = _scales_of(scale_codes, steps, mean, tl.program_id(1), number, rows)[:, None]
    j = tl.arange(0, _GROUP // 2)[None, :]
    first = tl.program_id(1) * _GROUP
    byte = tl.load(codes + row * tl.num_programs(1) * (_GROUP // 2) + first // 2 + j, mask=real, other=0)
    place = out + row * out_stride + first + j
    low, high = _level(byte & 0xF) * scales, _level(byte >> 4) * scales
    tl.store(place, low.to(out.dtype.element_ty), mask=real & (first + j < cols))
    tl.store(place + _GROUP // 2, high.to(out.dtype.element_ty), mask=real & (first + _GROUP // 2 + j < cols))


def variants() -> Iterator[Variant]:
    """Run when a model is loaded."""
    types = dict.fromkeys(("stride", "out_stride", "rows", "cols", "padded"), "i32:16")
    types |= {"weight": "*bf16:16", "out": "*bf16:16", "codes": "*u8:16", "scale_codes": "*i8:16"}
    types |= dict.fromkeys(("scales", "steps", "mean"), "*fp32:16")
    for name, kernel in (("maxima of groups", _group_maxima), ("codes", _nf4_codes), ("values", _nf4_values)):
        yield Variant(f"nf4 {name}", kernel, types, {"ROWS": ROWS}, {"num_warps": 4}, hot=False)

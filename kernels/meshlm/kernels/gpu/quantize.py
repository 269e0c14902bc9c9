"""Weights to few bits on the device, where the dense ones are, and back.

4 bits, and 8 in groups, search each group's scale as `kernels/quantize.py` does; 8 bits and fp8 with a scale a row (or,
fp8, one for all) take the largest magnitude. 4-bit NormalFloat is in `nf4.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from meshlm.kernels.gpu.checks import require, require_capability, require_runs_on, require_tensor
from meshlm.kernels.gpu.embedding import embedding
from meshlm.kernels.gpu.fp8 import to_fp8
from meshlm.kernels.gpu.kv_cache import LARGEST_FP8
from meshlm.kernels.gpu.matrix import GROUPS, QuantizedMatrix, WeightFormat, padded_cols
from meshlm.kernels.gpu.scale_search import codes_above, nearest, search_above, search_symmetric, symmetric_codes
from meshlm.kernels.gpu.variants import ARCHITECTURES, FP8_ARCHITECTURES, Variant
from meshlm.kernels.quantize import GROUP

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ROWS, COLS = 16, 128  # of a tile, whose columns are the largest group
BLOCK = 2048
_LEAST_SALIENCE = 1e-4  # of the mean: a column that was never met still counts a little
_LARGEST_FLOAT = tl.constexpr(3.4028234e38)


def quantize(
    weight: torch.Tensor,
    format: WeightFormat,  # noqa: A002 - the field's name
    *,
    group: int | None = None,
    minimum: bool = False,
    per_tensor: bool = False,
    importance: torch.Tensor | None = None,
) -> QuantizedMatrix:
    """A weight as products read it: as `matrix.pack` of a dense one, but on the device and with a better search.

    weight: (rows, cols) of a float type; rows may lie apart. int4: in groups of 32, 64 or 128 (None: 32) with a minimum
    or without; int8: in such groups, or with one scale a row (None); fp8: with one scale a row, or `per_tensor`.
    importance: (cols,) float32, the weight of a column's squared error where scales are searched, such as the mean
    square of the input that meets it (AWQ's salience, arXiv:2306.00978).
    Waits for the device, for errors: raises ArgumentError for a combination that there is not, another shape, values
    that are not finite, or too large for scales in float16.
    """
    require_runs_on(weight.device, "weight")
    require_tensor("weight", weight, shape=(None, None), dtypes=FLOATS, device=weight.device)
    require(weight.numel() > 0, "weight", f"is of shape {tuple(weight.shape)}, must not be empty")
    require(format in ("int4", "int8", "fp8"), "format", f"is {format}, must be one of: int4, int8, fp8")
    require(format == "int4" or not minimum, "minimum", f"is for int4, not {format}")
    require(format == "fp8" or not per_tensor, "per_tensor", f"is for fp8, not {format}")
    require(format != "fp8" or group is None, "group", "is not for fp8")
    require(group is None or group in GROUPS, "group", f"is {group}, must be one of {GROUPS}")
    if format == "int4" or group is not None:
        return _by_groups(weight, 4 if format == "int4" else 8, group or GROUP, minimum, importance)
    require(importance is None, "importance", "is for groups, whose scales are searched")
    return _by_rows(weight, format, per_tensor)


def dequantize(
    matrix: QuantizedMatrix, *, dtype: torch.dtype = torch.bfloat16, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The weight (rows, cols) in `dtype`: `out`, or a new one. Raises ArgumentError."""
    require_runs_on(matrix.device, "matrix")
    return embedding(torch.arange(matrix.rows, dtype=torch.int32, device=matrix.device), matrix, dtype=dtype, out=out)


def _salience(importance: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
    """(cols,), 1 on the average."""
    if importance is None:
        return None
    cols = weight.shape[1]
    require_tensor("importance", importance, shape=(cols,), dtypes=(torch.float32,), device=weight.device)
    sound = torch.isfinite(importance) & (importance >= 0)
    require(bool(sound.all()), "importance", "must be finite and nowhere below 0")
    mean = importance.mean()
    return torch.where(mean == 0, 1.0, (importance / mean).clamp_min(_LEAST_SALIENCE)).contiguous()


def _by_groups(
    weight: torch.Tensor, bits: int, group: int, minimum: bool, importance: torch.Tensor | None
) -> QuantizedMatrix:
    (rows, cols), device = weight.shape, weight.device
    padded, salience = padded_cols(cols), _salience(importance, weight)
    groups = triton.cdiv(padded, group)
    codes = torch.empty(rows, padded * bits // 8, dtype=torch.uint8 if bits == 4 else torch.int8, device=device)
    scales = torch.empty(groups, rows, dtype=torch.float16, device=device)
    minimums = torch.empty_like(scales) if minimum else None
    failed = torch.zeros(1, dtype=torch.int32, device=device)
    _quantize_groups[(triton.cdiv(rows, ROWS), triton.cdiv(padded, COLS))](
        weight, weight.stride(0), salience, codes, scales, minimums, failed, rows, cols, padded, groups,
        BITS=bits, GROUP=group, ROWS=ROWS, COLS=COLS, num_warps=4,
    )  # fmt: skip
    if failed.item():
        require(bool(torch.isfinite(weight).all()), "weight", "is not finite everywhere")
        require(False, "weight", f"has values up to {float(weight.abs().max()):g}, too large for scales in float16")
    return QuantizedMatrix("int4" if bits == 4 else "int8", codes, scales, minimums, group, cols)


def _by_rows(weight: torch.Tensor, format: WeightFormat, per_tensor: bool) -> QuantizedMatrix:  # noqa: A002
    (rows, cols), device = weight.shape, weight.device
    padded, fp8 = padded_cols(cols), format == "fp8"
    if fp8:
        require_capability(device, (8, 9), "format")
    largest = torch.empty(rows, device=device)
    _row_maxima[(rows,)](weight, weight.stride(0), largest, cols, BLOCK=BLOCK, num_warps=8)
    most = float(largest.amax())
    require(most < float("inf"), "weight", "is not finite everywhere")
    if fp8:
        scales = (largest.amax().expand(rows) if per_tensor else largest) / LARGEST_FP8
        scales = torch.where(scales == 0, 1.0, scales)
    else:
        require(most / 127 <= 65504, "weight", f"has values up to {most:g}, too large for scales in float16")
        scales = (largest / 127).half()
    codes = torch.empty(rows, padded, dtype=torch.float8_e4m3fn if fp8 else torch.int8, device=device)
    _quantize_rows[(rows, triton.cdiv(padded, BLOCK))](
        weight, weight.stride(0), scales, codes, cols, padded, FP8=fp8, BLOCK=BLOCK, num_warps=8
    )
    return QuantizedMatrix(format, codes, scales if fp8 else scales.unsqueeze(0), None, padded, cols)


@triton.jit
def _quantize_groups(
    weight, stride, salience, codes, scales, minimums, failed, rows, cols, padded, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of ROWS, blocks of COLS)."""
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, real = number.to(tl.int64), number < rows
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = real[:, None] & (column < cols)[None, :]
    x = tl.load(weight + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    x = tl.reshape(x, [ROWS * COLS // GROUP, GROUP])
    w = None
    if salience is not None:
        weights = tl.load(salience + column, mask=column < cols, other=0.0)
        w = tl.reshape(tl.where(inside, weights[None, :], 0.0), [ROWS * COLS // GROUP, GROUP])
    elif minimums is not None:
        w = tl.reshape(inside.to(tl.float32), [ROWS * COLS // GROUP, GROUP])
    group = tl.program_id(1) * (COLS // GROUP) + tl.arange(0, COLS // GROUP)
    place = group.to(tl.int64)[None, :] * rows + row[:, None]
    exists = real[:, None] & (group < groups)[None, :]
    half: tl.constexpr = 1 << (BITS - 1)
    if minimums is not None:
        scale, floor, error = search_above(x, w)
        found = codes_above(x, scale, floor)
        floor = tl.reshape(floor, [ROWS, COLS // GROUP])
        tl.store(minimums + place, floor.to(tl.float16), mask=exists)
    else:
        scale, error = search_symmetric(x, w, BITS)
        found = symmetric_codes(x, scale, half)
    tl.store(scales + place, tl.reshape(scale, [ROWS, COLS // GROUP]).to(tl.float16), mask=exists)
    if tl.sum(1 - (error <= _LARGEST_FLOAT).to(tl.int32)) > 0:
        tl.store(failed, 1)
    if BITS == 8:
        found = tl.reshape(found, [ROWS, COLS]).to(tl.int8)
        mask = real[:, None] & (column < padded)[None, :]
        tl.store(codes + row[:, None] * padded + column[None, :], found, mask=mask)
    else:
        unsigned = found if minimums is not None else found + half
        store_spans(codes, unsigned, row, real, tl.program_id(1) * COLS, padded, ROWS, COLS)


@triton.jit
def store_spans(codes, unsigned, row, real, first, padded, ROWS: tl.constexpr, COLS: tl.constexpr):
    """4-bit codes, packed as in QuantizedMatrix. unsigned: of ROWS * COLS elements, rows of columns from `first` on."""
    spans: tl.constexpr = COLS // 64
    halves = tl.permute(tl.reshape(unsigned.to(tl.int32), [ROWS, spans, 2, 32]), [0, 1, 3, 2])
    low, high = tl.split(halves)
    packed = tl.reshape(low | (high << 4), [ROWS, COLS // 2]).to(tl.uint8)
    at = first // 2 + tl.arange(0, COLS // 2)
    mask = real[:, None] & (at < padded // 2)[None, :]
    tl.store(codes + row[:, None] * (padded // 2) + at[None, :], packed, mask=mask)


@triton.jit
def _row_maxima(weight, stride, largest, cols, BLOCK: tl.constexpr):
    """The largest magnitude of each row; infinite where a number is none."""
    row = tl.program_id(0).to(tl.int64)
    most = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, cols, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = tl.abs(tl.load(weight + row * stride + at, mask=at < cols, other=0.0).to(tl.float32))
        most = tl.maximum(most, tl.where(x <= _LARGEST_FLOAT, x, float("inf")))
    tl.store(largest + row, tl.max(most, 0))


@triton.jit
def _quantize_rows(weight, stride, scales, codes, cols, padded, FP8: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (rows, blocks)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(weight + row * stride + at, mask=at < cols, other=0.0).to(tl.float32)
    scale = tl.zeros([BLOCK], tl.float32) + tl.load(scales + row).to(tl.float32)
    scaled = tl.math.div_rn(x, tl.where(scale == 0, 1.0, scale))
    if FP8:
        found = to_fp8(scaled)
    else:
        found = nearest(tl.clamp(scaled, -127.0, 127.0)).to(tl.int8)
    tl.store(codes + row * padded + at, found, mask=at < padded)


def variants() -> Iterator[Variant]:
    """Run when a model is loaded."""
    numbers = dict.fromkeys(("rows", "cols", "padded", "stride"), "i32:16") | {"groups": "i32"}
    floats = {"weight": "*bf16:16", "salience": "*fp32:16", "failed": "*i32:16", "largest": "*fp32:16"} | numbers
    for name, bits, group, minimum, salience in (
        ("int4 32", 4, 32, False, True),
        ("int4 128 with minimum", 4, 128, True, False),
        ("int8 32", 8, 32, False, False),
    ):
        types = floats | {"codes": "*u8:16" if bits == 4 else "*i8:16", "scales": "*fp16:16"}
        types |= {"minimums": "*fp16:16"} if minimum else {}
        absent = [key for key, given in (("salience", salience), ("minimums", minimum)) if not given]
        constants = {"BITS": bits, "GROUP": group, "ROWS": ROWS, "COLS": COLS} | dict.fromkeys(absent)
        yield Variant(f"quantize {name}", _quantize_groups, types, constants, {"num_warps": 4}, hot=False)
    yield Variant("quantize maxima of rows", _row_maxima, floats, {"BLOCK": BLOCK}, {"num_warps": 8}, hot=False)
    for fp8 in (False, True):
        yield Variant(
            f"quantize rows {'fp8' if fp8 else 'int8'}",
            _quantize_rows,
            floats | {"codes": "*fp8e4nv:16" if fp8 else "*i8:16", "scales": "*fp32:16" if fp8 else "*fp16:16"},
            {"FP8": fp8, "BLOCK": BLOCK},
            {"num_warps": 8},
            hot=False,
            architectures=FP8_ARCHITECTURES if fp8 else ARCHITECTURES,
        )

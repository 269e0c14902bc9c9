"""Weight matrices as the GPU's products read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from meshlm.kernels.gpu.checks import ArgumentError, require
from meshlm.kernels.gpu.kv_cache import LARGEST_FP8
from meshlm.kernels.quantize import GROUP, GroupQuantized

WeightFormat = Literal["int4", "int8", "fp8"]

SPAN = 64  # columns are padded to whole spans, and 4-bit codes of a span are packed together
GROUPS = (32, 64, 128)
_SHRINKS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75)  # candidates for a group's scale, of the one that clips nothing


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A weight (rows, cols): `scale * code`, or `scale * code + minimum` where there are minimums.

    Below, padded is cols rounded up to whole spans. What the padding of codes holds says nothing: a product masks it.

    codes:
        int4: (rows, padded / 2) uint8. Byte 32 s + j holds column 64 s + j in its low and column 64 s + 32 + j in its
            high four bits, so that each half of a span is one run of columns. Unsigned; without minimums 8 stands for
            0.
        int8: (rows, padded) int8, signed.
        fp8: (rows, padded) float8_e4m3fn.
    scales: int4 and int8: (groups, rows) float16, groups being padded / group rounded up; fp8: (rows,) float32, all
        alike where the whole tensor has one.
    minimums: (groups, rows) float16, int4 only.
    group: columns beside one another that share a scale: 32, 64 or 128, or padded, where a row has one scale, as of fp8
        and perhaps of int8.
    cols: those of the weight, without padding.
    """

    format: WeightFormat
    codes: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor | None
    group: int
    cols: int

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def padded(self) -> int:
        """Columns with their padding."""
        return self.codes.shape[1] * (2 if self.format == "int4" else 1)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.scales, self.minimums) if part is not None)


Matrix = torch.Tensor | QuantizedMatrix  # a dense weight, (rows, cols), or a quantized one


def pack(
    weight: torch.Tensor | GroupQuantized,
    format: WeightFormat | None = None,  # noqa: A002 - the field's name
    *,
    group: int | None = None,
    minimum: bool = False,
    per_tensor: bool = False,
    device: torch.device | None = None,
) -> QuantizedMatrix:
    """A weight as products read it, on `device` (None: where it is).

    GroupQuantized: its codes and scales as they are; nothing else may be said. A dense weight (rows, cols) of a float
    type is quantized to `format`: int4 in groups of 32, 64 or 128 (None: 32), with a minimum or without; int8 in such
    groups, or with one scale a row (None); fp8 with one scale a row, or `per_tensor`.
    Raises ArgumentError: a combination that there is not, another shape, values that are not finite.
    """
    if isinstance(weight, GroupQuantized):
        plain = format is None and group is None and not minimum and not per_tensor
        require(plain, "format", "of a weight that is quantized is what it is")
        return pack_codes(weight.codes, weight.scales, weight.minimums, weight.bits, GROUP, device)
    require(weight.dim() == 2 and weight.is_floating_point(), "weight", f"is {weight.dtype} {tuple(weight.shape)}")
    require(bool(torch.isfinite(weight).all()), "weight", "is not finite everywhere")
    require(format == "int4" or not minimum, "minimum", f"is for int4, not {format}")
    require(format == "fp8" or not per_tensor, "per_tensor", f"is for fp8, not {format}")
    moved = weight if device is None else weight.to(device)
    match format:
        case "int4":
            return _pack_groups(moved, 4, group or GROUP, minimum)
        case "int8":
            return _pack_groups(moved, 8, group or padded_cols(weight.shape[1]), False)
        case "fp8":
            require(group is None, "group", "is not for fp8")
            return _pack_fp8(moved, per_tensor)
    raise ArgumentError("format", f"is {format}, must be one of: int4, int8, fp8")


def pack_codes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    minimums: torch.Tensor | None,
    bits: int,
    group: int,
    device: torch.device | None = None,
) -> QuantizedMatrix:
    """Unsigned codes (rows, cols) uint8 below 2 ** bits, 4 or 8, with scales and perhaps minimums (rows, groups):
    `w = scale * code + minimum`, the minimum being `-scale * 2 ** (bits - 1)` where there is none.

    group: see QuantizedMatrix. Raises ArgumentError: another shape, 8 bits with minimums, an unknown group.
    """
    rows, cols = codes.shape
    padded = padded_cols(cols)
    require(bits in (4, 8), "bits", f"is {bits}, must be 4 or 8")
    require(bits == 4 or minimums is None, "minimums", "are for 4 bits")
    require(group in GROUPS or (bits == 8 and group == padded), "group", f"is {group}, must be one of {GROUPS}")
    expected = (rows, -(-cols // group))
    for name, values in (("scales", scales), ("minimums", minimums)):
        if values is not None:
            require(tuple(values.shape) == expected, name, f"is of shape {tuple(values.shape)}, must be {expected}")
    codes, scales = (part if device is None else part.to(device) for part in (codes, scales))
    minimums = minimums if minimums is None or device is None else minimums.to(device)
    if bits == 8:
        stored = functional.pad(codes ^ 0x80, (0, padded - cols)).view(torch.int8)
    else:
        halves = functional.pad(codes, (0, padded - cols), value=8).view(rows, padded // SPAN, 2, SPAN // 2)
        stored = (halves[:, :, 0] | halves[:, :, 1] << 4).view(rows, padded // 2)
    groups = -(-padded // group)
    return QuantizedMatrix(
        format="int4" if bits == 4 else "int8",
        codes=stored.contiguous(),
        scales=_by_group(scales, groups),
        minimums=None if minimums is None else _by_group(minimums, groups),
        group=group,
        cols=cols,
    )


def unpack(matrix: QuantizedMatrix) -> torch.Tensor:
    """The weight as float32: (rows, cols)."""
    rows, cols = matrix.rows, matrix.cols
    if matrix.format == "fp8":
        return matrix.codes[:, :cols].float() * matrix.scales.unsqueeze(1)
    if matrix.format == "int8":
        values = matrix.codes[:, :cols].float()
    else:
        spans = matrix.codes.view(rows, -1, SPAN // 2)
        codes = torch.stack([spans & 0xF, spans >> 4], 2).view(rows, -1)[:, :cols].float()
        values = codes if matrix.minimums is not None else codes - 8
    values = values * _by_column(matrix.scales, matrix.group, cols)
    if matrix.minimums is not None:
        values = values + _by_column(matrix.minimums, matrix.group, cols)
    return values


def padded_cols(cols: int) -> int:
    """Rounded up to whole spans."""
    return -(-cols // SPAN) * SPAN


def _by_group(values: torch.Tensor, groups: int) -> torch.Tensor:
    """(rows, some groups) to (groups, rows) float16."""
    return functional.pad(values.half(), (0, groups - values.shape[1])).t().contiguous()


def _by_column(values: torch.Tensor, group: int, cols: int) -> torch.Tensor:
    """(groups, rows) to (rows, cols) float32."""
    return values.t().float().repeat_interleave(group, 1)[:, :cols]


def _pack_groups(weight: torch.Tensor, bits: int, group: int, minimum: bool) -> QuantizedMatrix:
    """Each group with the one of some scales that gives the least squared error, as float16 holds it."""
    rows, cols = weight.shape
    require(group in GROUPS or group == padded_cols(cols), "group", f"is {group}, must be one of {GROUPS}")
    groups = -(-cols // group)
    x = functional.pad(weight.float(), (0, groups * group - cols)).view(rows, groups, group)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    half = 1 << bits - 1
    extreme = torch.where(high > -low, high, low)

    def tried(shrink: float) -> tuple[torch.Tensor, ...]:
        scale = ((high - low) / 15 if minimum else extreme / -half) * shrink
        floor = (low + (high - low) * (1 - shrink) / 2).half().float() if minimum else None
        return _rounded(x, scale.half().float(), floor, half)

    best = tried(_SHRINKS[0])
    for shrink in _SHRINKS[1:]:
        found = tried(shrink)
        best = tuple(torch.where(found[-1] < best[-1], *pair) for pair in zip(found, best, strict=True))
    codes, scales, minimums, error = best
    require(bool(torch.isfinite(error).all()), "weight", "is too large for scales in float16")
    return pack_codes(
        codes.to(torch.uint8).view(rows, -1)[:, :cols],
        scales.squeeze(-1),
        minimums.squeeze(-1) if minimum else None,
        bits,
        group,
    )


def _rounded(x: torch.Tensor, scale: torch.Tensor, floor: torch.Tensor | None, half: int) -> tuple[torch.Tensor, ...]:
    """Codes, scales, minimums, and each group's squared error."""
    bottom = -half * scale if floor is None else floor
    codes = ((x - bottom) * torch.where(scale == 0, 0.0, 1 / scale)).round_().clamp_(0, 2 * half - 1)
    error = (scale * codes + bottom - x).square_().sum(-1, keepdim=True)
    return codes, scale, bottom, error


def _pack_fp8(weight: torch.Tensor, per_tensor: bool) -> QuantizedMatrix:
    rows, cols = weight.shape
    padded = padded_cols(cols)
    largest = weight.abs().amax(1).float()
    if per_tensor:
        largest = largest.amax().expand(rows)
    scales = torch.where(largest == 0, 1.0, largest / LARGEST_FP8)
    scaled = (weight.float() / scales.unsqueeze(1)).clamp_(-LARGEST_FP8, LARGEST_FP8)
    codes = functional.pad(scaled, (0, padded - cols)).to(torch.float8_e4m3fn)
    return QuantizedMatrix("fp8", codes, scales.contiguous(), None, padded, cols)

"""Mixtures of experts on a GPU (Mixtral, arXiv:2401.04088): routing, each expert's product with its rows, the sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch.nn import functional

from meshlm.kernels.gpu.checks import require, require_capability, require_runs_on, require_tensor
from meshlm.kernels.gpu.matmul_launch import FP8_CAPABILITY, Activation, Routed, launch, require_matrix
from meshlm.kernels.gpu.matrix import Matrix, QuantizedMatrix
from meshlm.kernels.gpu.moe_align import align
from meshlm.kernels.gpu.quantize_rows import quantize_rows
from meshlm.kernels.gpu.variants import Variant

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_MOST_EXPERTS = 512
_COLUMNS = 1024  # of one program of the sum


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a layer, stacked: the rows of a matrix are those of expert 0, then those of expert 1, and so on.

    router: (experts, width) float32; gate_up: (experts * 2 inner, width), of an expert first the gate, then up; down:
    (experts * width, inner); active: experts of a row.
    """

    router: torch.Tensor
    gate_up: Matrix
    down: Matrix
    active: int

    @property
    def nbytes(self) -> int:
        return self.router.nbytes + self.gate_up.nbytes + self.down.nbytes


def stack_experts(router: torch.Tensor, experts: Sequence[tuple[Matrix, Matrix]], active: int) -> Experts:
    """experts: (gate_up, down) of each, all of one format, and of one group where they are quantized. Their tensors
    become views of the stacked ones, so that no weight is held twice. Raises ArgumentError: formats that differ."""
    require(len(experts) == router.shape[0], "experts", f"are {len(experts)}, the router has {router.shape[0]}")
    require(1 <= active <= len(experts), "active", f"is {active} of {len(experts)} experts")
    gate_up, down = (_stack([expert[part] for expert in experts]) for part in range(2))
    return Experts(router.float(), gate_up, down, active)


def _stack(parts: Sequence[Matrix]) -> Matrix:
    dense = [part for part in parts if isinstance(part, torch.Tensor)]
    if len(dense) == len(parts):
        return _concatenated(dense, 0)
    packed = [part for part in parts if isinstance(part, QuantizedMatrix)]
    kinds = {(part.format, part.group, part.cols, part.minimums is None) for part in packed}
    require(len(packed) == len(parts) and len(kinds) == 1, "experts", "are not all of one format")
    minimums = [part.minimums for part in packed if part.minimums is not None]
    return replace(
        packed[0],
        codes=_concatenated([part.codes for part in packed], 0),
        scales=_concatenated([part.scales for part in packed], -1),
        minimums=_concatenated(minimums, -1) if minimums else None,
    )


def _concatenated(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    whole = torch.cat(list(parts), dim)
    for part, view in zip(parts, torch.split(whole, [part.shape[dim] for part in parts], dim), strict=True):
        part.data = view
    return whole


def mixture(
    x: torch.Tensor, experts: Experts, activation: Activation, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Each row of x through the experts that it chooses, weighted: (rows, width), of x's type.

    Every launch follows from the shape of x alone. Raises ArgumentError: x of another width, type or device.
    """
    shares, chosen = route(functional.linear(x.float(), experts.router), experts.active)
    routed = align(chosen, experts.router.shape[0])
    inner = grouped_matmul(x, experts.gate_up, routed, len(experts.router), activation=activation)
    parts = grouped_matmul(inner, experts.down, replace(routed, active=1), len(experts.router))
    return combine(parts, shares, chosen, out=out)


def route(logits: torch.Tensor, active: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each row, those of its `active` largest logits, the largest first (of equals the lower expert),
    and their shares, the softmax over these logits alone.

    logits: (rows, experts) float32, experts at most 512. Returns shares (rows, active) float32, chosen (rows, active)
    int32. Raises ArgumentError.
    """
    require_runs_on(logits.device, "logits")
    require_tensor("logits", logits, shape=(None, None), dtypes=(torch.float32,), device=logits.device)
    rows, experts = logits.shape
    require(1 <= experts <= _MOST_EXPERTS, "logits", f"are of {experts} experts, must be at most {_MOST_EXPERTS}")
    require(1 <= active <= experts, "active", f"is {active} of {experts} experts")
    shares = torch.empty(rows, active, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(rows, active, dtype=torch.int32, device=logits.device)
    if rows:
        width, places = triton.next_power_of_2(experts), triton.next_power_of_2(active)
        _route[(rows,)](logits, shares, chosen, experts, logits.stride(0), active, width, places, num_warps=1)
    return shares, chosen


@triton.jit
def _route(logits, shares, chosen, experts, stride, ACTIVE: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    expert, place = tl.arange(0, WIDTH), tl.arange(0, PLACES)
    left = tl.load(logits + row * stride + expert, mask=expert < experts, other=float("-inf"))
    tops = tl.full([PLACES], float("-inf"), tl.float32)
    for number in tl.static_range(ACTIVE):
        top = tl.max(left, 0)
        best = tl.minimum(tl.argmax(left, 0, tie_break_left=True), experts - 1)  # of NaN alone it may be beyond
        tops = tl.where(place == number, top, tops)
        tl.store(chosen + row * ACTIVE + number, best)
        left = tl.where(expert == best, float("-inf"), left)
    weights = tl.exp(tops - tl.max(tops, 0))
    tl.store(shares + row * ACTIVE + place, weights / tl.sum(weights, 0), mask=place < ACTIVE)


def grouped_matmul(
    x: torch.Tensor,
    stack: Matrix,
    routed: Routed,
    experts: int,
    *,
    activation: Activation | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`activation(x[pair / routed.active] @ weight of the pair's expert)` for each pair: (pairs, outputs), of x's type.

    x: (pairs / routed.active, cols); stack: (experts * rows, cols), see Experts; activation: as in `quant_matmul`. The
    outputs of pairs without an expert are left as they are. Raises ArgumentError.
    """
    require_runs_on(x.device, "x")
    require_matrix(stack, "stack", x.device)
    whole, cols = stack.shape if isinstance(stack, torch.Tensor) else (stack.rows, stack.cols)
    require(whole % experts == 0, "stack", f"has {whole} rows, no multiple of {experts} experts")
    rows = whole // experts
    require(activation in (None, "silu", "gelu_tanh"), "activation", f"is {activation!r}")
    require(activation is None or rows % 2 == 0, "activation", f"halves {rows} rows")
    sources = routed.pairs // routed.active
    require_tensor("x", x, shape=(sources, cols), dtypes=_FLOATS, device=x.device)
    if isinstance(stack, torch.Tensor):
        require(stack.dtype == x.dtype, "stack", f"is of {stack.dtype}, x of {x.dtype}")
    shape = (routed.pairs, rows if activation is None else rows // 2)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    else:
        require_tensor("out", out, shape=shape, dtypes=(x.dtype,), device=x.device)
    if routed.pairs == 0:
        return out
    scales = None
    if isinstance(stack, QuantizedMatrix) and stack.format == "fp8":
        require_capability(x.device, FP8_CAPABILITY, "stack")
        x, scales = quantize_rows(x)
    launch(x, stack, rows, out, x_scales=scales, activation=activation, routed=routed)
    return out


def combine(
    parts: torch.Tensor, shares: torch.Tensor, chosen: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The sum of each row's parts by their shares: (rows, width), of the parts' type, summed in float32.

    parts: (rows * active, width); shares: (rows, active) float32; chosen: (rows, active) int32, below 0 where there is
    no part. Raises ArgumentError.
    """
    require_runs_on(parts.device, "parts")
    rows, active = chosen.shape
    require_tensor("parts", parts, shape=(rows * active, None), dtypes=_FLOATS, device=parts.device)
    require_tensor("shares", shares, shape=(rows, active), dtypes=(torch.float32,), device=parts.device)
    require_tensor("chosen", chosen, shape=(rows, active), dtypes=(torch.int32,), device=parts.device)
    shape = (rows, parts.shape[1])
    if out is None:
        out = torch.empty(shape, dtype=parts.dtype, device=parts.device)
    else:
        require_tensor("out", out, shape=shape, dtypes=(parts.dtype,), device=parts.device)
    if rows:
        grid = (rows, triton.cdiv(shape[1], _COLUMNS))
        strides = (shape[1], parts.stride(0), out.stride(0))
        _combine[grid](parts, shares, chosen, out, *strides, ACTIVE=active, COLUMNS=_COLUMNS, num_warps=4)
    return out


@triton.jit
def _combine(parts, shares, chosen, out, width, stride, out_stride, ACTIVE: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for number in tl.static_range(ACTIVE):
        pair = row * ACTIVE + number
        there = tl.full([COLUMNS], tl.load(chosen + pair), tl.int32) >= 0
        part = tl.load(parts + pair * stride + column, mask=there & (column < width), other=0.0).to(tl.float32)
        total += part * tl.load(shares + pair)
    tl.store(out + row * out_stride + column, total.to(out.dtype.element_ty), mask=column < width)


def variants() -> Iterator[Variant]:
    floats = {"logits": "*fp32:16", "shares": "*fp32:16", "chosen": "*i32:16"}
    numbers = dict.fromkeys(("width", "stride", "out_stride"), "i32:16")
    for experts, active in ((8, 2), (128, 8)):
        constants = {"ACTIVE": active, "WIDTH": experts, "PLACES": active}
        types = {**floats, "experts": "i32", "stride": "i32"}
        yield Variant(f"route {active} of {experts}", _route, types, constants, {"num_warps": 1})
        types = {**floats, **numbers, "parts": "*bf16:16", "out": "*bf16:16"}
        constants = {"ACTIVE": active, "COLUMNS": _COLUMNS}
        yield Variant(f"combine {active}", _combine, types, constants, {"num_warps": 4})

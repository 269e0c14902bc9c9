"""Root-mean-square normalization on a GPU (Zhang and Sennrich 2019, arXiv:1910.07467), and the residual sum before."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from meshlm.kernels.gpu.checks import require, require_runs_on, require_tensor
from meshlm.kernels.gpu.variants import Variant

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MOST_WIDTH = 1 << 15  # a row is held in registers


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The rows of `x` normalized and scaled: `out`, or a new tensor like `x`.

    With a residual, `residual += x` in place, and what is normalized is that sum, as it was rounded.
    x: (rows, width) of a float type; weight: (width,) of a float type; residual, out: as x. Rows may lie apart.
    Computed in float32 and rounded once. Raises ArgumentError.
    """
    require_runs_on(x.device, "x")
    require_tensor("x", x, shape=(None, None), dtypes=FLOATS, device=x.device)
    rows, width = x.shape
    require(0 < width <= MOST_WIDTH, "x", f"has rows of {width}, must be of 1 to {MOST_WIDTH}")
    require_tensor("weight", weight, shape=(width,), dtypes=FLOATS, device=x.device)
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is not None:
            require_tensor(name, tensor, shape=(rows, width), dtypes=(x.dtype,), device=x.device)
    if out is None:
        out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows:
        _rms_norm[(rows,)](
            x, x.stride(0), weight, out, out.stride(0), residual, 0 if residual is None else residual.stride(0), eps,
            WIDTH=width, BLOCK=triton.next_power_of_2(width), ADDS=residual is not None, num_warps=warps(width),
        )  # fmt: skip
    return out


def warps(width: int) -> int:
    """So that a thread holds 16 elements of a row, or fewer."""
    return min(16, max(1, int(triton.next_power_of_2(width)) // 512))


@triton.jit
def _rms_norm(
    x, x_stride, weight, out, out_stride, residual, residual_stride, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    values = tl.load(x + row * x_stride + at, mask=inside, other=0.0)
    factors = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)  # on its way while the row is summed
    if ADDS:
        place = residual + row * residual_stride + at
        values = (tl.load(place, mask=inside, other=0.0).to(tl.float32) + values.to(tl.float32)).to(values.dtype)
        tl.store(place, values, mask=inside)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    tl.store(out + row * out_stride + at, (wide * scale * factors).to(out.dtype.element_ty), mask=inside)


def variants() -> Iterator[Variant]:
    """Widths of Llama 3 8B and 70B, and of Qwen3's heads."""
    types = dict.fromkeys(("x", "out", "residual"), "*bf16:16") | {"weight": "*fp32:16", "eps": "fp32"}
    types |= dict.fromkeys(("x_stride", "out_stride", "residual_stride"), "i32:16")
    for width, sums in ((128, (False,)), (4096, (False, True)), (8192, (True,))):
        for adds in sums:
            yield Variant(
                f"rms_norm {width}{' with residual' if adds else ''}",
                _rms_norm,
                types,
                {"WIDTH": width, "BLOCK": width, "ADDS": adds},
                {"num_warps": warps(width)},
            )

"""The gated activations of MLPs on a GPU: SwiGLU and GeGLU (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from meshlm.kernels.gpu.checks import require, require_runs_on, require_tensor
from meshlm.kernels.gpu.variants import Variant

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 1024


def silu_mul(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * up: `out`, or a new (rows, width) of the same type.

    gate_up: (rows, 2 * width), gate in the first half; rows may lie apart. Raises ArgumentError.
    """
    return _launch(gate_up, out, gelu=False)


def gelu_mul(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """gelu(gate) * up, in the tanh approximation (arXiv:1606.08415): as `silu_mul`."""
    return _launch(gate_up, out, gelu=True)


def _launch(gate_up: torch.Tensor, out: torch.Tensor | None, *, gelu: bool) -> torch.Tensor:
    require_runs_on(gate_up.device, "gate_up")
    require_tensor("gate_up", gate_up, shape=(None, None), dtypes=FLOATS, device=gate_up.device)
    rows, both = gate_up.shape
    require(both % 2 == 0 and both > 0, "gate_up", f"has rows of {both}, must be of an even number")
    width = both // 2
    if out is None:
        out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    else:
        require_tensor("out", out, shape=(rows, width), dtypes=(gate_up.dtype,), device=gate_up.device)
    if rows:
        _gated[(rows, triton.cdiv(width, BLOCK))](
            gate_up, gate_up.stride(0), out, out.stride(0), width, GELU=gelu, BLOCK=BLOCK, num_warps=4
        )
    return out


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def activate(gate, GELU: tl.constexpr):
    """silu, or gelu by tanh, which is x * sigmoid(2 y) with tanh's argument y. Of float32."""
    if GELU:
        return gate * _sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    return gate * _sigmoid(gate)


@triton.jit
def _gated(gate_up, in_stride, out, out_stride, width, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * in_stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * in_stride + width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + at, (activate(gate, GELU) * up).to(out.dtype.element_ty), mask=inside)


def variants() -> Iterator[Variant]:
    types = {"gate_up": "*bf16:16", "out": "*bf16:16", "in_stride": "i32:16", "out_stride": "i32:16", "width": "i32:16"}
    for gelu in (False, True):
        constants = {"GELU": gelu, "BLOCK": BLOCK}
        yield Variant("gelu_mul" if gelu else "silu_mul", _gated, types, constants, {"num_warps": 4})

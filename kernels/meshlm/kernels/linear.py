"""Matrix products with a weight: plain, and int8 with one activation scale a row.

The int8 product runs in fbgemm (the one good int8 path of torch on AVX2). Its own dynamic mode takes one activation
scale for the whole batch, so a request's tokens would depend on its neighbours; here each row is divided by its
largest magnitude first and the product is told a fixed scale. The sums are exact int32, hence rows are independent bit
for bit.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch.nn import functional

ACTIVATION_STEPS = 127  # activations are rounded to [-127, 127]
WEIGHT_STEPS = 127


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A weight packed for fbgemm, with its bias. `rows` are output features, `columns` input features."""

    packed: torch.ScriptObject
    bias: torch.Tensor | None
    rows: int
    columns: int

    @property
    def nbytes(self) -> int:
        return self.rows * (self.columns + 4)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x: (tokens, in); weight: (out, in), same dtype; bias: (out,). Returns (tokens, out)."""
    return functional.linear(x, weight, bias)


def int8_supported(device: torch.device) -> bool:
    """Whether `pack_int8` and `linear_int8` can run here."""
    return device.type == "cpu" and any(e in torch.backends.quantized.supported_engines for e in ("x86", "fbgemm"))


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 with one scale an output row: (out, in) to int8 (out, in) and float32 scales (out,)."""
    scale = weight.float().abs().amax(1).clamp_min_(1e-12) / WEIGHT_STEPS
    return torch.round(weight.float() / scale.unsqueeze(1)).to(torch.int8), scale


def pack_int8(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Int8Weight:
    """Quantize (out, in) of any float dtype on a CPU and pack it for `linear_int8`."""
    values, scale = quantize_weight(weight)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
        zero_points = torch.zeros(len(scale), dtype=torch.int64)
        quantized = torch._make_per_channel_quantized_tensor(values, scale.double(), zero_points, 0)
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    return Int8Weight(packed, None if bias is None else bias.float(), *weight.shape)


def linear_int8(x: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    """x: (tokens, in) float32 on a CPU. Returns (tokens, out) float32."""
    top = x.abs().amax(-1, keepdim=True).clamp_min_(1e-30)
    out: torch.Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        x / top, 1 / ACTIVATION_STEPS, ACTIVATION_STEPS + 1, weight.packed
    )
    out.mul_(top)
    return out if weight.bias is None else out.add_(weight.bias)


def reference_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The definition in float64."""
    out = x.double() @ weight.double().T
    return (out if bias is None else out + bias.double()).to(x.dtype)


def reference_linear_int8(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same rounding as `linear_int8` in integers: int8 weight rows, one activation scale a row, exact sums."""
    values, scale = quantize_weight(weight)
    top = x.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    steps = torch.round(x / top * ACTIVATION_STEPS).long()
    out = (steps @ values.long().T).double() * scale.double() * (top.double() / ACTIVATION_STEPS)
    return (out if bias is None else out + bias.double()).to(x.dtype)

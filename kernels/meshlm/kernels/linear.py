"""Matrix products with a weight: plain, and int8 with one activation scale a row.

The int8 product runs in fbgemm (the one good int8 path of torch on AVX2). Its own dynamic mode takes one activation
scale for the whole batch, so a request's tokens would depend on its neighbours; here each row is divided by its largest
magnitude first and the product is told a fixed scale. The sums are exact int32, hence rows are independent bit for bit.

Without VNNI, fbgemm adds products in pairs in int16, which saturates: u1 * w1 + u2 * w2 with u up to 255 passes 32767
where w1 + w2 > 128. Weight rows are therefore scaled so that no two neighbours add up to more than 128. Measured on
SmolLM2-135M (rotated, see `rotation.py`), KL divergence a token from float32: full 8-bit weights 0.047 (saturates),
7-bit activations 0.015, 7-bit weights 0.026, this 0.010; without the rotation and with saturation it was 0.23.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch.nn import functional

ACTIVATION_STEPS = 127  # activations are rounded to [-127, 127]
WEIGHT_STEPS = 127
_SMALLEST = 1e-30  # keeps a row of zeros from dividing by zero
PAIR_STEPS = 128  # 255 * 128 < 2**15


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
    """Symmetric int8 with one scale an output row: (out, in) to int8 (out, in) and float32 scales (out,).

    Neighbours (2i, 2i + 1) of equal sign add up to at most PAIR_STEPS in magnitude.
    """
    wide = weight.float()
    padded = functional.pad(wide, (0, wide.shape[1] % 2))
    pairs = padded.view(wide.shape[0], -1, 2)
    heaviest = torch.maximum(pairs.clamp_min(0).sum(-1), pairs.clamp_max(0).sum(-1).neg()).amax(1)
    # Both of a pair may be rounded up by half a step: one step is kept in hand.
    scale = torch.maximum(wide.abs().amax(1) / WEIGHT_STEPS, heaviest / (PAIR_STEPS - 1)).clamp_min_(1e-12)
    return torch.round(wide / scale.unsqueeze(1)).to(torch.int8), scale


def pack_int8(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Int8Weight:
    """Quantize (out, in) of any float dtype on a CPU and pack it for `linear_int8`."""
    values, scale = quantize_weight(weight)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
        zero_points = torch.zeros(len(scale), dtype=torch.int64)
        quantized = torch._make_per_channel_quantized_tensor(values, scale.double(), zero_points, 0)
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    return Int8Weight(packed, None if bias is None else bias.float(), *weight.shape)


def linear_int8(x: torch.Tensor, weight: Int8Weight, residual: torch.Tensor | None = None) -> torch.Tensor:
    """x: (tokens, in) float32 on a CPU. Returns (tokens, out) float32.

    residual: (tokens, out), to which the product is added in place; it is then what is returned.
    """
    top = x.abs().amax(-1, keepdim=True).clamp_min_(_SMALLEST)
    return _dequantized(_product(x / top, weight), top, weight.bias, residual)


def rms_norm_linear_int8(x: torch.Tensor, weight: Int8Weight, eps: float) -> torch.Tensor:
    """`linear_int8` of the root-mean-square normalized rows of `x`, the norm's weight being folded into the product's.

    The norm divides a row by a number, as does the quantization: the row is divided once, and the rest is a factor of
    the result.
    """
    top = x.abs().amax(-1, keepdim=True).clamp_min_(_SMALLEST)
    scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_().mul_(top)
    return _dequantized(_product(x / top, weight), scale, weight.bias, None)


def _product(steps: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    """steps: (tokens, in) in [-1, 1]."""
    out: torch.Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        steps, 1 / ACTIVATION_STEPS, ACTIVATION_STEPS + 1, weight.packed
    )
    return out


def _dequantized(
    out: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor:
    if residual is not None:
        residual.addcmul_(out, scale)
        return residual if bias is None else residual.add_(bias)
    out.mul_(scale)
    return out if bias is None else out.add_(bias)


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

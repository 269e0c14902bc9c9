"""Matrix products with a dense weight. Quantized products are native, see `native/`."""

from __future__ import annotations

import torch
from torch.nn import functional


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x: (tokens, in); weight: (out, in), same dtype; bias: (out,). Returns (tokens, out)."""
    return functional.linear(x, weight, bias)


def reference_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The definition in float64."""
    out = x.double() @ weight.double().T
    return (out if bias is None else out + bias.double()).to(x.dtype)

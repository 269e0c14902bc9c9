"""The product of rows with a weight that is quantized, by its definition."""

from __future__ import annotations

import torch
from torch.nn import functional


def reference_quant_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """`activation(x @ weight.T + bias) + residual` in float64.

    x: (rows, cols); weight: (outputs, cols), the values that codes and scales stand for; bias: (outputs,). activation:
    None, or "silu" or "gelu_tanh", of the first half of the outputs, by which the other half is multiplied.
    """
    out = x.double() @ weight.double().t()
    if bias is not None:
        out += bias.double()
    if activation is not None:
        gate, up = out.chunk(2, -1)
        out = (functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")) * up
    return out if residual is None else out + residual.double()

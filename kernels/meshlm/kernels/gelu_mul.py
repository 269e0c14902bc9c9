"""The gated activation of Gemma's MLP: gelu(gate) * up (GeGLU, Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

import math

import torch
from torch.nn import functional


def gelu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up: (tokens, 2 * width), gate in the first half. Returns (tokens, width) of the same dtype.

    The tanh approximation (Hendrycks and Gimpel 2016, arXiv:1606.08415), with which the models were trained.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh").mul_(up)


def reference_gelu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """The definition in float64."""
    width = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :width].double(), gate_up[..., width:].double()
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return (0.5 * gate * (1 + torch.tanh(inner)) * up).to(gate_up.dtype)

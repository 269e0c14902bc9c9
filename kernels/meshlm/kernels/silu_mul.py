"""The gated activation of a Llama MLP: silu(gate) * up (SwiGLU, Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

import torch
from torch.nn import functional


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up: (tokens, 2 * width), gate in the first half. Returns (tokens, width) of the same dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def reference_silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """The definition in float64."""
    width = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :width].double(), gate_up[..., width:].double()
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)

"""Root-mean-square normalization (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalize the last dimension of `x` and scale it.

    x: (..., width), float32 or bfloat16; weight: (width,), of any float type. Returns a new tensor like `x`.
    Computed in float32 whatever the dtype, and rounded once.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * scale).mul_(weight).to(x.dtype)


def reference_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The definition in float64."""
    wide = x.double()
    return (wide / torch.sqrt((wide**2).mean(-1, keepdim=True) + eps) * weight.double()).to(x.dtype)

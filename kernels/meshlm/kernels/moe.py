"""Mixtures of experts by their definition (Mixtral, arXiv:2401.04088)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from meshlm.kernels.quant_matmul import reference_quant_matmul


def reference_route(logits: torch.Tensor, active: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of logits (rows, experts) the `active` largest of each row: their softmax in float64, and whose they are, both
    (rows, active), the largest first and the lower expert where two are equal."""
    order = torch.argsort(logits.double(), dim=-1, descending=True, stable=True)[:, :active]
    return torch.softmax(logits.double().gather(-1, order), -1), order


def reference_mixture(
    x: torch.Tensor,
    router: torch.Tensor,
    experts: Sequence[tuple[torch.Tensor, torch.Tensor]],
    active: int,
    activation: str,
) -> torch.Tensor:
    """Each row through the experts that it chooses, weighted: float64. x: (rows, width); router: (experts, width);
    experts: each with its gate and up projections below one another, (2 inner, width), and its down, (width, inner)."""
    shares, chosen = reference_route(x.double() @ router.double().t(), active)
    out = torch.zeros_like(x, dtype=torch.float64)
    for number, (gate_up, down) in enumerate(experts):
        share = (shares * (chosen == number)).sum(-1, keepdim=True)
        inner = reference_quant_matmul(x, gate_up, activation=activation)
        out += share * reference_quant_matmul(inner, down)
    return out

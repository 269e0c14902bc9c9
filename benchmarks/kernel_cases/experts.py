"""A layer of experts at Mixtral 8x7B's sizes: routing, both products, and the weighted sum."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional

from kernel_cases.case import Call, Case, Plan, Work
from meshlm.kernels.gpu.matrix import Matrix, pack, unpack
from meshlm.kernels.gpu.moe import Experts, mixture, route

EXPERTS, ACTIVE, WIDTH, INNER = 8, 2, 4096, 14336
GROUP = 128


def mixture_work(plan: Plan, weights: str, rows: int, width: int = WIDTH, inner: int = INNER) -> Work:
    """weights: bf16 or int4. Experts are read that some row chose."""

    def matrix(out: int, cols: int) -> tuple[Matrix, torch.Tensor]:
        """As ours reads it, and dense: (EXPERTS, out, cols)."""
        dense = plan.randn(EXPERTS * out, cols, dtype=plan.dtype) * cols**-0.5
        if weights == "bf16":
            return dense, dense.view(EXPERTS, out, cols)
        packed = pack(dense, "int4", group=GROUP, minimum=True)
        return packed, unpack(packed).to(plan.dtype).view(EXPERTS, out, cols)

    gate_up, both = matrix(2 * inner, width)
    down, last = matrix(width, inner)
    experts = Experts(plan.randn(EXPERTS, width, dtype=torch.float32) * width**-0.5, gate_up, down, ACTIVE)
    x = plan.randn(rows, width, dtype=plan.dtype)
    used = len(route(x.float() @ experts.router.t(), ACTIVE)[1].unique())

    def routed() -> tuple[torch.Tensor, torch.Tensor]:
        values, chosen = (x.float() @ experts.router.t()).topk(ACTIVE)
        return torch.softmax(values, -1), chosen

    def gated(hidden: torch.Tensor) -> torch.Tensor:
        gate, up = hidden.chunk(2, -1)
        return functional.silu(gate) * up

    def every_expert(_: int) -> torch.Tensor:
        shares, chosen = routed()
        out = gated(x.expand(EXPERTS, -1, -1) @ both.transpose(1, 2)) @ last.transpose(1, 2)
        weight = torch.zeros(rows, EXPERTS, device=x.device).scatter_(1, chosen, shares)
        return (out * weight.t().unsqueeze(2)).sum(0).to(x.dtype)

    def grouped(_: int) -> torch.Tensor:
        shares, chosen = routed()
        flat = chosen.flatten()
        order = flat.argsort()
        ends = (flat.unsqueeze(1) == torch.arange(EXPERTS, device=x.device)).sum(0).cumsum(0).int()
        hidden = gated(torch._grouped_mm(x[order // ACTIVE], both.transpose(1, 2), ends))
        parts = torch._grouped_mm(hidden, last.transpose(1, 2), ends) * shares.flatten()[order].unsqueeze(1)
        return torch.zeros_like(x, dtype=torch.float32).index_add_(0, order // ACTIVE, parts.float()).to(x.dtype)

    peers: dict[str, Call] = {"every expert, bmm": every_expert, "_grouped_mm": grouped}
    read = (experts.nbytes - experts.router.nbytes) * used / EXPERTS
    moved = read + experts.router.nbytes + 2 * x.nbytes
    return Work(lambda _: mixture(x, experts, "silu"), 1, moved, 6.0 * rows * ACTIVE * width * inner, peers)


def cases(plan: Plan) -> Iterator[Case]:
    for weights in ("bf16", "int4"):
        for rows in (1, 64) if plan.quick else (1, 4, 16, 64, 256, 2048):
            yield Case(f"{weights} experts of Mixtral 8x7B, {rows} rows", partial(mixture_work, plan, weights, rows))

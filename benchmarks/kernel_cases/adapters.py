"""Low-rank adapters of mixed ranks in one batch, added to a projection."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kernel_cases.case import LLAMA_8B, Call, Case, Plan, Work
from meshlm.kernels.gpu.lora import build_adapter_table, lora, rows_by_adapter
from meshlm.kernels.lora import LowRank

RANKS = (8, 16, 32, 64, 128)


def lora_work(plan: Plan, rows: int, adapters: int, cols: int, width: int) -> Work:
    """Rows take the adapters in turn. Torch has them by what a host knows: one pair of products an adapter, or all
    padded to the largest rank; both know their rows without looking."""
    moved_rows = 2 * rows * (cols + 2 * width)
    ranks = [RANKS[i % len(RANKS)] for i in range(adapters)]
    used = min(adapters, rows)
    moved = moved_rows + sum(2 * rank * (cols + width) for rank in ranks[:used])
    members = torch.arange(rows, device=plan.device) % adapters
    groups = [(members == adapter).nonzero().flatten() for adapter in range(used)]
    sets = plan.sets(moved)
    tables, stacks, own = [], [], []
    for _ in range(sets):
        low = [
            LowRank(plan.randn(rank, cols, dtype=plan.dtype) * cols**-0.5, plan.randn(width, rank, dtype=plan.dtype))
            for rank in ranks
        ]
        own.append(low)
        tables.append(
            build_adapter_table([[one] for one in low], cols=cols, widths=[width], dtype=plan.dtype, device=plan.device)
        )
        downs = torch.zeros(adapters, max(RANKS), cols, dtype=plan.dtype, device=plan.device)
        ups = torch.zeros(adapters, width, max(RANKS), dtype=plan.dtype, device=plan.device)
        for adapter, one in enumerate(low):
            downs[adapter, : one.rank], ups[adapter, :, : one.rank] = one.down, one.up
        stacks.append((downs, ups))
    routed = rows_by_adapter(members.int(), tables[0])
    inputs = [plan.randn(rows, cols, dtype=plan.dtype) for _ in range(sets)]
    ours, theirs, others = (torch.zeros(sets, rows, width, dtype=plan.dtype, device=plan.device) for _ in range(3))

    def each_adapter(i: int) -> torch.Tensor:
        for low, group in zip(own[i], groups, strict=False):
            theirs[i][group] += (inputs[i][group] @ low.down.t()) @ low.up.t()
        return theirs[i]

    def padded(i: int) -> torch.Tensor:
        downs, ups = stacks[i]
        hidden = torch.bmm(downs[members], inputs[i].unsqueeze(2))
        return others[i].add_(torch.bmm(ups[members], hidden).squeeze(2))

    peers: dict[str, Call] = {"one by one": each_adapter, "padded bmm": padded}
    flops = sum(2.0 * len(group) * rank * (cols + width) for group, rank in zip(groups, ranks, strict=False))
    return Work(lambda i: lora(inputs[i], tables[i], routed, ours[i]), sets, moved, flops, peers)


def cases(plan: Plan) -> Iterator[Case]:
    width = LLAMA_8B.hidden
    for rows, adapters in ((16, 8), (256, 32)) if plan.quick else ((1, 1), (16, 1), (16, 8), (64, 16), (256, 32)):
        work = partial(lora_work, plan, rows, adapters, width, width)
        yield Case(f"lora of ranks 8 to 128, {rows} rows of {adapters} adapters", work)

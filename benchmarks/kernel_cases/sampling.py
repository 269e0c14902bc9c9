"""The draw of a batch's next tokens from its logits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kernel_cases.case import LLAMA_8B, Case, Plan, Work
from meshlm.kernels.gpu.sample import sample
from meshlm.kernels.sample import SampleRows

FILTERS = {
    "greedy": (0.0, 0, 1.0),
    "temperature alone": (1.0, 0, 1.0),
    "top-p 0.9": (0.8, 0, 0.9),
    "top-k 50, top-p 0.95": (1.0, 50, 0.95),
    "top-p 0.95 of a flat row": (4.0, 0, 0.95),
}


def _torch(logits: torch.Tensor, rows: SampleRows, greedy: bool, top_k: int, top_p: float) -> torch.Tensor:
    """As engines do it in torch: sort, filter, and draw by the cumulative distribution."""
    if greedy:
        return logits.argmax(-1)
    values, ids = (logits / rows.temperature.unsqueeze(1)).sort(-1, descending=True)
    if top_k:
        values[:, top_k:] = -torch.inf
    share = torch.softmax(values, -1)
    cumulative = share.cumsum(-1)
    share.masked_fill_(cumulative - share >= top_p, 0.0)
    cumulative = share.cumsum(-1)
    target = rows.uniform.float().unsqueeze(1) * cumulative[:, -1:]
    return ids.gather(1, torch.searchsorted(cumulative, target, right=True))


def sample_work(plan: Plan, count: int, temperature: float, top_k: int, top_p: float) -> Work:
    """Logits fall off as a language model's do: a few far above the rest."""
    vocab, device = LLAMA_8B.vocab, plan.device
    sets = plan.sets(count * vocab * 4)
    logits = [torch.randn(count, vocab, device=device) * 2 for _ in range(sets)]
    for one in logits:
        one.scatter_(1, torch.randint(vocab, (count, 20), device=device), 6 + 6 * torch.rand(count, 20, device=device))

    def full(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((count,), value, dtype=dtype, device=device)

    rows = SampleRows(
        full(temperature), full(top_k, torch.int32), full(top_p), full(0.0),
        torch.rand(count, dtype=torch.float64, device=device),
    )  # fmt: skip
    return Work(
        lambda i: sample(logits[i], rows), sets, count * vocab * 4, 0,
        {"sort": lambda i: _torch(logits[i], rows, temperature == 0, top_k, top_p)}, None,
    )  # fmt: skip


def cases(plan: Plan) -> Iterator[Case]:
    for name, (temperature, top_k, top_p) in FILTERS.items():
        for count in (1, 64) if plan.quick else (1, 16, 64, 256):
            yield Case(f"sample {name}, {count} rows", partial(sample_work, plan, count, temperature, top_k, top_p))

"""Low-rank adapters of projections (Hu et al. 2021, arXiv:2106.09685), several in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to a projection: `scale * up @ down`.

    down: (rank, cols), the paper's A; up: (width, rank), its B; scale: alpha / rank, or what an adapter has instead.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def reference_lora(
    x: torch.Tensor,
    rows: torch.Tensor,
    adapters: Sequence[Sequence[LowRank | None]],
    base: torch.Tensor,
    widths: Sequence[int],
) -> torch.Tensor:
    """`base`, each row with what its adapter adds: (rows, sum of widths) float64.

    x: (rows, cols); rows: (rows,) of an integer type, of each row its adapter, or another number for none; adapters: of
    each adapter one for each of the projections that share x and whose outputs lie beside one another, `widths` wide.
    """
    out = base.double()
    for row, adapter in enumerate(rows.tolist()):
        if not 0 <= adapter < len(adapters):
            continue
        begin = 0
        for width, added in zip(widths, adapters[adapter], strict=True):
            if added is not None:
                low = added.down.double() @ x[row].double()
                out[row, begin : begin + width] += added.scale * (added.up.double() @ low)
            begin += width
    return out

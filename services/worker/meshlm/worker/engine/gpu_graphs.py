"""CUDA graphs of decode steps: captured once at a ladder of batch sizes, replayed while serving."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch


def ladder(largest: int) -> tuple[int, ...]:
    """Batch sizes: powers of two up to 8, then steps of 8, and `largest`. A step is padded to the next."""
    return tuple(sorted({size for size in (1, 2, 4, 8, *range(16, largest, 8)) if size < largest} | {largest}))


class DecodeGraphs:
    """A step of each batch size of the ladder.

    On a CUDA device each is a graph once `capture` was called; elsewhere it runs as it is, padded alike.
    """

    def __init__(self, step: Callable[[int], None], largest: int, device: torch.device) -> None:
        """step: runs a batch of the given size, from inputs to outputs that stay where they are."""
        self._step = step
        self._device = device
        self._sizes = ladder(largest)
        self._graphs: dict[int, Any] = {}

    @property
    def sizes(self) -> tuple[int, ...]:
        return self._sizes

    def size_for(self, rows: int) -> int:
        """The size that `rows`, at most the largest, are padded to."""
        return self._sizes[bisect_left(self._sizes, rows)]

    def capture(self, progress: Callable[[int, int], None], only: int | None = None) -> None:
        """Captures all sizes, or one, the largest first: smaller ones then find room in its memory.

        `progress` is told (done, all).
        """
        if self._device.type != "cuda":
            return
        pool = torch.cuda.graph_pool_handle()
        sizes = self._sizes if only is None else (only,)
        with torch.inference_mode():
            for done, size in enumerate(reversed(sizes), 1):
                self._step(size)  # compiles what the capture must not
                torch.cuda.synchronize(self._device)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    self._step(size)
                self._graphs[size] = graph
                progress(done, len(sizes))

    def release(self) -> None:
        """Drops what was captured, and its memory."""
        self._graphs.clear()

    def run(self, size: int) -> None:
        graph = self._graphs.get(size)
        if graph is None:
            self._step(size)
        else:
            graph.replay()

"""How many KV blocks fit on a GPU: what else needs memory is measured, and the rest is cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """Bytes on the device, as measured at the start.

    total: of the device; taken: weights, and whatever else is there already, other processes included; activations:
    most that a step takes beside them; graphs: what captured steps hold.
    """

    total: int
    taken: int
    activations: int
    graphs: int

    def left(self, fraction: float) -> int:
        """For the cache, where the device is to be filled to this fraction. May be below 0."""
        return int(self.total * fraction) - self.taken - self.activations - self.graphs


def measure_needs(largest_step: Callable[[], None], capture: Callable[[], None], device: torch.device) -> MemoryNeeds:
    """Runs the largest step and captures the graphs, on a device that holds the weights and a cache just large enough.

    The small cache counts as taken: on the safe side.
    """
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    taken = total - free
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    largest_step()
    torch.cuda.synchronize(device)
    activations = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    # What stays behind of a step and is not torch's: compiled kernels, cuBLAS.
    settled = total - torch.cuda.mem_get_info(device)[0]
    capture()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    graphs = total - torch.cuda.mem_get_info(device)[0] - settled
    return MemoryNeeds(total, max(taken, settled), activations, max(0, graphs))

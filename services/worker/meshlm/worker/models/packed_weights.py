"""A checkpoint's weights, packed for the native kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from meshlm.kernels.native.library import Library
from meshlm.kernels.native.matrix import pack
from meshlm.kernels.native.memory import Arena
from meshlm.kernels.native.packed import PackedMatrix
from meshlm.kernels.quantize import GroupQuantized
from meshlm.worker.loading.checkpoint import Checkpoint


class PackedWeights:
    """`Weights` of packed matrices: each as `choose` (name, rows, cols) gives it, packed at once, so that a load never
    holds the model twice."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        library: Library,
        choose: Callable[[str, int, int], torch.Tensor | GroupQuantized],
    ) -> None:
        self._checkpoint = checkpoint
        self._library = library
        self._choose = choose
        self._arena = Arena()

    def matrix(self, name: str, rows: int, cols: int) -> PackedMatrix:
        return pack(self._choose(name, rows, cols), library=self._library, arena=self._arena)

    def vector(self, name: str, *shape: int) -> torch.Tensor:
        return self._checkpoint.tensor(name, *shape).float().clone()

    def has(self, name: str) -> bool:
        return name in self._checkpoint.names

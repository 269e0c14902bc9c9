"""A checkpoint's weights as dense torch tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from meshlm.worker.loading.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """`Weights[torch.Tensor]` on `device`, matrices in `dtype`. Copies: the checkpoint may give views of a file."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype

    def matrix(self, name: str, rows: int, cols: int) -> torch.Tensor:
        return self.checkpoint.tensor(name, rows, cols).to(self.device, self.dtype, copy=True)

    def vector(self, name: str, *shape: int) -> torch.Tensor:
        return self.checkpoint.tensor(name, *shape).to(self.device, torch.float32, copy=True)

    def has(self, name: str) -> bool:
        return name in self.checkpoint.names

"""What a step is about, as tensors: made once by the runner, read by every layer of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from meshlm.kernels.paged_attention import DecodeGroup


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """Rows [row, row + count) of the flat batch: positions [start, start + count) of one sequence."""

    row: int
    count: int
    start: int
    blocks: torch.Tensor  # (n,) int64, padded to whole tiles


@dataclass(frozen=True, slots=True)
class Batch:
    """A flat batch: first one row for each output position (shortest context first), then the prefill chunks.

    tokens, positions, slots: (tokens,) int64; rows: (samples,) int64, the rows whose logits are wanted.
    decode: the plan of layers that see everything; windowed: of layers with a window, one for each window of the model.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    rows: torch.Tensor
    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillSpan, ...]
    windowed: Mapping[int, tuple[DecodeGroup, ...]] = field(default_factory=dict)

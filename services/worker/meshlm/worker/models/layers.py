"""Layers that architectures share: linear projections in the precision asked for, and attention over the paged
cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from meshlm.kernels.kv_cache import store_kv
from meshlm.kernels.linear import Int8Weight, linear, linear_int8, pack_int8
from meshlm.kernels.paged_attention import paged_attention
from meshlm.kernels.prefill_attention import prefill_attention
from meshlm.kernels.rope import rope, rope_frequencies, scale_linear, scale_llama3
from meshlm.worker.loading.checkpoint import Checkpoint
from meshlm.worker.models.batch import Batch
from meshlm.worker.models.config import ModelConfig


class Linear(Protocol):
    """(tokens, in) to (tokens, out)."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class DenseLinear:
    weight: torch.Tensor
    bias: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Int8Linear:
    weight: Int8Weight

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear_int8(x, self.weight)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how weights are kept. int8 is for linear layers on a CPU; everything else is of `dtype`."""

    device: torch.device
    dtype: torch.dtype
    int8: bool

    def tensor(self, weight: torch.Tensor) -> torch.Tensor:
        """A copy of its own: `weight` may be a view of the model's file."""
        return weight.to(self.device, self.dtype, copy=True)

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        if self.int8:
            return Int8Linear(pack_int8(weight, bias))
        return DenseLinear(self.tensor(weight), None if bias is None else self.tensor(bias))


class Model(Protocol):
    """An architecture. `forward` stores the batch's keys and values and returns logits of its `rows`, float32."""

    config: ModelConfig
    parameters: int
    weight_bytes: int

    def forward(self, batch: Batch, cache: torch.Tensor) -> torch.Tensor: ...


Progress = Callable[[int, int], None]  # (layers done, layers in all)


def fused_linear(
    checkpoint: Checkpoint, names: Sequence[tuple[str, int]], width: int, bias: bool, placement: Placement
) -> Linear:
    """Several projections of one input as one product: `names` with their output sizes, in the order of the outputs."""
    weight = torch.cat([checkpoint.tensor(f"{name}.weight", rows, width) for name, rows in names])
    biases = torch.cat([checkpoint.tensor(f"{name}.bias", rows) for name, rows in names]) if bias else None
    return placement.linear(weight, biases)


def frequencies(config: ModelConfig) -> torch.Tensor:
    """Rotary frequencies with the config's scaling applied: (head_dim / 2,) float32."""
    base, scaling = rope_frequencies(config.head_dim, config.rope_theta), config.rope_scaling
    if scaling is None:
        return base
    if scaling.kind == "linear":
        return scale_linear(base, scaling.factor)
    if scaling.kind == "divisors":
        return base / torch.tensor(scaling.divisors)
    return scale_llama3(base, scaling.factor, scaling.low_frequency, scaling.high_frequency, scaling.original_context)


def attend(
    qkv: torch.Tensor, config: ModelConfig, table: torch.Tensor, batch: Batch, cache: torch.Tensor
) -> torch.Tensor:
    """Rotate, store, attend.

    qkv: (tokens, query_size + 2 * kv_size), a fused projection; table: (tokens, 2, head_dim), see `rope_table`;
    cache: one layer's. Returns (tokens, query_size).
    """
    tokens, heads, kv_heads = qkv.shape[0], config.heads, config.kv_heads
    split = qkv.view(tokens, heads + 2 * kv_heads, config.head_dim)
    rotated = rope(split[:, : heads + kv_heads], table)
    query = rotated[:, :heads]
    store_kv(cache, batch.slots, torch.cat((rotated[:, heads:], split[:, heads + kv_heads :]), 1))
    scale = config.head_dim**-0.5
    parts: list[torch.Tensor] = []
    if batch.decode is not None:
        parts.append(paged_attention(query[: batch.decode.sequences], cache, batch.decode, scale))
    for span in batch.prefill:
        rows = query[span.row : span.row + span.count]
        parts.append(prefill_attention(rows, cache, span.blocks, span.start, scale))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.reshape(tokens, config.query_size)

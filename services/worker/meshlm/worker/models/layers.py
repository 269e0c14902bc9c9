"""Layers that architectures share: linear projections in the precision asked for, and attention over the paged
cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from meshlm.kernels.kv_cache import store_kv
from meshlm.kernels.linear import Int8Weight, linear, linear_int8, pack_int8, rms_norm_linear_int8
from meshlm.kernels.paged_attention import paged_attention
from meshlm.kernels.prefill_attention import prefill_attention
from meshlm.kernels.rms_norm import rms_norm
from meshlm.kernels.rope import rope, rope_frequencies, scale_linear, scale_llama3
from meshlm.kernels.rotation import group_size, hadamard, rotate_groups
from meshlm.worker.loading.checkpoint import Checkpoint
from meshlm.worker.models.batch import Batch
from meshlm.worker.models.config import ModelConfig


class Linear(Protocol):
    """(tokens, in) to (tokens, out); added to `residual` in place where one is given."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor: ...


class NormLinear(Protocol):
    """Root-mean-square normalization, then a product: (tokens, in) to (tokens, out)."""

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

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        out = linear(x, self.weight, self.bias)
        return out if residual is None else residual.add_(out)


@dataclass(frozen=True, slots=True)
class DenseNormLinear:
    norm: torch.Tensor
    eps: float
    linear: DenseLinear

    @property
    def nbytes(self) -> int:
        return self.norm.nbytes + self.linear.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(rms_norm(x, self.norm, self.eps))


@dataclass(frozen=True, slots=True)
class Int8Linear:
    weight: Int8Weight
    rotation: torch.Tensor | None  # the weight's input side is turned by this, see `rotate_groups`

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        turned = x if self.rotation is None else rotate_groups(x, self.rotation)
        return linear_int8(turned, self.weight, residual)


@dataclass(frozen=True, slots=True)
class Int8NormLinear:
    weight: Int8Weight  # the norm's weight is folded in
    eps: float

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm_linear_int8(x, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how weights are kept. int8 is for linear layers on a CPU; everything else is of `dtype`."""

    device: torch.device
    dtype: torch.dtype
    int8: bool

    def tensor(self, weight: torch.Tensor) -> torch.Tensor:
        """A copy of its own: `weight` may be a view of the model's file."""
        return weight.to(self.device, self.dtype, copy=True)

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None, outliers: bool = False) -> Linear:
        """outliers: the input has single elements far above the rest, which int8 must spread first."""
        if self.int8:
            rotation = hadamard(group_size(weight.shape[1])).float() if outliers else None
            turned = weight.float() if rotation is None else rotate_groups(weight.float(), rotation)
            return Int8Linear(pack_int8(turned, bias), rotation)
        return self.dense(weight, bias)

    def norm_linear(
        self, norm: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> NormLinear:
        if self.int8:
            return Int8NormLinear(pack_int8(weight.float() * norm.float(), bias), eps)
        return DenseNormLinear(self.tensor(norm), eps, self.dense(weight, bias))

    def dense(self, weight: torch.Tensor, bias: torch.Tensor | None) -> DenseLinear:
        return DenseLinear(self.tensor(weight), None if bias is None else self.tensor(bias))


class Model(Protocol):
    """An architecture. `forward` stores the batch's keys and values and returns logits of its `rows`, float32."""

    config: ModelConfig
    weight_bytes: int

    def forward(self, batch: Batch, cache: torch.Tensor) -> torch.Tensor: ...


def fused(
    checkpoint: Checkpoint, names: Sequence[tuple[str, int]], width: int, bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Several projections of one input as one weight and bias: `names` with their output sizes, in that order."""
    weight = torch.cat([checkpoint.tensor(f"{name}.weight", rows, width) for name, rows in names])
    return weight, torch.cat([checkpoint.tensor(f"{name}.bias", rows) for name, rows in names]) if bias else None


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
    qkv: torch.Tensor, config: ModelConfig, turns: tuple[torch.Tensor, torch.Tensor], batch: Batch, cache: torch.Tensor
) -> torch.Tensor:
    """Rotate, store, attend.

    qkv: (tokens, query_size + 2 * kv_size), a fused projection, overwritten; turns: cosines and sines of the tokens,
    each (tokens, 1, head_dim); cache: one layer's. Returns (tokens, query_size).
    """
    heads, kv_heads = config.heads, config.kv_heads
    split = qkv.view(-1, heads + 2 * kv_heads, config.head_dim)
    rope(split[:, : heads + kv_heads], *turns)
    store_kv(cache, batch.slots, split[:, heads:])
    scale = config.head_dim**-0.5
    parts: list[torch.Tensor] = []
    if batch.decode:
        decoding = sum(group.rows for group in batch.decode)
        parts.append(paged_attention(split[:decoding, :heads], cache, batch.decode, scale))
    for span in batch.prefill:
        rows = split[span.row : span.row + span.count, :heads]
        parts.append(prefill_attention(rows, cache, span.blocks, span.start, scale))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.reshape(-1, config.query_size)

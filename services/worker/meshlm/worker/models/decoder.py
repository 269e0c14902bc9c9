"""What every architecture here is: a decoder of pre-norm layers, described as data.

An architecture's file reads a checkpoint and fills this in; whoever runs it (`torch_decoder.py`, `native_decoder.py`)
reads nothing else. `W` is a weight matrix (out, in) as the one who runs it keeps it: a dense tensor, or packed codes.

A layer, with the optional parts in brackets:

    x += [post_norm](output(attention(rope([q_norm](query(n))), rope([k_norm](key(n))), value(n))))   n = norm(x)
    x += [post_norm](down(activation(gate(n)) * up(n)))                                              n = norm(x)

Norms are root-mean-square norms whose weights are the factors themselves (Gemma's "1 + w" is added while loading).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, Protocol, TypeVar

from meshlm.worker.models.config import ModelConfig

if TYPE_CHECKING:  # what runs natively has no torch: there vectors are arrays of numpy (`engine/loaded.py`)
    import torch

W = TypeVar("W")
W_co = TypeVar("W_co", covariant=True)

Progress = Callable[[int, int], None]  # (layers done, layers in all)


class Weights(Protocol[W_co]):
    """A checkpoint as one who runs a model wants it. Names are canonical, see `loading/checkpoint.py`."""

    def matrix(self, name: str, rows: int, cols: int) -> W_co:
        """A weight matrix, perhaps quantized. Raises ModelFileError: missing, or of another shape."""
        ...

    def vector(self, name: str, *shape: int) -> torch.Tensor:
        """What is never quantized, a norm's weight, a bias or a router: float32, a copy. Raises ModelFileError."""
        ...

    def has(self, name: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Projection(Generic[W]):
    weight: W
    bias: torch.Tensor | None = None  # (out,) float32


@dataclass(frozen=True, slots=True)
class Mlp(Generic[W]):
    gate: Projection[W]
    up: Projection[W]
    down: Projection[W]


@dataclass(frozen=True, slots=True)
class Experts(Generic[W]):
    """A mixture of experts (Mixtral, arXiv:2401.04088): softmax over the `active` largest router logits of a token."""

    router: torch.Tensor  # (experts, width) float32
    experts: tuple[Mlp[W], ...]
    active: int


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions of split halves: element i turns with element i + rotated / 2 by `position * frequencies[i]`."""

    frequencies: torch.Tensor  # (rotated / 2,) float32; elements of a head from `rotated` on are left alone
    factor: float = 1.0  # cosines and sines are multiplied by it (yarn, longrope)


@dataclass(frozen=True, slots=True)
class DecoderLayer(Generic[W]):
    attention_norm: torch.Tensor  # (width,) float32, as all norms
    query: Projection[W]
    key: Projection[W]
    value: Projection[W]
    output: Projection[W]
    mlp_norm: torch.Tensor
    mlp: Mlp[W] | Experts[W]
    query_norm: torch.Tensor | None = None  # (head_dim,)
    key_norm: torch.Tensor | None = None  # (head_dim,)
    attention_post_norm: torch.Tensor | None = None
    mlp_post_norm: torch.Tensor | None = None
    rope: int = 0  # which of the decoder's ropes
    window: int | None = None  # tokens that a position sees, itself included; None is all


@dataclass(frozen=True, slots=True)
class Decoder(Generic[W]):
    config: ModelConfig
    embedding: W  # (vocab, width)
    layers: tuple[DecoderLayer[W], ...]
    norm: torch.Tensor
    head: W  # (vocab, width); the embedding itself where they are tied
    ropes: tuple[Rope, ...]
    embedding_scale: float = 1.0
    activation: Literal["silu", "gelu_tanh"] = "silu"
    attention_scale: float = 0.0  # of query-key products; set by the architecture

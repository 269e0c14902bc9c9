"""One operation at one shape: ours, its physical limit, and what torch has for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Call = Callable[[int], object]  # told which set of buffers to work on


@dataclass(frozen=True)
class Goal:
    """of_limit: the limit's time over ours, at least; times: a peer's time over ours, at least; of the named peer, or
    of the fastest."""

    of_limit: float | None = None
    times: float | None = None
    peer: str = ""

    def __str__(self) -> str:
        parts = []
        if self.of_limit is not None:
            parts.append(f"at least {self.of_limit:.0%} of the limit")
        if self.times is not None:
            peer = self.peer or "torch's fastest"
            parts.append(f"at least {self.times:g}x {peer}")
        return ", ".join(parts)


@dataclass
class Work:
    """A call reads and writes `bytes` at least, and computes `flops`: the larger time is the limit. The calls of one
    set work on the same numbers; all sets together exceed the L2 cache.

    tolerance: of the relative Frobenius distance from the first peer's result; None where results are not comparable.
    captured: as a CUDA graph; not where a call waits for the device.
    """

    ours: Call
    sets: int
    bytes: float
    flops: float = 0.0
    peers: Mapping[str, Call] = field(default_factory=dict)
    tolerance: float | None = 0.02
    captured: bool = True


@dataclass(frozen=True)
class Case:
    """prepare: allocates and fills the buffers."""

    name: str
    prepare: Callable[[], Work]
    goal: Goal = field(default_factory=Goal)


@dataclass(frozen=True)
class Plan:
    """Which cases: all, or for `--quick` some. memory, cache: bytes that one may take, and of the L2 cache. dtype: of
    activations; the interpreter has no right product of bfloat16."""

    quick: bool
    device: torch.device
    memory: int
    cache: int
    dtype: torch.dtype = torch.bfloat16

    def sets(self, size: float) -> int:
        """How many sets of buffers of `size` bytes exceed the L2 cache four times, within the memory."""
        return max(1, min(math.ceil(4 * self.cache / size), int(self.memory // size), 256))

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Model:
    """Sizes of a layer, or of one device's share of it."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int

    @property
    def qkv_rows(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


LLAMA_8B = Model("8B", 4096, 32, 8, 128, 14336, 128256)
LLAMA_70B_SHARE = Model("70B/8", 8192, 8, 1, 128, 3584, 128256 // 8)
MODELS = (LLAMA_8B, LLAMA_70B_SHARE)

"""The native key-value cache: its memory and what is done to it between steps, with no torch.

What lies where is said in `src/kv_cache.h`.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, byref, c_int, c_int32, c_size_t, c_void_p
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from meshlm.kernels.native.library import Library, Pool
from meshlm.kernels.native.memory import Arena
from meshlm.kernels.native.structures import (
    KV_BFLOAT16,
    KV_BFLOAT16_PAIRS,
    KV_FLOAT32,
    KV_INT4,
    KV_INT8,
    KvCache,
)

Floats: TypeAlias = npt.NDArray[np.float32]

KV_TYPES = {
    "float32": KV_FLOAT32,
    "bfloat16": KV_BFLOAT16,
    "bfloat16_pairs": KV_BFLOAT16_PAIRS,  # the same elements in another order, where `Library.pair_products`
    "int8": KV_INT8,
    "int4": KV_INT4,
}
POOLING = 7  # neighbours that share a token's importance while a prompt is computed, as in SnapKV


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a key-value cache holds; `dtype` is a key of KV_TYPES, `block_size` a multiple of 16, `head_dim` even."""

    layers: int
    blocks: int
    kv_heads: int
    block_size: int
    head_dim: int
    dtype: str = "float32"


class Cache:
    """A key-value cache in memory of its own; `fill` is what its bytes are at first."""

    def __init__(
        self, library: Library, shape: CacheShape, key_scale: Floats | None = None, fill: int | None = None
    ) -> None:
        """key_scale: (layers, kv_heads, head_dim), for int4: what keys are divided by before they are stored.

        Raises ValueError for bfloat16_pairs where the library does not multiply them.
        """
        if shape.dtype == "bfloat16_pairs" and not library.pair_products:
            raise ValueError(f"{library.isa} code does not multiply pairs of bfloat16 on this CPU")
        self.library, self.shape, self.key_scale = library, shape, key_scale
        self.struct = KvCache(
            KV_TYPES[shape.dtype], shape.layers, shape.blocks, shape.kv_heads, shape.block_size, shape.head_dim
        )
        self.block_bytes = block_bytes(library, self.struct)
        size = shape.layers * shape.blocks * shape.kv_heads * self.block_bytes
        self.data = np.frombuffer(memoryview(Arena(0).allocate(max(size, 1))), np.uint8)[:size]
        if fill is not None:
            self.data.fill(fill)
        self.struct.data = self.data.ctypes.data
        if key_scale is not None:
            self.struct.key_scale = address(key_scale)

    def scores(self) -> Floats:
        """Zeros to add importance to: (layers, blocks, kv_heads, block_size)."""
        shape = self.shape
        return np.zeros((shape.layers, shape.blocks, shape.kv_heads, shape.block_size), np.float32)


def block_bytes(library: Library, cache: KvCache) -> int:
    """Bytes that one layer and kv head of a block takes; of `cache`, the sizes are read and not the data."""
    return int(library.function("native_kv_block_bytes", c_size_t, POINTER(KvCache))(byref(cache)))


def compact(
    pool: Pool,
    cache: KvCache,
    table: Sequence[int],
    length: int,
    *,
    keep: int,
    recent: int,
    scores: Floats,
    pooling: int = 1,
) -> None:
    """Move the `keep` cached tokens that matter most, in every layer and kv head, to the first cache indices.

    The `recent` latest tokens are among them. scores: (layers, blocks, kv_heads, block_size), moved with the tokens.
    pooling: odd, 1 for none. Raises ValueError where the table does not hold `length` tokens, or pooling is even.
    """
    if len(table) * cache.block_size < length or not all(0 <= block < cache.blocks for block in table):
        raise ValueError(f"a table of {len(table)} blocks does not hold {length} tokens of this cache")
    if pooling < 1 or pooling % 2 == 0:
        raise ValueError(f"pooling must be odd and positive, not {pooling}")
    blocks = (c_int32 * len(table))(*table)
    types = (c_void_p, POINTER(KvCache), c_void_p, c_int, c_int, c_int, c_int, c_void_p)
    call = pool.library.function("native_compact", None, *types)
    call(pool.handle, byref(cache), blocks, length, keep, recent, pooling, address(scores))


def address(array: Floats) -> int:
    """Of contiguous float32 values. Raises ValueError for others."""
    if array.dtype != np.float32 or not array.flags.c_contiguous:
        raise ValueError(f"a contiguous float32 array is needed, not {array.dtype}")
    return array.ctypes.data

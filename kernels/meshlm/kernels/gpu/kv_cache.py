"""The paged KV cache of one layer on a GPU (Kwon et al. 2023, arXiv:2309.06180).

The tokens of a block lie beside one another for each head, so that a tile of one head's keys is one run of memory. A
slot is `block * block_size + offset`; a slot below 0 is of a row that stores nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

KvFormat = Literal["float32", "float16", "bfloat16", "fp8", "int8", "int4"]

FLOATS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}
LARGEST_FP8 = 448.0  # of e4m3


@dataclass(frozen=True, slots=True)
class KvLayer:
    """Keys and values of one layer.

    keys, values: (blocks, kv_heads, block_size, head_dim) of a float type or int8; int4: uint8 of half the last size,
    byte j with element j in its low and element j + head_dim / 2 in its high four bits, each plus 8.
    key_scales, value_scales, by which what is stored is multiplied: fp8: (kv_heads,) float32, fixed; int8 and int4:
    (blocks, kv_heads, block_size) float16, of each token and head its largest magnitude / 127 or / 7; else None.
    """

    format: KvFormat
    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    @property
    def blocks(self) -> int:
        return self.keys.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def block_size(self) -> int:
        return self.keys.shape[2]

    @property
    def head_dim(self) -> int:
        return self.keys.shape[3] * (2 if self.format == "int4" else 1)

    @property
    def nbytes(self) -> int:
        parts = (self.keys, self.values, self.key_scales, self.value_scales)
        return sum(part.nbytes for part in parts if part is not None)


def allocate_kv_layer(
    format: KvFormat,  # noqa: A002 - the field's name
    blocks: int,
    kv_heads: int,
    block_size: int,
    head_dim: int,
    device: torch.device,
) -> KvLayer:
    """A layer's cache. Its contents are undefined: kernels do not read beyond a sequence's length."""
    shape, pair = (blocks, kv_heads, block_size, head_dim), 2
    if format in FLOATS:
        dtype = FLOATS[format]
    else:
        dtype = torch.int8 if format == "int8" else torch.uint8
        shape = shape if format == "int8" else (*shape[:3], head_dim // 2)
    keys, values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(pair))
    if format == "fp8":
        scales = [torch.ones(kv_heads, device=device) for _ in range(pair)]
    elif format in ("int8", "int4"):
        scales = [torch.empty(shape[:3], dtype=torch.float16, device=device) for _ in range(pair)]
    else:
        return KvLayer(format, keys, values)
    return KvLayer(format, keys, values, *scales)


def bytes_per_token(format: KvFormat, kv_heads: int, head_dim: int) -> int:  # noqa: A002
    """Of one layer, keys and values together, without fp8's fixed scales."""
    if format in FLOATS:
        return 2 * kv_heads * head_dim * FLOATS[format].itemsize
    return 2 * kv_heads * ((head_dim if format == "int8" else head_dim // 2) + 2)

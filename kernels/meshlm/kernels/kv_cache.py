"""Where keys and values live: the layout of the paged cache, and the store into it (Kwon et al. 2023,
arXiv:2309.06180).

One tensor a layer: (2, kv_heads, blocks, block_size, head_dim), keys first. With the head outside the block, gathering
any list of blocks gives for each head one contiguous run of tokens, ready for a batched product without a transpose
copy. A slot is `block * block_size + offset`.
"""

from __future__ import annotations

import torch


def allocate_kv_cache(
    layers: int, kv_heads: int, blocks: int, block_size: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A cache for all layers: (layers, 2, kv_heads, blocks, block_size, head_dim).

    Zeros, because attention multiplies masked slots by zero and would carry a NaN through.
    """
    return torch.zeros(layers, 2, kv_heads, blocks, block_size, head_dim, dtype=dtype, device=device)


def store_kv(cache: torch.Tensor, slots: torch.Tensor, kv: torch.Tensor) -> None:
    """Write the keys and values of a flat batch into their slots, in place.

    cache: one layer's (2, kv_heads, blocks, block_size, head_dim); slots: (tokens,) int64, no two equal;
    kv: (tokens, 2 * kv_heads, head_dim), key heads first.
    """
    flat = cache.view(-1, cache.shape[2] * cache.shape[3], cache.shape[4])
    flat.index_copy_(1, slots, kv.transpose(0, 1))


def gather_kv(cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Copy whole blocks out of one layer's cache: (2, kv_heads, len(blocks) * block_size, head_dim).

    blocks: (n,) int64 block numbers, in the order of their tokens.
    """
    _, heads, count, block_size, head_dim = cache.shape
    # Rows of one flat table: selecting along the first dimension copies twice as fast as along an inner one.
    rows = torch.arange(0, 2 * heads * count, count, device=blocks.device).unsqueeze(1) + blocks
    flat = cache.view(2 * heads * count, block_size * head_dim)
    return flat.index_select(0, rows.view(-1)).view(2, heads, -1, head_dim)


def reference_store_kv(cache: torch.Tensor, slots: torch.Tensor, kv: torch.Tensor) -> None:
    """One token and one head at a time."""
    heads, block_size = cache.shape[1], cache.shape[3]
    for token, slot in enumerate(slots.tolist()):
        for head in range(heads):
            cache[0, head, slot // block_size, slot % block_size] = kv[token, head]
            cache[1, head, slot // block_size, slot % block_size] = kv[token, heads + head]

"""Attention of one new token a sequence over its paged cache (decode).

Each sequence's context is cut into tiles of a fixed number of tokens; all tiles of all sequences form one flat batch of
equal products, merged afterwards by their log-sum-exp (split-K as in Flash-Decoding, Dao et al. 2023). Every product
has the same shape whatever the batch, so a sequence's result does not depend on who else is in the step, bit for bit
on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from meshlm.kernels.kv_cache import gather_kv


@dataclass(frozen=True, slots=True)
class DecodeTiles:
    """The tiles of a step; made once, used by every layer.

    blocks: (tiles * blocks_per_tile,) int64, padded with block 0; mask: (kv_heads * tiles, 1, tile), 0 or -inf;
    owner: (tiles,) int64, the sequence each tile belongs to, or None where every sequence has exactly one.
    """

    blocks: torch.Tensor
    mask: torch.Tensor
    owner: torch.Tensor | None
    sequences: int


def tile_tokens(block_size: int) -> int:
    """Tokens in a tile: 64, or one block where blocks are larger. A constant of the cache, never of the batch."""
    return max(64, block_size)


def plan_decode(
    tables: list[list[int]],
    lengths: list[int],
    block_size: int,
    kv_heads: int,
    dtype: torch.dtype,
    device: torch.device,
) -> DecodeTiles:
    """Lay out the tiles of sequences with the given block tables and context lengths (tokens, the new one included)."""
    tile = tile_tokens(block_size)
    per_tile = tile // block_size
    blocks: list[int] = []
    owner: list[int] = []
    filled: list[int] = []
    for sequence, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        tiles = -(-length // tile)
        used = table[: -(-length // block_size)]
        blocks += used
        blocks += [0] * (tiles * per_tile - len(used))
        owner += [sequence] * tiles
        filled += [tile] * (tiles - 1)
        filled.append(length - tile * (tiles - 1))
    empty = torch.arange(tile).unsqueeze(0) >= torch.tensor(filled).unsqueeze(1)
    mask = torch.zeros(len(filled), tile, dtype=dtype).masked_fill_(empty, -torch.inf)
    return DecodeTiles(
        blocks=torch.tensor(blocks).to(device),
        mask=mask.repeat(kv_heads, 1).unsqueeze(1).to(device),
        owner=torch.tensor(owner).to(device) if len(owner) > len(tables) else None,
        sequences=len(tables),
    )


def paged_attention(query: torch.Tensor, cache: torch.Tensor, tiles: DecodeTiles, scale: float) -> torch.Tensor:
    """query: (sequences, heads, head_dim); cache: one layer's. Returns (sequences, heads, head_dim).

    Query heads share key heads in consecutive groups (Ainslie et al. 2023, arXiv:2305.13245).
    """
    sequences, heads, head_dim = query.shape
    kv_heads = cache.shape[1]
    group = heads // kv_heads
    per_head = query.view(sequences, kv_heads, group, head_dim).transpose(0, 1)
    if tiles.owner is not None:
        per_head = per_head.index_select(1, tiles.owner)
    count = per_head.shape[1]
    keys, values = gather_kv(cache, tiles.blocks).view(2, kv_heads * count, -1, head_dim)
    scores = torch.baddbmm(
        tiles.mask, per_head.reshape(kv_heads * count, group, head_dim), keys.transpose(1, 2), alpha=scale
    )
    out = torch.bmm(torch.softmax(scores, -1), values).view(kv_heads, count, group, head_dim)
    if tiles.owner is not None:
        out = _merge(out, torch.logsumexp(scores.view(kv_heads, count, group, -1), -1), tiles.owner, sequences)
    return out.transpose(0, 1).reshape(sequences, heads, head_dim)


def _merge(out: torch.Tensor, lse: torch.Tensor, owner: torch.Tensor, sequences: int) -> torch.Tensor:
    """Weigh the tiles of each sequence: (kv_heads, tiles, group, d) and (kv_heads, tiles, group) to (kv_heads,
    sequences, ...).

    A sequence with a single tile gets weight exp(0) / 1, so its result equals the one without a merge exactly.
    """
    top = lse.new_full((lse.shape[0], sequences, lse.shape[2]), -torch.inf).index_reduce_(1, owner, lse, "amax")
    weight = torch.exp(lse - top.index_select(1, owner)).unsqueeze(-1)
    total = weight.new_zeros(*top.shape, 1).index_add_(1, owner, weight)
    return out.new_zeros(*top.shape, out.shape[-1]).index_add_(1, owner, out * weight).div_(total)


def reference_paged_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    tables: list[list[int]],
    lengths: list[int],
    scale: float,
) -> torch.Tensor:
    """One sequence and one head at a time, in float64."""
    kv_heads, block_size = cache.shape[1], cache.shape[3]
    group = query.shape[1] // kv_heads
    out = torch.empty_like(query)
    for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        for head in range(query.shape[1]):
            slots = [(table[p // block_size], p % block_size) for p in range(length)]
            keys = torch.stack([cache[0, head // group, b, o] for b, o in slots]).double()
            values = torch.stack([cache[1, head // group, b, o] for b, o in slots]).double()
            weights = torch.softmax(keys @ query[row, head].double() * scale, 0)
            out[row, head] = (weights @ values).to(query.dtype)
    return out

"""Causal attention of a chunk of a prompt over its paged cache, tokens of earlier chunks included.

Queries are taken in tiles at fixed positions of the sequence (multiples of the tile), rows outside the chunk left
zero, and a tile sees the keys up to its own end. The shapes of all products follow from positions alone, so a token's
result is the same, bit for bit on a CPU, however the prompt was cut into chunks and whatever of it came from the
prefix cache.
"""

from __future__ import annotations

import torch

from meshlm.kernels.kv_cache import gather_kv
from meshlm.kernels.paged_attention import tile_tokens


def prefill_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    blocks: torch.Tensor,
    start: int,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """One chunk: positions [start, start + tokens) of one sequence, whose keys and values are already stored.

    query: (tokens, heads, head_dim); cache: one layer's; blocks: (n,) int64, the sequence's blocks padded with block 0
    to whole tiles (`padded_blocks`); window: tokens that a position sees, itself included, None is all.
    Returns (tokens, heads, head_dim).
    """
    tokens, heads, head_dim = query.shape
    kv_heads, block_size = cache.shape[1], cache.shape[3]
    group, tile = heads // kv_heads, tile_tokens(block_size)
    first, last = start // tile, (start + tokens - 1) // tile
    skipped = _first_seen(first, tile, window)
    gathered = gather_kv(cache, blocks[skipped // block_size :])
    # What lies behind may be another sequence's, and no numbers: a weight of 0 does not take a NaN away.
    gathered[:, :, start + tokens - skipped :] = 0.0
    keys, values = gathered
    padded = query.new_zeros((last - first + 1) * tile, heads, head_dim)
    inside = slice(start - first * tile, start - first * tile + tokens)
    padded[inside] = query
    # (q tiles, kv_heads, tile * group, head_dim): the rows of one product are (position, query head in its group).
    rows = (
        padded.view(-1, tile, kv_heads, group, head_dim).transpose(1, 2).reshape(-1, kv_heads, tile * group, head_dim)
    )
    out = torch.empty_like(rows)
    for index in range(last - first + 1):
        begin, end = _first_seen(first + index, tile, window), (first + index + 1) * tile
        seen = slice(begin - skipped, end - skipped)
        scores = torch.bmm(rows[index], keys[:, seen].transpose(1, 2)).mul_(scale)
        masked = tile if window is None else end - begin
        hidden = _hidden(tile, masked, window, query.device).repeat_interleave(group, 0)
        scores[:, :, end - begin - masked :].masked_fill_(hidden, -torch.inf)
        torch.bmm(torch.softmax(scores, -1), values[:, seen], out=out[index])
    flat = out.view(-1, kv_heads, tile, group, head_dim).transpose(1, 2).reshape(-1, heads, head_dim)
    return flat[inside]


def _first_seen(index: int, tile: int, window: int | None) -> int:
    """The position at which the keys of a query tile begin: the first that its window holds, rounded down to a tile."""
    return 0 if window is None else max(0, index * tile - window + 1) // tile * tile


def _hidden(tile: int, seen: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which of the last `seen` positions each position of a tile must not see: (tile, seen) bool."""
    behind = torch.arange(seen - tile, seen, device=device).unsqueeze(1) - torch.arange(seen, device=device)
    return behind < 0 if window is None else (behind < 0) | (behind >= window)


def padded_blocks(table: list[int], end: int, block_size: int) -> list[int]:
    """The blocks that hold positions [0, end), padded with block 0 to whole tiles."""
    per_tile = tile_tokens(block_size) // block_size
    used = table[: -(-end // block_size)]
    return used + [0] * (-len(used) % per_tile)


def reference_prefill_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    table: list[int],
    start: int,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """One token and one head at a time, in float64."""
    kv_heads, block_size = cache.shape[1], cache.shape[3]
    group = query.shape[1] // kv_heads
    out = torch.empty_like(query)
    for row in range(query.shape[0]):
        first = max(0, start + row + 1 - window) if window else 0
        slots = [(table[p // block_size], p % block_size) for p in range(first, start + row + 1)]
        for head in range(query.shape[1]):
            keys = torch.stack([cache[0, head // group, b, o] for b, o in slots]).double()
            values = torch.stack([cache[1, head // group, b, o] for b, o in slots]).double()
            weights = torch.softmax(keys @ query[row, head].double() * scale, 0)
            out[row, head] = (weights @ values).to(query.dtype)
    return out

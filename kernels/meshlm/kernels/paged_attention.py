"""Attention of single output tokens over their sequences' paged cache (decode).

Sequences are grouped by their context length rounded up, and each group is one batched product. The shape that a
sequence is computed in follows from its own length alone, so its result does not depend on who else is in the step,
bit for bit on a CPU; and the work is a few large operations, not one for each sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch

from meshlm.kernels.kv_cache import gather_kv

TILE = 64  # tokens; contexts are rounded up to this at least
MOST_ROWS = 32  # of a group: each gathers a copy of its context


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Neighbouring rows of one rounded length. Made once a step, used by every layer.

    blocks: (rows * rounded / block_size,) int64, padded with block 0; mask: (kv_heads * rows, 1, rounded), 0 or -inf;
    hidden: (kv_heads * rows, rounded, 1) bool, where the mask is -inf.
    Where there is a window, a row's blocks start with the one that holds the first token of its window.
    """

    rows: int
    blocks: torch.Tensor
    mask: torch.Tensor
    hidden: torch.Tensor


def tile_tokens(block_size: int) -> int:
    """The smallest rounded length: TILE, or one block where blocks are larger."""
    return max(TILE, block_size)


def rounded_length(length: int, block_size: int) -> int:
    """`length` rounded up in steps of a quarter of its power of two: few groups, and at most a quarter of waste."""
    step = max(tile_tokens(block_size), 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


def plan_decode(
    tables: list[list[int]],
    lengths: list[int],
    block_size: int,
    kv_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    window: int | None = None,
) -> tuple[DecodeGroup, ...]:
    """Group sequences with the given block tables and context lengths (tokens, the new one included).

    Rows of one rounded length should be neighbours: sort by `rounded_length` first.
    window: tokens that a row sees, itself included; None is all.
    """
    groups: list[DecodeGroup] = []
    spans = [_gathered(length, block_size, window) for length in lengths]
    for rounded, rows in groupby(range(len(lengths)), key=lambda row: rounded_length(spans[row], block_size)):
        alike = list(rows)
        for first in range(0, len(alike), MOST_ROWS):
            members = alike[first : first + MOST_ROWS]
            blocks: list[int] = []
            ends: list[int] = []
            for row in members:
                skipped = max(0, lengths[row] - window) // block_size if window else 0
                used = tables[row][skipped : -(-lengths[row] // block_size)]
                blocks += used
                blocks += [0] * (rounded // block_size - len(used))
                ends.append(lengths[row] - skipped * block_size)
            mask = _mask(torch.tensor(ends).unsqueeze(1), rounded, window, dtype)
            spread = mask.repeat(kv_heads, 1).unsqueeze(1).to(device)
            hidden = spread.transpose(1, 2).isneginf()
            groups.append(DecodeGroup(len(members), torch.tensor(blocks).to(device), spread, hidden))
    return tuple(groups)


def _gathered(length: int, block_size: int, window: int | None) -> int:
    """A bound of the tokens in the blocks that a row reads. It grows with `length`, so that groups stay whole."""
    return length if window is None else min(length, window + block_size - 1)


def _mask(ends: torch.Tensor, rounded: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """ends: (rows, 1), tokens of each row. Returns (rows, rounded): 0 for those that are seen, else -inf."""
    at = torch.arange(rounded)
    hidden = at >= ends if window is None else (at >= ends) | (at < ends - window)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


def paged_attention(
    query: torch.Tensor, cache: torch.Tensor, groups: tuple[DecodeGroup, ...], scale: float
) -> torch.Tensor:
    """query: (sequences, heads, head_dim); cache: one layer's. Returns (sequences, heads, head_dim).

    Query heads share key heads in consecutive groups (Ainslie et al. 2023, arXiv:2305.13245).
    """
    if len(groups) == 1:
        return _attend_group(query, cache, groups[0], scale)
    parts = query.split_with_sizes([group.rows for group in groups])
    return torch.cat([_attend_group(part, cache, group, scale) for part, group in zip(parts, groups, strict=True)])


def _attend_group(query: torch.Tensor, cache: torch.Tensor, group: DecodeGroup, scale: float) -> torch.Tensor:
    rows, heads, head_dim = query.shape
    kv_heads = cache.shape[1]
    shared = heads // kv_heads
    gathered = gather_kv(cache, group.blocks).view(2, kv_heads * rows, -1, head_dim)
    # What is hidden may be another sequence's, and no numbers: neither a mask nor a weight of 0 takes a NaN away.
    keys, values = gathered.masked_fill_(group.hidden, 0.0)
    per_head = query.view(rows, kv_heads, shared, head_dim).transpose(0, 1).reshape(-1, shared, head_dim)
    scores = torch.baddbmm(group.mask, per_head, keys.transpose(1, 2), alpha=scale)
    out = torch.bmm(torch.softmax(scores, -1), values)
    return out.view(kv_heads, rows, shared, head_dim).transpose(0, 1).reshape(rows, heads, head_dim)


def reference_paged_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    tables: list[list[int]],
    lengths: list[int],
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """One sequence and one head at a time, in float64."""
    kv_heads, block_size = cache.shape[1], cache.shape[3]
    group = query.shape[1] // kv_heads
    out = torch.empty_like(query)
    for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        for head in range(query.shape[1]):
            first = max(0, length - window) if window else 0
            slots = [(table[p // block_size], p % block_size) for p in range(first, length)]
            keys = torch.stack([cache[0, head // group, b, o] for b, o in slots]).double()
            values = torch.stack([cache[1, head // group, b, o] for b, o in slots]).double()
            weights = torch.softmax(keys @ query[row, head].double() * scale, 0)
            out[row, head] = (weights @ values).to(query.dtype)
    return out

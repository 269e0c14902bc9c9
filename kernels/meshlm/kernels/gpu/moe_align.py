"""Which rows of a batch an expert computes, found on the device: shapes are bounds that follow from the batch size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from meshlm.kernels.gpu.matmul_launch import Routed
from meshlm.kernels.gpu.variants import Variant

_BLOCKS = (16, 32, 64, 128)  # rows, as products have tiles for
_TILE = 8192  # comparisons of experts with pairs at a time


def align(chosen: torch.Tensor, experts: int) -> Routed:
    """The pairs of a row and an expert that it chose, sorted by expert, each expert's in whole blocks of rows.

    chosen: (rows, active) int32; below 0 is no expert. A block is as large as an expert has pairs on average, so that
    few places are empty. No sync with the device: a batch that needs fewer blocks than the bound has empty ones.
    """
    pairs, active = chosen.numel(), chosen.shape[1]
    block = next((block for block in _BLOCKS if pairs <= block * experts), _BLOCKS[-1])
    blocks = most_blocks(pairs, experts, block)
    order = torch.empty(blocks * block, dtype=torch.int32, device=chosen.device)
    owners = torch.empty(blocks, dtype=torch.int32, device=chosen.device)
    width = triton.next_power_of_2(experts)
    _align[(experts,)](chosen, order, owners, pairs, blocks, block, WIDTH=width, CHUNK=chunk_of(width), num_warps=8)
    return Routed(block=block, experts=owners, order=order, pairs=pairs, active=active)


def most_blocks(pairs: int, experts: int, block: int) -> int:
    """That any choice of experts can fill: each expert with a pair has less than one block's worth of empty places."""
    return (pairs + min(pairs, experts) * (block - 1)) // block


def chunk_of(width: int) -> int:
    return max(16, min(1024, _TILE // width))


@triton.jit(do_not_specialize=["pairs", "blocks"])
def _align(chosen, order, owners, pairs, blocks, block, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """One program an expert. Each counts all pairs to know where its own begin, then writes down its own."""
    me = tl.program_id(0)
    expert = tl.arange(0, WIDTH)
    i = tl.arange(0, CHUNK)
    counts = tl.zeros([WIDTH], tl.int32)
    for begin in range(0, pairs, CHUNK):
        found = tl.load(chosen + begin + i, mask=begin + i < pairs, other=-1)
        counts += tl.sum((found[:, None] == expert[None, :]).to(tl.int32), 0)
    filled = (counts + block - 1) // block
    first = tl.sum(tl.where(expert < me, filled, 0), 0)
    mine = tl.sum(tl.where(expert == me, filled, 0), 0)
    for begin in range(0, mine, CHUNK):
        tl.store(owners + first + begin + i, me, mask=begin + i < mine)
    place = first * block
    for begin in range(0, pairs, CHUNK):
        found = tl.load(chosen + begin + i, mask=begin + i < pairs, other=-1)
        hit = (found == me).to(tl.int32)
        tl.store(order + place + tl.cumsum(hit, 0) - 1, begin + i, mask=hit != 0)
        place += tl.sum(hit, 0)
    end = (first + mine) * block
    for begin in range(place, end, CHUNK):
        tl.store(order + begin + i, pairs, mask=begin + i < end)
    if me == tl.num_programs(0) - 1:
        for begin in range(first + mine, blocks, CHUNK):
            tl.store(owners + begin + i, -1, mask=begin + i < blocks)


def variants() -> Iterator[Variant]:
    types = {"chosen": "*i32:16", "order": "*i32:16", "owners": "*i32:16", "pairs": "i32", "blocks": "i32"}
    for experts in (8, 128):
        constants = {"WIDTH": experts, "CHUNK": chunk_of(experts)}
        yield Variant(f"align {experts} experts", _align, {**types, "block": "i32:16"}, constants, {"num_warps": 8})

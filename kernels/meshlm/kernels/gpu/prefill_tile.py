"""A tile of a sequence's queries over all that it sees of the cache: what both prefill kernels do.

The rows of a tile are (query, head of its group) one after the other, so that heads that share keys read them once and
a few queries, as of a speculative tree, still fill the rows. Tiles of keys that every row sees whole are taken without
a mask; before them come those at the window's edge, behind them those on the diagonal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from meshlm.kernels.gpu.attention_tile import (
    FP8,
    attend,
    capped,
    empty_state,
    load_blocks,
    load_query,
    log_sum,
    store_out,
    weigh,
)
from meshlm.kernels.gpu.dot import dot


@triton.jit
def bits_set(mask):
    """How many bits of each int64 are set (Warren, Hacker's Delight, 5-1)."""
    pairs = mask - ((mask >> 1) & 0x5555555555555555)
    fours = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F0F0F0F0F
    sums = eights + (eights >> 8)
    sums = sums + (sums >> 16)
    return ((sums + (sums >> 32)) & 127).to(tl.int32)


@triton.jit
def seen_tiles(
    lowest, highest, exists, split, splits, window, sink_tokens,
    WINDOWED: tl.constexpr, TILE: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """The share of a split in the tiles of keys that rows see: from `begin` to `end`, and every row sees those from
    `middle` to `late` whole. They are counted without the `skipped` ones behind the first `sink_tiles`.

    lowest, highest: the last positions that the first and the last of the rows see; exists: whether there are rows.
    """
    near, sink_tiles, whole = 0, 0, 0
    if WINDOWED:
        near = tl.maximum(lowest - window + 1, 0) // TILE
        sink_tiles = tl.minimum(tl.cdiv(sink_tokens, TILE), near)
        whole = tl.maximum(tl.cdiv(tl.maximum(highest - window + 1, 0), TILE), near)
    skipped = near - sink_tiles
    tiles = tl.where(exists, tl.maximum(tl.cdiv(tl.maximum(highest + 1, 0), TILE) - skipped, 0), 0)
    share = tl.maximum(tl.cdiv(tiles, splits), LEAST)
    begin = tl.minimum(split * share, tiles)
    end = tl.minimum(begin + share, tiles)
    middle = tl.minimum(tl.maximum(whole - skipped, begin), end)
    late = tl.minimum(tl.maximum(tl.maximum(lowest + 1, 0) // TILE - skipped, middle), end)
    return begin, middle, late, end, sink_tiles, skipped


@triton.jit
def attend_described(
    state, query0, keys, values, table, width, blocks, head, scale, softcap, begin, end, skipped,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, SOFTCAPPED: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """As `attend` of tiles that every row sees whole, read through tensor descriptors, which have TMA copy a tile in
    one instruction. A tile lies in one block, and a head in one part."""
    out0, out1, largest, total = state
    ahead = load_blocks(table, (begin + skipped) * TILE, width, BLOCK_SIZE, TILE)
    for index in tl.range(begin, end, warp_specialize=SPECIALIZED):
        start = (index + skipped) * TILE
        found = ahead
        ahead = load_blocks(table, start + TILE, width, BLOCK_SIZE, TILE)
        block = tl.where((found >= 0) & (found < blocks), found, 0)
        row = (block * KV_HEADS + head) * BLOCK_SIZE + start % BLOCK_SIZE
        key = keys.load([row, 0])
        scores = dot(query0, tl.trans(key), tl.zeros([query0.shape[0], TILE], tl.float32))
        scores = capped(scores, scale, softcap, SOFTCAPPED)
        weights, factor, largest, total = weigh(scores, largest, total, False)
        value = values.load([row, 0])
        out0 = dot(weights.to(query0.dtype), value, out0 * factor[:, None])
    return out0, out1, largest, total


@triton.jit
def prefill_tile(
    tile, head, sequence, split, splits,
    query, query_row, query_head, out, out_row, out_head, outputs, sums,
    cache, described, blocks, tables, table_row, width, starts, lengths, tree, sink_logits,
    scale, softcap, window, sink_tokens,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAPPED: tl.constexpr, LEAST: tl.constexpr,
    DESCRIBED: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """Tile number `tile` of the rows of a sequence and a head of keys; nothing where the sequence has no such rows.

    described: tensor descriptors of keys and values, if DESCRIBED. outputs, sums: of `empty_parts`, or None where the
    context is not split.
    """
    TREE: tl.constexpr = tree is not None
    first_row = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - first_row
    length = tl.minimum(tl.load(lengths + sequence), width * BLOCK_SIZE)
    base = length - count
    members = tile * ROWS + tl.arange(0, ROWS)
    held = members < count * GROUP
    numbers = members // GROUP
    heads = head * GROUP + members % GROUP
    rows = (first_row + numbers).to(tl.int64)

    last = base + numbers
    lowest = base + tile * ROWS // GROUP  # the last positions that the first and the last of the rows see
    highest = base + tl.minimum(((tile + 1) * ROWS - 1) // GROUP, count - 1)
    chosen = 0
    if TREE:
        nodes = tl.load(tree + rows, mask=held, other=0)
        last = base + bits_set(nodes) - 1
        lowest, highest = base - 1, length - 1
        chosen = nodes[:, None]
    exists = tile * ROWS < count * GROUP
    begin, middle, late, end, sink_tiles, skipped = seen_tiles(
        lowest, highest, exists, split, splits, window, sink_tokens, WINDOWED, TILE, LEAST
    )

    both = load_query(query, rows * query_row + heads * query_head, held, HEAD_DIM, FIRST, WIDTH0, WIDTH1)
    value_scale = 1.0
    if FORMAT == FP8:
        scale *= tl.load(cache[2] + head)
        value_scale = tl.load(cache[3] + head)
    table = tables + sequence.to(tl.int64) * table_row
    state = empty_state(sink_logits, heads, held, split == 0, ROWS, WIDTH0, WIDTH1)
    if WINDOWED:
        state = attend(
            state, both, cache, table, width, blocks, head, length, last[:, None], base, chosen, window, sink_tokens,
            scale, softcap, begin, middle, sink_tiles, skipped,
            FORMAT, KV_HEADS, BLOCK_SIZE, HEAD_DIM, FIRST, WIDTH0, WIDTH1, TILE, WINDOWED, SOFTCAPPED, TREE, True,
        )  # fmt: skip
    if DESCRIBED:
        state = attend_described(
            state, both[0], described[0], described[1], table, width, blocks, head, scale, softcap,
            middle, late, skipped, KV_HEADS, BLOCK_SIZE, TILE, SOFTCAPPED, SPECIALIZED,
        )  # fmt: skip
    else:
        state = attend(
            state, both, cache, table, width, blocks, head, length, 0, 0, 0, 0, 0, scale, softcap,
            middle, late, sink_tiles, skipped,
            FORMAT, KV_HEADS, BLOCK_SIZE, HEAD_DIM, FIRST, WIDTH0, WIDTH1, TILE, False, SOFTCAPPED, False, False,
        )  # fmt: skip
    state = attend(
        state, both, cache, table, width, blocks, head, length, last[:, None], base, chosen, window, sink_tokens,
        scale, softcap, late, end, sink_tiles, skipped,
        FORMAT, KV_HEADS, BLOCK_SIZE, HEAD_DIM, FIRST, WIDTH0, WIDTH1, TILE, WINDOWED, SOFTCAPPED, TREE, True,
    )  # fmt: skip
    if outputs is None:
        store_out(out, rows * out_row + heads * out_head, held, state, value_scale, HEAD_DIM, FIRST, WIDTH0, WIDTH1)
    else:
        part = (rows * (KV_HEADS * GROUP) + heads) * splits + split
        filled = held & (tl.zeros([ROWS], tl.int32) + begin < end)
        store_out(outputs, part * HEAD_DIM, filled, state, value_scale, HEAD_DIM, FIRST, WIDTH0, WIDTH1)
        tl.store(sums + part, log_sum(state), mask=held)

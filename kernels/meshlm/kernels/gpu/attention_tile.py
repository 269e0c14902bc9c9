"""What the attention kernels share: a tile of query rows against tiles of one head's paged keys and values.

The softmax is taken online (Dao 2023, FlashAttention-2, arXiv:2307.08691), in base 2: scores come multiplied by
log2(e). Tokens are taken TILE at a time, at positions that are multiples of TILE. Where there is a window, the tiles
between it and the first tokens, which are always seen (attention sinks, Xiao et al. 2023, arXiv:2309.17453), are left
out: tile `index` of those that are read lies at `index`, or at `index + skipped` from `sink_tiles` on.

The dimensions of a head lie in two parts, so that each is a power of two (96 = 64 + 32) or, of int4, one half of each
byte. The second is empty where WIDTH1 is 0.

A block number outside the cache is read as block 0: no table, however wrong, makes a kernel read foreign memory.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from meshlm.kernels.gpu.dot import INTERPRETED, dot
from meshlm.kernels.gpu.kv_cache import KvFormat

LOG2_E = 1.4426950408889634
FORMATS: dict[KvFormat, int] = {"float32": 0, "float16": 0, "bfloat16": 0, "fp8": 1, "int8": 2, "int4": 3}
FP8, INT8, INT4 = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
# Of the kernels' parameters, those whose values and addresses are of no use to the compiler: no kernel is compiled anew
# for them.
NOT_SPECIALIZED = ("width", "window", "sink_tokens", "blocks", "table_row")
NOT_ALIGNED = ("tables", "lengths", "starts", "tree", "sink_logits")


def parts(kv_format: KvFormat, head_dim: int) -> tuple[int, int, int]:
    """Of a head's dimensions: how many are in the first part, and the widths of both, padded for a product."""
    if kv_format == "int4":
        half = head_dim // 2
        return half, _padded(half), _padded(half)
    first = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - first
    return first, _padded(first), _padded(rest) if rest else 0


def _padded(count: int) -> int:
    return max(16, int(triton.next_power_of_2(count)))


@triton.jit
def load_part(pointer, rows, held, STRIDE: tl.constexpr, START: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip  # noqa: E501
    """Elements [START, START + COUNT) of rows of STRIDE elements: (rows, WIDTH). 0 behind COUNT and, if MASKED, in rows
    that are not `held`."""
    columns = tl.arange(0, WIDTH)
    address = pointer + rows[:, None] * STRIDE + (START + columns)[None, :]
    if MASKED and COUNT < WIDTH:
        part = tl.load(address, mask=held[:, None] & (columns < COUNT)[None, :], other=0.0)
    elif MASKED:
        part = tl.load(address, mask=held[:, None], other=0.0)
    elif COUNT < WIDTH:
        part = tl.load(address, mask=(columns < COUNT)[None, :], other=0.0)
    else:
        part = tl.load(address)
    return part


@triton.jit
def unpack_int4(codes, DTYPE: tl.constexpr):
    """codes: uint8. Returns the low and the high four bits of each, less 8."""
    if INTERPRETED or tl.bfloat16 != DTYPE:
        low = ((codes & 15).to(tl.int8) - 8).to(DTYPE)
        high = ((codes >> 4).to(tl.int8) - 8).to(DTYPE)
    else:  # 0x4300 | code is the bfloat16 128 + code: twelve instructions for eight numbers, and no slow conversion
        low, high = tl.inline_asm_elementwise(
            """
            {
                .reg .b32 even, odd, one, offset;
                mov.b32 one, 0x3f803f80;
                mov.b32 offset, 0xc308c308;
                prmt.b32 even, $4, 0, 0x4140;
                prmt.b32 odd, $4, 0, 0x4342;
                lop3.b32 $0, even, 0x000f000f, 0x43004300, 0xea;
                lop3.b32 $1, odd, 0x000f000f, 0x43004300, 0xea;
                shr.u32 even, even, 4;
                shr.u32 odd, odd, 4;
                lop3.b32 $2, even, 0x000f000f, 0x43004300, 0xea;
                lop3.b32 $3, odd, 0x000f000f, 0x43004300, 0xea;
                fma.rn.bf16x2 $0, $0, one, offset;
                fma.rn.bf16x2 $1, $1, one, offset;
                fma.rn.bf16x2 $2, $2, one, offset;
                fma.rn.bf16x2 $3, $3, one, offset;
            }
            """,
            "=&r,=&r,=&r,=&r,r",
            [codes],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    return low, high


@triton.jit
def load_stored(pointer, rows, held, DTYPE: tl.constexpr, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip  # noqa: E501
    """Both parts of what the cache holds of these rows, not yet scaled. An empty second part repeats the first."""
    if FORMAT == INT4:
        part0, part1 = unpack_int4(load_part(pointer, rows, held, HEAD_DIM // 2, 0, FIRST, WIDTH0, MASKED), DTYPE)
    else:
        part0 = load_part(pointer, rows, held, HEAD_DIM, 0, FIRST, WIDTH0, MASKED).to(DTYPE)
        part1 = part0
        if WIDTH1 > 0:
            part1 = load_part(pointer, rows, held, HEAD_DIM, FIRST, HEAD_DIM - FIRST, WIDTH1, MASKED).to(DTYPE)
    return part0, part1


@triton.jit
def load_blocks(table, start, width, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """The block of each token from `start` on: (TILE,), or one number where all are in one. 0 behind the table."""
    places = start // BLOCK_SIZE
    if BLOCK_SIZE < TILE:
        places = places + tl.arange(0, TILE) // BLOCK_SIZE
    return tl.load(table + places, mask=places < width, other=0)


@triton.jit
def rows_in_cache(found, start, head, blocks, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Where the tokens from `start` on lie among all (block, head, offset) of the cache: (TILE,) int64."""
    block = tl.where((found >= 0) & (found < blocks), found, 0).to(tl.int64)
    offsets = tl.arange(0, TILE)
    first = (block * KV_HEADS + head) * BLOCK_SIZE
    if BLOCK_SIZE >= TILE:
        rows = tl.multiple_of(first + start % BLOCK_SIZE, TILE) + offsets
    else:
        run: tl.constexpr = min(16, BLOCK_SIZE)
        rows = tl.max_contiguous(tl.multiple_of(first + offsets % BLOCK_SIZE, run), run)
    return rows


@triton.jit
def capped(scores, scale, softcap, SOFTCAPPED: tl.constexpr):
    """scores * scale, or softcap * tanh(scores * scale); whichever of the two is last brings log2(e)."""
    scores = scores * scale
    if SOFTCAPPED:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), which is right at both ends.
        scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * 2.8853900817779268) + 1.0))
    return scores


@triton.jit
def weigh(scores, largest, total, MASKED: tl.constexpr):
    """One step of the online softmax. Returns the tile's weights (ROWS, TILE), the factor (ROWS,) that what was summed
    so far is to be multiplied by, and the new largest and total. MASKED: a row may have seen nothing yet."""
    raised = tl.maximum(largest, tl.max(scores, 1))
    anchor = raised
    if MASKED:
        anchor = tl.where(raised == float("-inf"), 0.0, raised)
    weights = tl.exp2(scores - anchor[:, None])
    factor = tl.exp2(largest - anchor)
    return weights, factor, raised, total * factor + tl.sum(weights, 1)


@triton.jit
def visible(positions, last, base, tree, window, sink_tokens, WINDOWED: tl.constexpr, TREE: tl.constexpr):
    """Which tokens a row sees: (rows, TILE), of positions (1, TILE), and of each row (rows, 1) the last position that
    it sees, which is its own.

    In a tree the tokens from `base` on are seen where their bit of `tree` is set, whatever the window.
    """
    seen = positions <= last
    if WINDOWED:
        seen = seen & ((positions > last - window) | (positions < sink_tokens))
    if TREE:
        node = positions - base
        chosen = ((tree >> tl.minimum(tl.maximum(node, 0), 63).to(tl.int64)) & 1) != 0
        seen = ((node < 0) & seen) | ((node >= 0) & (node < 64) & chosen)
    return seen


@triton.jit
def attend(
    state, query, cache, table, width, blocks, head, length, last, base, tree, window, sink_tokens, scale, softcap,
    begin, end, sink_tiles, skipped,
    FORMAT: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, TILE: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAPPED: tl.constexpr,
    TREE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Takes tiles [begin, end) of those that are read into the state: (out0, out1, largest, total), out0 and out1
    (ROWS, width of the part) the weighted sums of values so far, largest and total (ROWS,) float32.

    query: both parts, (ROWS, width); cache: keys, values, key_scales, value_scales. length: tokens of the sequence. Not
    MASKED: every row sees every token of every tile.
    """
    out0, out1, largest, total = state
    query0, query1 = query
    keys, values, key_scales, value_scales = cache
    dtype: tl.constexpr = query0.dtype
    # A tile's blocks are looked up one tile ahead, so that its keys need not wait for them.
    ahead = load_blocks(table, tl.where(begin < sink_tiles, begin, begin + skipped) * TILE, width, BLOCK_SIZE, TILE)
    for index in tl.range(begin, end):
        start = tl.where(index < sink_tiles, index, index + skipped) * TILE
        found = ahead
        following = tl.where(index + 1 < sink_tiles, index + 1, index + 1 + skipped) * TILE
        ahead = load_blocks(table, following, width, BLOCK_SIZE, TILE)
        rows = rows_in_cache(found, start, head, blocks, KV_HEADS, BLOCK_SIZE, TILE)
        positions = start + tl.arange(0, TILE)
        held = positions < length
        key0, key1 = load_stored(keys, rows, held, dtype, FORMAT, HEAD_DIM, FIRST, WIDTH0, WIDTH1, MASKED)
        scores = dot(query0, tl.trans(key0), tl.zeros([query0.shape[0], TILE], tl.float32))
        if WIDTH1 > 0:
            scores = dot(query1, tl.trans(key1), scores)
        if FORMAT >= INT8:  # scales of a token and head: not masked, so that they load as long runs
            scores = scores * tl.load(key_scales + rows).to(tl.float32)[None, :]
        scores = capped(scores, scale, softcap, SOFTCAPPED)
        if MASKED:
            seen = visible(positions[None, :], last, base, tree, window, sink_tokens, WINDOWED, TREE)
            scores = tl.where(seen & held[None, :], scores, float("-inf"))
        weights, factor, largest, total = weigh(scores, largest, total, MASKED)
        if FORMAT >= INT8:
            value_scale = tl.load(value_scales + rows).to(tl.float32)
            if MASKED:
                value_scale = tl.where(held, value_scale, 0.0)
            weights = weights * value_scale[None, :]
        value0, value1 = load_stored(values, rows, held, dtype, FORMAT, HEAD_DIM, FIRST, WIDTH0, WIDTH1, MASKED)
        out0 = dot(weights.to(dtype), value0, out0 * factor[:, None])
        if WIDTH1 > 0:
            out1 = dot(weights.to(dtype), value1, out1 * factor[:, None])
    return out0, out1, largest, total


@triton.jit
def empty_state(sink_logits, heads, counted, first, ROWS: tl.constexpr, WIDTH0: tl.constexpr, WIDTH1: tl.constexpr):
    """The state before the first tile. Learned sinks (gpt-oss) weigh as one more token whose value is 0, counted in the
    `first` of the splits: sink_logits, by head, at heads (ROWS,)."""
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if sink_logits is not None:
        sink = tl.load(sink_logits + heads, mask=counted, other=0.0) * 1.4426950408889634
        largest = tl.where(first, sink, largest)
        total = tl.where(first, 1.0, total)
    rest: tl.constexpr = WIDTH1 if WIDTH1 > 0 else 1
    return tl.zeros([ROWS, WIDTH0], tl.float32), tl.zeros([ROWS, rest], tl.float32), largest, total


@triton.jit
def load_query(query, offsets, held, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH0: tl.constexpr, WIDTH1: tl.constexpr):  # fmt: skip  # noqa: E501
    """Both parts of the rows that lie at `offsets` (ROWS,) int64."""
    query0 = load_part(query, offsets, held, 1, 0, FIRST, WIDTH0, True)
    query1 = query0
    if WIDTH1 > 0:
        query1 = load_part(query, offsets, held, 1, FIRST, HEAD_DIM - FIRST, WIDTH1, True)
    return query0, query1


@triton.jit
def store_out(out, offsets, held, state, value_scale, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH0: tl.constexpr, WIDTH1: tl.constexpr):  # fmt: skip  # noqa: E501
    """Divides by the total, and stores at `offsets` (ROWS,) int64; rows that saw nothing are 0."""
    out0, out1, _, total = state
    share = value_scale / tl.where(total == 0.0, 1.0, total)
    columns = tl.arange(0, WIDTH0)
    target = out + offsets[:, None] + columns[None, :]
    tl.store(target, (out0 * share[:, None]).to(out.dtype.element_ty), mask=held[:, None] & (columns < FIRST)[None, :])
    if WIDTH1 > 0:
        rest = FIRST + tl.arange(0, WIDTH1)
        target = out + offsets[:, None] + rest[None, :]
        mask = held[:, None] & (rest < HEAD_DIM)[None, :]
        tl.store(target, (out1 * share[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def log_sum(state):
    """The base-2 logarithm of the sum of all weights, (ROWS,): -inf where nothing was seen."""
    _, _, largest, total = state
    return tl.where(total > 0.0, largest + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))


def head_constants(kv_format: KvFormat, heads: int, kv_heads: int, head_dim: int, block_size: int) -> dict[str, Any]:
    """The kernels' constants that are a model's and its cache's."""
    first, width0, width1 = parts(kv_format, head_dim)
    return {
        "FORMAT": FORMATS[kv_format],
        "GROUP": heads // kv_heads,
        "KV_HEADS": kv_heads,
        "BLOCK_SIZE": block_size,
        "HEAD_DIM": head_dim,
        "FIRST": first,
        "WIDTH0": width0,
        "WIDTH1": width1,
    }


def scales(scale: float, softcap: float | None) -> tuple[float, float]:
    """What scores and, behind the cap, capped scores are multiplied by, so that they are in base 2."""
    return (scale * LOG2_E, 0.0) if softcap is None else (scale / softcap, softcap * LOG2_E)

"""Attention of single output tokens over their sequences' paged cache (decode), on a GPU.

A program takes the query heads that share one head of keys and values as the rows of its products, so that keys and
values are read once, and a part of the context. Into how many parts contexts are cut follows from shapes alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from meshlm.kernels.gpu.attention_checks import check_attention
from meshlm.kernels.gpu.attention_splits import LEAST_TILES, empty_parts, merge, processors_of, split_count
from meshlm.kernels.gpu.attention_tile import (
    FORMATS,
    FP8,
    NOT_ALIGNED,
    NOT_SPECIALIZED,
    attend,
    empty_state,
    head_constants,
    load_query,
    log_sum,
    scales,
    store_out,
)
from meshlm.kernels.gpu.attention_variants import (
    GEMMA,
    LLAMA_8B,
    LLAMA_8B_SMALL_BLOCKS,
    LLAMA_70B,
    PHI_3,
    SMOLLM2,
    Model,
    architectures,
    types_and_constants,
)
from meshlm.kernels.gpu.configs import Config, choose
from meshlm.kernels.gpu.kv_cache import KvFormat, KvLayer
from meshlm.kernels.gpu.variants import Variant

MOST_ROWS = 64  # query heads of one program
WAVES = 8  # programs of one processor, where nothing better is tuned; two or more of them are resident


def paged_attention(
    query: torch.Tensor,
    layer: KvLayer,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sink_tokens: int = 0,
    sink_logits: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """One new token of each sequence. Returns `out`, or a new tensor: (sequences, heads, head_dim).

    query: (sequences, heads, head_dim) bfloat16, float16 or float32, heads beside one another in groups that share a
    head of keys (Ainslie et al. 2023, arXiv:2305.13245); head_dim a multiple of 8 up to 256.
    tables: (sequences, most_blocks) int32; a block number outside the cache is read as block 0.
    lengths: (sequences,) int32, tokens in the cache, the new one included; a sequence of 0 gives zeros, and what is
    stored behind a sequence's length does not matter.
    window: tokens that are seen, the new one included, beside the first `sink_tokens`; None is all.
    softcap: scores become softcap * tanh(score / softcap). sink_logits: (heads,) float32, a score of each head that
    takes weight from the others and has no value. config: launch parameters in place of the chosen ones; with SPLITS,
    into how many parts contexts are cut, in place of what `split_count` says.
    Raises ArgumentError.
    """
    check_attention(
        query, layer, tables, lengths,
        window=window, softcap=softcap, sink_tokens=sink_tokens, sink_logits=sink_logits, out=out,
    )  # fmt: skip
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    sequences, heads, head_dim = query.shape
    if sequences == 0:
        return out
    constants = decode_constants(layer.format, heads, layer.kv_heads, head_dim, layer.block_size)
    programs = sequences * layer.kv_heads * constants["HEAD_TILES"]
    chosen = dict(config or _configure(layer, sequences, heads, query.device))
    waves, tiles = chosen.pop("WAVES", WAVES), triton.cdiv(tables.shape[1] * layer.block_size, chosen["TILE"])
    splits = chosen.pop("SPLITS", 0) or split_count(programs, tiles, processors_of(query.device), waves)
    parts = empty_parts(sequences, heads, splits, head_dim, query.device) if splits > 1 else None
    _decode[(layer.kv_heads * constants["HEAD_TILES"], sequences, splits)](
        query, query.stride(0), query.stride(1), out, out.stride(0), out.stride(1), *(parts or (None, None)),
        layer.keys, layer.values, layer.key_scales, layer.value_scales, layer.blocks,
        tables, tables.stride(0), tables.shape[1], lengths, sink_logits, *scales(scale, softcap),
        window or 0, sink_tokens,
        WINDOWED=window is not None, SOFTCAPPED=softcap is not None, LEAST=LEAST_TILES, **constants, **chosen,
    )  # fmt: skip
    if parts is not None:
        merge(parts, out)
    return out


def decode_constants(kv_format: KvFormat, heads: int, kv_heads: int, head_dim: int, block_size: int) -> dict[str, Any]:
    """The kernel's constants: `head_constants`, and how many query heads a program takes."""
    group = heads // kv_heads
    rows = min(MOST_ROWS, max(16, int(triton.next_power_of_2(group))))
    constants = head_constants(kv_format, heads, kv_heads, head_dim, block_size)
    return constants | {"ROWS": rows, "HEAD_TILES": triton.cdiv(group, rows)}


def default_config(head_dim: int) -> Config:
    """WAVES: see `split_count`, which turns it into parts by the room that block tables have."""
    tile = 128 if head_dim <= 64 else 64 if head_dim <= 128 else 32
    return {"TILE": tile, "WAVES": WAVES, "num_warps": 4, "num_stages": 3}


def _configure(layer: KvLayer, sequences: int, heads: int, device: torch.device) -> Config:
    """How wide tables are is not in the key: serving has them for its longest context, whatever was tuned with."""
    rounded = int(triton.next_power_of_2(sequences))
    key = (layer.keys.element_size() * 8, FORMATS[layer.format], heads, layer.kv_heads, layer.head_dim, rounded)
    return choose("paged_attention", key, default_config(layer.head_dim), device)


@triton.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=NOT_ALIGNED)
def _decode(
    query, query_row, query_head, out, out_row, out_head, outputs, sums,
    keys, values, key_scales, value_scales, blocks, tables, table_row, width, lengths, sink_logits,
    scale, softcap, window, sink_tokens,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, ROWS: tl.constexpr,
    HEAD_TILES: tl.constexpr, TILE: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAPPED: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    head, sequence, split = tl.program_id(0) // HEAD_TILES, tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(2)
    members = tl.program_id(0) % HEAD_TILES * ROWS + tl.arange(0, ROWS)
    held = members < GROUP
    heads = head * GROUP + members
    length = tl.minimum(tl.load(lengths + sequence), width * BLOCK_SIZE)
    near, sink_tiles = 0, 0
    if WINDOWED:
        near = tl.maximum(length - window, 0) // TILE
        sink_tiles = tl.minimum(tl.cdiv(sink_tokens, TILE), near)
    tiles = tl.cdiv(length, TILE) - near + sink_tiles
    share = tl.maximum(tl.cdiv(tiles, splits), LEAST)
    begin = tl.minimum(split * share, tiles)
    end = tl.minimum(begin + share, tiles)
    part = (sequence.to(tl.int64) * (KV_HEADS * GROUP) + heads) * splits + split
    if outputs is not None:  # noqa: SIM102 - of the two, one is the compiler's to answer
        if begin >= end:
            tl.store(sums + part, tl.full([ROWS], float("-inf"), tl.float32), mask=held)
            return
    both = load_query(
        query, sequence.to(tl.int64) * query_row + heads * query_head, held, HEAD_DIM, FIRST, WIDTH0, WIDTH1
    )
    value_scale = 1.0
    if FORMAT == FP8:
        scale *= tl.load(key_scales + head)
        value_scale = tl.load(value_scales + head)
    state = attend(
        empty_state(sink_logits, heads, held, split == 0, ROWS, WIDTH0, WIDTH1), both,
        (keys, values, key_scales, value_scales), tables + sequence.to(tl.int64) * table_row, width, blocks, head,
        length, tl.full([1, 1], 0, tl.int32) + (length - 1), 0, 0, window, sink_tokens, scale, softcap,
        begin, end, sink_tiles, near - sink_tiles,
        FORMAT, KV_HEADS, BLOCK_SIZE, HEAD_DIM, FIRST, WIDTH0, WIDTH1, TILE, WINDOWED, SOFTCAPPED, False, True,
    )  # fmt: skip
    if outputs is None:
        target = sequence.to(tl.int64) * out_row + heads * out_head
        store_out(out, target, held, state, value_scale, HEAD_DIM, FIRST, WIDTH0, WIDTH1)
    else:
        store_out(outputs, part * HEAD_DIM, held, state, value_scale, HEAD_DIM, FIRST, WIDTH0, WIDTH1)
        tl.store(sums + part, log_sum(state), mask=held)


def variants() -> Iterator[Variant]:
    everything: tuple[KvFormat, ...] = ("bfloat16", "fp8", "int8", "int4")
    for kv_format in everything:
        yield _variant(LLAMA_8B, kv_format)
    yield _variant(LLAMA_70B, "bfloat16")
    yield _variant(LLAMA_70B, "fp8")
    yield _variant(LLAMA_8B, "bfloat16", splits=1)
    yield _variant(LLAMA_8B_SMALL_BLOCKS, "bfloat16")
    yield _variant(LLAMA_8B_SMALL_BLOCKS, "int4")
    for model in (SMOLLM2, GEMMA, PHI_3):
        yield _variant(model, "bfloat16")
        yield _variant(model, "int4")


def _variant(model: Model, kv_format: KvFormat, splits: int = 2) -> Variant:
    types, constants = types_and_constants(model, kv_format)
    constants |= decode_constants(kv_format, model.heads, model.kv_heads, model.head_dim, model.block_size)
    config = dict(default_config(model.head_dim))
    del config["WAVES"]
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    constants |= config | {"LEAST": LEAST_TILES}
    if splits == 1:
        constants |= {"outputs": None, "sums": None}
    name = f"paged_attention/{model.name}/{kv_format}{'/unsplit' if splits == 1 else ''}"
    return Variant(name, _decode, types, constants, options, architectures=architectures(kv_format))

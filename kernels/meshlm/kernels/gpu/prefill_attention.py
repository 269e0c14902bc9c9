"""Causal attention of many tokens of several sequences over their paged cache, on a GPU: chunks of prompts, whatever
is cached before them, and trees of drafted tokens to verify."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from meshlm.kernels.gpu import prefill_attention_hopper as hopper
from meshlm.kernels.gpu.attention_checks import check_attention
from meshlm.kernels.gpu.attention_splits import (
    LEAST_TILES,
    capability_of,
    empty_parts,
    merge,
    processors_of,
    split_count,
)
from meshlm.kernels.gpu.attention_tile import FORMATS, NOT_ALIGNED, NOT_SPECIALIZED, head_constants, scales
from meshlm.kernels.gpu.attention_variants import (
    GEMMA,
    LLAMA_8B,
    LLAMA_8B_SMALL_BLOCKS,
    PHI_3,
    SMOLLM2,
    Model,
    architectures,
    types_and_constants,
)
from meshlm.kernels.gpu.capabilities import LATEST_MAJOR, multiplies_from_shared
from meshlm.kernels.gpu.checks import require, require_tensor
from meshlm.kernels.gpu.configs import Config, choose
from meshlm.kernels.gpu.kv_cache import KvFormat, KvLayer
from meshlm.kernels.gpu.prefill_tile import prefill_tile
from meshlm.kernels.gpu.variants import Variant, by_config

WAVES = 2  # programs of one processor, below which contexts are split
MOST_SPLITS = 32
TREE_NODES = 64


def prefill_attention(
    query: torch.Tensor,
    layer: KvLayer,
    tables: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    *,
    most_queries: int,
    window: int | None = None,
    softcap: float | None = None,
    sink_tokens: int = 0,
    sink_logits: torch.Tensor | None = None,
    tree: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """The last tokens of each sequence, whose keys and values are stored. Returns `out`, or a new tensor: (rows, heads,
    head_dim); of rows that are no sequence's the contents are undefined.

    query: (rows, heads, head_dim), sequence i's being rows [starts[i], starts[i + 1]); starts: (sequences + 1,) int32.
    lengths: (sequences,) int32, tokens in the cache, the queries included, which are the last of them; where it is 0,
    rows give zeros.
    most_queries: at least the queries of every sequence; those behind it are not computed.
    tree: (rows,) int64, for sequences of up to 64 queries that are nodes of a tree: bit j of a row says that it sees
    the j-th query of its sequence, itself among them, beside all that is cached before them. Its position, for the
    window, is that of the first query plus the bits that are set, less 1.
    All else as in `paged_attention`. Raises ArgumentError.
    """
    check_attention(
        query, layer, tables, lengths,
        window=window, softcap=softcap, sink_tokens=sink_tokens, sink_logits=sink_logits, out=out,
    )  # fmt: skip
    _check_rows(query, lengths, starts, most_queries, tree)
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    sequences = tables.shape[0]
    if len(query) == 0 or sequences == 0 or most_queries == 0:
        return out
    arguments: dict[str, Any] = {
        "query": query, "query_row": query.stride(0), "query_head": query.stride(1),
        "out": out, "out_row": out.stride(0), "out_head": out.stride(1),
        "keys": layer.keys, "values": layer.values, "key_scales": layer.key_scales, "value_scales": layer.value_scales,
        "blocks": layer.blocks, "tables": tables, "table_row": tables.stride(0), "width": tables.shape[1],
        "starts": starts, "lengths": lengths, "tree": tree, "sink_logits": sink_logits,
        "window": window or 0, "sink_tokens": sink_tokens,
        "WINDOWED": window is not None, "SOFTCAPPED": softcap is not None,
    }  # fmt: skip
    arguments["scale"], arguments["softcap"] = scales(scale, softcap)
    device, heads = query.device, query.shape[1]
    rows = most_queries * (heads // layer.kv_heads)
    if hopper.suits(query, layer, rows, capability_of(device)):
        chosen = config or _configure_hopper(layer, heads, sequences, rows, device)
        hopper.launch(arguments, layer, heads, sequences, rows, processors_of(device), chosen)
    else:
        chosen = config or _configure(layer, heads, sequences, rows, tables.shape[1] * layer.block_size, device)
        _launch(arguments, layer, sequences, rows, chosen)
    return out


def default_config(kv_format: KvFormat, head_dim: int, rows: int, capability: tuple[int, int]) -> dict[str, int]:
    """rows: queries times group, at most, of a sequence. SPLITS is missing, see `default_splits`."""
    height = min(128 if head_dim <= 128 else 64, max(16, int(triton.next_power_of_2(rows))))
    older = not multiplies_from_shared(capability[0])
    narrow = height < 64 or head_dim > 128 or (older and head_dim > 64)
    return {
        "ROWS": height,
        "TILE": 32 if narrow else 64,
        "num_warps": 8 if height == 128 or head_dim > 128 else 4,
        "num_stages": 2 if head_dim > 128 or (older and kv_format == "int8") else 3,
    }


def default_splits(head_dim: int, rows: int, others: int, tokens: int, processors: int) -> int:
    """others: sequences times heads of keys; tokens: the most that a block table has room for. Contexts are only split
    where there is too little to do otherwise, as for a speculative tree."""
    shape = default_config("bfloat16", head_dim, rows, (LATEST_MAJOR, 0))
    programs = -(-rows // shape["ROWS"]) * others
    if programs >= processors:
        return 1
    return min(MOST_SPLITS, split_count(programs, -(-tokens // shape["TILE"]), processors, WAVES))


def _configure(layer: KvLayer, heads: int, sequences: int, rows: int, tokens: int, device: torch.device) -> Config:
    """tokens: the most that a block table has room for."""
    splits = default_splits(layer.head_dim, rows, layer.kv_heads * sequences, tokens, processors_of(device))
    default = {**default_config(layer.format, layer.head_dim, rows, capability_of(device)), "SPLITS": splits}
    return choose("prefill_attention", _key(layer, heads, sequences, rows), default, device)


def _configure_hopper(layer: KvLayer, heads: int, sequences: int, rows: int, device: torch.device) -> Config:
    default = hopper.default_config(layer.head_dim, layer.block_size, rows)
    return choose("prefill_attention_hopper", _key(layer, heads, sequences, rows), default, device)


def _key(layer: KvLayer, heads: int, sequences: int, rows: int) -> tuple[int, ...]:
    rounded = (int(triton.next_power_of_2(sequences)), int(triton.next_power_of_2(rows)))
    return (layer.keys.element_size() * 8, FORMATS[layer.format], heads, layer.kv_heads, layer.head_dim, *rounded)


def _check_rows(
    query: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor, most_queries: int, tree: torch.Tensor | None
) -> None:
    device, sequences = query.device, len(lengths)
    require_tensor("starts", starts, shape=(sequences + 1,), dtypes=(torch.int32,), device=device)
    require(most_queries >= 0, "most_queries", f"is {most_queries}, must be 0 or more")
    if tree is not None:
        require_tensor("tree", tree, shape=(len(query),), dtypes=(torch.int64,), device=device)
        fits = most_queries <= TREE_NODES
        require(fits, "tree", f"is given for {most_queries} queries a sequence, a tree has at most {TREE_NODES}")
    if device.type != "cpu":
        return
    counts = starts.diff()
    ordered = bool((counts >= 0).all()) and 0 <= int(starts[0]) <= int(starts[-1]) <= len(query)
    require(ordered, "starts", f"must rise from 0 or more to at most {len(query)}, the rows of the query")
    require(bool((counts <= most_queries).all()), "most_queries", f"is {most_queries}, a sequence has more")
    cached = bool(((lengths >= counts) | (lengths == 0)).all())
    require(cached, "lengths", "has one that is less than its sequence's queries")


def _launch(arguments: dict[str, Any], layer: KvLayer, sequences: int, rows: int, config: Config) -> None:
    launched = dict(config)
    splits, query, out = launched.pop("SPLITS"), arguments["query"], arguments["out"]
    count, heads, head_dim = query.shape
    parts = empty_parts(count, heads, splits, head_dim, query.device) if splits > 1 else None
    outputs, sums = parts or (None, None)
    constants = head_constants(layer.format, heads, layer.kv_heads, head_dim, layer.block_size)
    _prefill[(triton.cdiv(rows, launched["ROWS"]), layer.kv_heads * splits, sequences)](
        outputs=outputs, sums=sums, splits=splits, LEAST=LEAST_TILES, **arguments, **constants, **launched
    )
    if parts is not None:
        merge(parts, out)


@triton.jit(do_not_specialize=(*NOT_SPECIALIZED, "splits"), do_not_specialize_on_alignment=NOT_ALIGNED)
def _prefill(
    query, query_row, query_head, out, out_row, out_head, outputs, sums, splits,
    keys, values, key_scales, value_scales, blocks, tables, table_row, width, starts, lengths, tree, sink_logits,
    scale, softcap, window, sink_tokens,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAPPED: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    # Tiles with the longest contexts come first, so that none of them starts when all else is done.
    prefill_tile(
        tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1) % KV_HEADS, tl.program_id(2),
        tl.program_id(1) // KV_HEADS, splits, query, query_row, query_head, out, out_row, out_head, outputs, sums,
        (keys, values, key_scales, value_scales), (None, None), blocks, tables, table_row, width, starts, lengths,
        tree, sink_logits, scale, softcap, window, sink_tokens,
        FORMAT, GROUP, KV_HEADS, BLOCK_SIZE, HEAD_DIM, FIRST, WIDTH0, WIDTH1, ROWS, TILE, WINDOWED, SOFTCAPPED, LEAST,
        False, False,
    )  # fmt: skip


def variants() -> Iterator[Variant]:
    everything: tuple[KvFormat, ...] = ("bfloat16", "fp8", "int8", "int4")
    for kv_format in everything:
        yield from _variants(LLAMA_8B, kv_format)
    yield from _variants(LLAMA_8B_SMALL_BLOCKS, "bfloat16")
    for model in (SMOLLM2, GEMMA, PHI_3):
        yield from _variants(model, "bfloat16")
    yield from _variants(LLAMA_8B, "bfloat16", tree_nodes=8)
    yield from _variants(LLAMA_8B, "int4", tree_nodes=8)


def _variants(model: Model, kv_format: KvFormat, tree_nodes: int | None = None) -> Iterator[Variant]:
    """One, or two where older devices are served otherwise."""
    types, constants = types_and_constants(model, kv_format)
    constants |= head_constants(kv_format, model.heads, model.kv_heads, model.head_dim, model.block_size)
    constants |= {"LEAST": LEAST_TILES} | ({"tree": None, "outputs": None, "sums": None} if tree_nodes is None else {})
    name = f"prefill_attention/{model.name}/{kv_format}{'' if tree_nodes is None else '/tree'}"
    rows = (tree_nodes or 4096) * model.heads // model.kv_heads

    def config_of(architecture: int) -> dict[str, int]:
        return default_config(kv_format, model.head_dim, rows, divmod(architecture, 10))

    for suffix, config, served in by_config(architectures(kv_format), config_of):
        options = {option: config.pop(option) for option in ("num_warps", "num_stages")}
        types |= {"splits": "i32"}
        yield Variant(name + suffix, _prefill, types, constants | config, options, architectures=served)

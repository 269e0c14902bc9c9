"""Prefill attention for Hopper and later: tiles of keys and values come by TMA, from tensor descriptors over the cache.

The grid is persistent: each program takes tiles of queries until none is left, those with the longest contexts first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from meshlm.kernels.gpu.attention_tile import NOT_ALIGNED, NOT_SPECIALIZED, head_constants
from meshlm.kernels.gpu.attention_variants import GEMMA, LLAMA_8B, LLAMA_70B, SMOLLM2, Model, types_and_constants
from meshlm.kernels.gpu.capabilities import multiplies_from_shared
from meshlm.kernels.gpu.configs import Config
from meshlm.kernels.gpu.kv_cache import KvLayer
from meshlm.kernels.gpu.prefill_tile import prefill_tile
from meshlm.kernels.gpu.variants import Variant

LEAST_ROWS = 64  # of a warp group's product
LEAST_BLOCK = 64  # tokens


def suits(query: torch.Tensor, layer: KvLayer, rows: int, capability: tuple[int, int]) -> bool:
    """Whether this kernel serves: a data center's device that has TMA, keys of the query's 16-bit type whose heads are
    one part, blocks that hold a tile, and as many rows (queries times group, at most, of a sequence) as a warp group
    multiplies.

    On Blackwell heads of 256 would spill registers.
    """
    return (
        multiplies_from_shared(capability[0])
        and query.dtype in (torch.bfloat16, torch.float16)
        and layer.keys.dtype == query.dtype
        and layer.head_dim in ((64, 128, 256) if capability[0] == 9 else (64, 128))
        and layer.block_size >= LEAST_BLOCK
        and rows >= LEAST_ROWS
    )


def default_config(head_dim: int, block_size: int, rows: int) -> Config:
    """rows: queries times group, at most, of a sequence. PROGRAMS: of each processor.

    SPECIALIZED has Triton give loads and products warps of their own. On Hopper Triton 3.6 to 3.9 leaves it undone with
    8 warps and fails with 4; on Blackwell it compiles, but has not run: a tuned configuration may turn it on.
    """
    tile = min(block_size, 128 if head_dim <= 64 else 64 if head_dim <= 128 else 32)
    tall = rows > LEAST_ROWS and head_dim <= 128
    return {
        "ROWS": 128 if tall else 64,
        "TILE": tile,
        "PROGRAMS": 1 if tall else 2,
        "SPECIALIZED": 0,
        "num_warps": 8 if tall or head_dim > 128 else 4,
        "num_stages": 3 if head_dim <= 128 else 2,
    }


def launch(
    arguments: dict[str, Any],
    layer: KvLayer,
    heads: int,
    sequences: int,
    rows: int,
    processors: int,
    config: Config,
) -> None:
    """arguments: those that both prefill kernels take; rows: as of `suits`."""
    head_dim, launched = layer.head_dim, dict(config)
    programs, tiles = launched.pop("PROGRAMS") * processors, triton.cdiv(rows, launched["ROWS"])
    described = [
        TensorDescriptor.from_tensor(stored.view(-1, head_dim), [launched["TILE"], head_dim])
        for stored in (layer.keys, layer.values)
    ]
    constants = head_constants(layer.format, heads, layer.kv_heads, head_dim, layer.block_size)
    _prefill_hopper[(min(programs, tiles * sequences * layer.kv_heads),)](
        described_keys=described[0], described_values=described[1], tiles=tiles, sequences=sequences,
        **arguments, **constants, **launched,
    )  # fmt: skip


@triton.jit(do_not_specialize=(*NOT_SPECIALIZED, "tiles", "sequences"), do_not_specialize_on_alignment=NOT_ALIGNED)
def _prefill_hopper(
    described_keys, described_values, tiles, sequences,
    query, query_row, query_head, out, out_row, out_head,
    keys, values, key_scales, value_scales, blocks, tables, table_row, width, starts, lengths, tree, sink_logits,
    scale, softcap, window, sink_tokens,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAPPED: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    others = sequences * KV_HEADS
    for item in tl.range(tl.program_id(0), tiles * others, tl.num_programs(0)):
        prefill_tile(
            tiles - 1 - item // others, item % KV_HEADS, item % others // KV_HEADS, 0, 1,
            query, query_row, query_head, out, out_row, out_head, None, None,
            (keys, values, key_scales, value_scales), (described_keys, described_values), blocks,
            tables, table_row, width, starts, lengths, tree, sink_logits, scale, softcap, window, sink_tokens,
            FORMAT, GROUP, KV_HEADS, BLOCK_SIZE, HEAD_DIM, FIRST, WIDTH0, WIDTH1, ROWS, TILE, WINDOWED, SOFTCAPPED, 1,
            True, SPECIALIZED,
        )  # fmt: skip


def variants() -> Iterator[Variant]:
    for model in (LLAMA_8B, LLAMA_70B, SMOLLM2):
        yield _variant(model, (90, 100))
    yield _variant(GEMMA, (90,))
    yield _variant(SMOLLM2, (100,), specialized=True)


def _variant(model: Model, served: tuple[int, ...], specialized: bool = False) -> Variant:
    types, constants = types_and_constants(model, "bfloat16")
    constants |= head_constants("bfloat16", model.heads, model.kv_heads, model.head_dim, model.block_size)
    config = dict(default_config(model.head_dim, model.block_size, 4096 * model.heads // model.kv_heads))
    del config["PROGRAMS"]
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    described = f"tensordesc<bf16[{config['TILE']},{model.head_dim}]>"
    types |= {"described_keys": described, "described_values": described, "tiles": "i32", "sequences": "i32"}
    constants |= config | {"tree": None} | ({"SPECIALIZED": 1} if specialized else {})
    name = f"prefill_attention_hopper/{model.name}/bfloat16{'/specialized' if specialized else ''}"
    return Variant(name, _prefill_hopper, types, constants, options, architectures=served)

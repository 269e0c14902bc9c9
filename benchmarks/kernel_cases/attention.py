"""Attention over the paged cache: decode, and prefill with and without tokens that are cached already."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from kernel_cases.case import LLAMA_8B, MODELS, Call, Case, Goal, Model, Plan, Work
from meshlm.kernels.gpu.kv_cache import KvFormat, KvLayer, allocate_kv_layer, bytes_per_token
from meshlm.kernels.gpu.paged_attention import paged_attention
from meshlm.kernels.gpu.prefill_attention import prefill_attention

BLOCKS = (16, 64)  # tokens of a block: as serving has it unless told, and as TMA wants it
BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Cache:
    """keys, values: (sequences, kv_heads, context, head_dim) bf16, and the same numbers in `layer` by `tables` where
    that is in bf16."""

    keys: torch.Tensor
    values: torch.Tensor
    layer: KvLayer
    tables: torch.Tensor


def random_cache(plan: Plan, model: Model, kv_format: KvFormat, sequences: int, context: int, block: int) -> Cache:
    blocks = sequences * context // block
    layer = allocate_kv_layer(kv_format, blocks, model.kv_heads, block, model.head_dim, plan.device)
    order = torch.randperm(blocks, device=plan.device)
    pair = []
    for part in (layer.keys, layer.values):
        numbers = plan.randn(sequences, model.kv_heads, context, model.head_dim)
        pair.append(numbers)
        if kv_format != "bfloat16":
            part.view(torch.uint8).random_(0, 120)  # none is a NaN in fp8
            continue
        for row, table in enumerate(order.view(sequences, -1)):
            part[table] = numbers[row].unflatten(1, (-1, block)).transpose(0, 1)
    for scales in (layer.key_scales, layer.value_scales):
        if scales is not None:
            scales.uniform_(0.005, 0.02)
    return Cache(pair[0], pair[1], layer, order.view(sequences, -1).int())


def _torch(backend: SDPBackend, query: torch.Tensor, cache: Cache, causal: bool) -> torch.Tensor:
    """query: (sequences, heads, queries, head_dim). Returns (sequences * queries, heads, head_dim)."""
    queries, context = query.shape[2], cache.keys.shape[2]
    mask = causal_lower_right(queries, context) if causal and queries < context else None
    with sdpa_kernel(backend):
        out = scaled_dot_product_attention(
            query, cache.keys, cache.values, mask, is_causal=causal and mask is None, enable_gqa=True
        )
    return out.transpose(1, 2).flatten(0, 1)


def decode_work(plan: Plan, model: Model, kv_format: KvFormat, sequences: int, context: int, block: int) -> Work:
    read = sequences * context * bytes_per_token(kv_format, model.kv_heads, model.head_dim)
    caches = [random_cache(plan, model, kv_format, sequences, context, block) for _ in range(plan.sets(read))]
    queries = [plan.randn(sequences, model.heads, model.head_dim) for _ in caches]
    lengths = torch.full((sequences,), context, dtype=torch.int32, device=plan.device)

    def ours(i: int) -> torch.Tensor:
        cache = caches[i]
        return paged_attention(queries[i], cache.layer, cache.tables, lengths, model.head_dim**-0.5)

    def theirs(backend: SDPBackend, i: int) -> torch.Tensor:
        return _torch(backend, queries[i].unsqueeze(2), caches[i], causal=False)

    peers: dict[str, Call] = {name: partial(theirs, backend) for name, backend in BACKENDS.items()}
    flops = 4.0 * sequences * context * model.heads * model.head_dim
    tolerance = 0.02 if kv_format == "bfloat16" else None
    return Work(ours, len(caches), read + 2 * queries[0].nbytes, flops, peers, tolerance)


def prefill_work(plan: Plan, model: Model, sequences: int, queries: int, context: int, block: int) -> Work:
    read = sequences * context * bytes_per_token("bfloat16", model.kv_heads, model.head_dim)
    rows = sequences * queries
    size = read + 4 * rows * model.heads * model.head_dim
    caches = [random_cache(plan, model, "bfloat16", sequences, context, block) for _ in range(plan.sets(size))]
    asked = [plan.randn(sequences, queries, model.heads, model.head_dim) for _ in caches]
    lengths = torch.full((sequences,), context, dtype=torch.int32, device=plan.device)
    starts = torch.arange(0, rows + 1, queries, dtype=torch.int32, device=plan.device)

    def ours(i: int) -> torch.Tensor:
        cache, scale = caches[i], model.head_dim**-0.5
        flat = asked[i].flatten(0, 1)
        return prefill_attention(flat, cache.layer, cache.tables, starts, lengths, scale, most_queries=queries)

    def theirs(backend: SDPBackend, i: int) -> torch.Tensor:
        return _torch(backend, asked[i].transpose(1, 2), caches[i], causal=True)

    peers: dict[str, Call] = {name: partial(theirs, backend) for name, backend in BACKENDS.items()}
    seen = queries * (context - (queries - 1) / 2)  # pairs of a query and a key, by the causal mask
    return Work(ours, len(caches), size, 4.0 * sequences * seen * model.heads * model.head_dim, peers)


def cases(plan: Plan) -> Iterator[Case]:
    yield from _decode_cases(plan)
    shapes = [(1, 4096, 4096), (1, 2048, 32768), (1, 512, 8192), (1, 16384, 16384), (16, 1024, 1024)]
    for model in MODELS:
        for block in BLOCKS:
            for sequences, queries, context in shapes[:2] if plan.quick else shapes:
                work = partial(prefill_work, plan, model, sequences, queries, context, block)
                name = f"prefill attention {model.name}, {sequences} x {queries} of {context}, blocks of {block}"
                yield Case(name, work, Goal(times=0.75))


def _decode_cases(plan: Plan) -> Iterator[Case]:
    contexts, batches = ((8192,), (1, 16)) if plan.quick else ((1024, 8192, 32768, 131072), (1, 16, 64, 256))
    for model in MODELS:
        for context in contexts:
            for batch in batches:
                if batch * context * bytes_per_token("bfloat16", model.kv_heads, model.head_dim) > plan.memory:
                    continue
                stated = (batch, context) == (16, 8192)
                for block in BLOCKS if stated else BLOCKS[:1]:
                    work = partial(decode_work, plan, model, "bfloat16", batch, context, block)
                    name = f"decode attention {model.name} bf16, {batch} x {context}, blocks of {block}"
                    yield Case(name, work, Goal(of_limit=0.85) if stated else Goal())
    formats: tuple[KvFormat, ...] = ("fp8", "int8", "int4")
    for kv_format in formats:
        for batch in (16,) if plan.quick else (1, 16):
            work = partial(decode_work, plan, LLAMA_8B, kv_format, batch, 8192, BLOCKS[0])
            yield Case(f"decode attention 8B {kv_format}, {batch} x 8192, blocks of {BLOCKS[0]}", work)

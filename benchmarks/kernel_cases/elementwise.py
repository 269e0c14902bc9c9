"""Norms, rotation with the store into the cache, gated activations and embedding: bound by memory at many rows, and by
the launch at few."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn import functional

from kernel_cases.case import MODELS, Call, Case, Goal, Model, Plan, Work
from meshlm.kernels.gpu.embedding import embedding
from meshlm.kernels.gpu.gated_activation import gelu_mul, silu_mul
from meshlm.kernels.gpu.kv_cache import allocate_kv_layer, bytes_per_token
from meshlm.kernels.gpu.rms_norm import rms_norm
from meshlm.kernels.gpu.rope_store import rope_store, turns_table

BLOCK = 16
EPS = 1e-5
MANY = 4096  # rows from which the goal holds: a prefill's


def _compiled(call: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Fused by torch's own compiler, which is torch's best for what has no operator of its own."""
    return torch.compile(call, dynamic=False)


def norm_work(plan: Plan, model: Model, rows: int, added: bool) -> Work:
    size = rows * model.hidden * 2
    weight = torch.rand(model.hidden, device=plan.device)
    narrow = weight.bfloat16()
    moved = size * (4 if added else 2)
    pairs = [(plan.randn(rows, model.hidden), plan.randn(rows, model.hidden) if added else None)
             for _ in range(plan.sets(moved))]  # fmt: skip

    def reference(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        if residual is not None:
            residual += x
            x = residual
        return functional.rms_norm(x, (model.hidden,), narrow, EPS)

    fused = _compiled(reference)
    peers: dict[str, Call] = {
        "rms_norm": lambda i: reference(*pairs[i]),
        "torch.compile": lambda i: fused(*pairs[i]),
    }
    # With a residual each call changes its buffers, and so two of them are not comparable.
    return Work(
        lambda i: rms_norm(pairs[i][0], weight, EPS, residual=pairs[i][1]), len(pairs), moved, 0, peers,
        None if added else 0.02,
    )  # fmt: skip


def gated_work(plan: Plan, model: Model, rows: int, gelu: bool) -> Work:
    moved = rows * model.ffn * 2 * 3
    inputs = [plan.randn(rows, 2 * model.ffn) for _ in range(plan.sets(moved))]

    def reference(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, 1)
        return (functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)) * up

    fused, ours = _compiled(reference), gelu_mul if gelu else silu_mul
    peers: dict[str, Call] = {"eager": lambda i: reference(inputs[i]), "torch.compile": lambda i: fused(inputs[i])}
    return Work(lambda i: ours(inputs[i]), len(inputs), moved, 0, peers)


def rope_work(plan: Plan, model: Model, rows: int) -> Work:
    heads, kv_heads, head_dim = model.heads, model.kv_heads, model.head_dim
    query, stored = rows * heads * head_dim * 2, rows * bytes_per_token("bfloat16", kv_heads, head_dim)
    moved = 2 * (query + stored) + rows * head_dim * 4
    blocks = -(-rows // BLOCK)
    frequencies = 500_000.0 ** (-torch.arange(0, head_dim, 2, device=plan.device) / head_dim)
    turns = turns_table(frequencies, rows)
    positions = torch.arange(rows, dtype=torch.int32, device=plan.device)
    slots = torch.randperm(blocks * BLOCK, device=plan.device)[:rows].int()
    sets = plan.sets(moved)
    inputs = [plan.randn(rows, heads + 2 * kv_heads, head_dim) for _ in range(sets)]
    layers = [allocate_kv_layer("bfloat16", blocks, kv_heads, BLOCK, head_dim, plan.device) for _ in range(sets)]
    rows_of_cache = slots.long() // BLOCK, slots.long() % BLOCK

    def reference(qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        turned = heads + kv_heads
        cosine, sine = turns[positions, 0].unsqueeze(1), turns[positions, 1].unsqueeze(1)
        low, high = qkv[:, :turned].float().chunk(2, -1)
        qkv[:, :turned] = torch.cat((low * cosine - high * sine, high * cosine + low * sine), -1).to(qkv.dtype)
        keys[rows_of_cache[0], :, rows_of_cache[1]] = qkv[:, heads:turned]
        values[rows_of_cache[0], :, rows_of_cache[1]] = qkv[:, turned:]

    fused = torch.compile(reference, dynamic=False)

    def compiled(i: int) -> None:
        fused(inputs[i], layers[i].keys, layers[i].values)

    def ours(i: int) -> None:
        rope_store(inputs[i], positions, slots, turns, layers[i], heads=heads)

    return Work(ours, sets, moved, 0, {"torch.compile": compiled}, None)


def embedding_work(plan: Plan, model: Model, rows: int) -> Work:
    table = plan.randn(model.vocab, model.hidden)
    moved = rows * model.hidden * 2 * 2
    tokens = [
        torch.randint(model.vocab, (rows,), dtype=torch.int32, device=plan.device) for _ in range(plan.sets(moved))
    ]
    peers: dict[str, Call] = {"embedding": lambda i: functional.embedding(tokens[i], table)}
    return Work(lambda i: embedding(tokens[i], table), len(tokens), moved, 0, peers, 0.0)


def cases(plan: Plan) -> Iterator[Case]:
    for model in MODELS[:1] if plan.quick else MODELS:
        for rows in (16, MANY) if plan.quick else (1, 16, 256, MANY):
            goal = Goal(of_limit=0.85) if rows >= MANY else Goal()
            kinds: list[tuple[str, Callable[[], Work]]] = [
                ("rms_norm with residual", partial(norm_work, plan, model, rows, True)),
                ("rope and store", partial(rope_work, plan, model, rows)),
                ("SwiGLU", partial(gated_work, plan, model, rows, False)),
            ]
            if not plan.quick:
                kinds += [
                    ("rms_norm", partial(norm_work, plan, model, rows, False)),
                    ("GeGLU", partial(gated_work, plan, model, rows, True)),
                    ("embedding", partial(embedding_work, plan, model, rows)),
                ]
            for name, work in kinds:
                yield Case(f"{name} {model.name}, {rows} rows", work, goal if name != "embedding" else Goal())

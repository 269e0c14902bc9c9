"""The native operations one by one, on torch tensors: for tests, and for what is done between steps.

Tensors are float32, contiguous and on the CPU. An operation is a function of a loaded `Library`; what it computes is
said where it is written, in `src/`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_float, c_int, c_int32, c_void_p
from dataclasses import dataclass

import torch

from meshlm.kernels.native.cache import Cache
from meshlm.kernels.native.library import Library
from meshlm.kernels.native.structures import Draw, KvCache

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


class Span(ctypes.Structure):
    """`struct Span` of `src/attention_tile.h`."""

    _fields_ = (("row", c_int32), ("count", c_int32), ("start", c_int32), ("sinks", c_int32), ("table", c_void_p))


class _Request(ctypes.Structure):
    _fields_ = (
        ("cache", c_void_p),
        ("layer", c_int32),
        ("group", c_int32),
        ("window", c_int32),
        ("q_stride", c_int32),
        ("scale", c_float),
        ("q", c_void_p),
        ("q_rebased", c_void_p),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows [row, row + count) of a batch, which are cache indices [start, start + count) of the sequence in `table`."""

    table: Sequence[int]
    start: int
    count: int
    row: int = 0
    sinks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Queries:
    """q, q_rebased: (batch, heads, head_dim); window 0 is none."""

    q: torch.Tensor
    scale: float
    layer: int = 0
    window: int = 0
    q_rebased: torch.Tensor | None = None


def rms_norm(library: Library, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x: (rows, width); weight: (width,)."""
    out = torch.empty_like(x)
    call = library.function("native_rms_norm", None, c_void_p, c_void_p, c_float, c_int, c_int, c_void_p)
    call(_floats(x), _floats(weight), eps, x.shape[0], x.shape[1], _floats(out))
    return out


def rope(
    library: Library, x: torch.Tensor, positions: Sequence[float], frequencies: torch.Tensor, factor: float = 1.0
) -> None:
    """Turn x: (rows, heads, head_dim) in place; frequencies: (half,), the pairs that are turned."""
    rows, heads, head_dim = x.shape
    half = frequencies.shape[0]
    angles = torch.empty(2 * half)
    at = torch.tensor(positions, dtype=torch.float64)
    types = (c_void_p, c_void_p, c_void_p, c_float, c_int, c_int, c_int, c_int, c_void_p)
    call = library.function("native_rope", None, *types)
    call(_floats(x), at.data_ptr(), _floats(frequencies), factor, rows, heads, head_dim, half, _floats(angles))


def activation(library: Library, kind: str, x: torch.Tensor) -> torch.Tensor:
    """x: (n,), n a multiple of 16; kind: a key of ACTIVATIONS."""
    out = torch.empty_like(x)
    call = library.function("native_activation", None, c_int, c_void_p, c_int, c_void_p)
    call(ACTIVATIONS[kind], _floats(x), x.shape[0], _floats(out))
    return out


def store(cache: Cache, layer: int, rows: Rows, key: torch.Tensor, value: torch.Tensor) -> None:
    """key, value: (batch, kv_heads, head_dim)."""
    types = (POINTER(KvCache), c_int, POINTER(Span), c_void_p, c_void_p)
    span, _table = _span(rows)
    call = cache.library.function("native_store", None, *types)
    call(byref(cache.struct), layer, byref(span), _floats(key), _floats(value))


def attention(
    cache: Cache,
    rows: Rows,
    queries: Queries,
    *,
    tile_rows: int = 32,
    split: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the given rows, into those rows of `out`, which is like `queries.q`.

    tile_rows: rows that are computed together, at most 32. split: segment by segment, as one long sequence is on many
    threads.
    """
    if out is None:
        out = torch.empty_like(queries.q)
    span, _table = _span(rows)
    name = "native_attention_split" if split else "native_attention"
    call = cache.library.function(name, None, POINTER(_Request), POINTER(Span), c_int, c_void_p)
    call(byref(_request(cache, queries)), byref(span), tile_rows, _floats(out))
    return out


def observe(cache: Cache, rows: Rows, queries: Queries, scores: torch.Tensor, *, last: int = 32) -> None:
    """Add what the `last` rows attend to, to scores: as `Cache.scores`."""
    span, _table = _span(rows)
    call = cache.library.function("native_observe", None, POINTER(_Request), POINTER(Span), c_int, c_void_p)
    call(byref(_request(cache, queries)), byref(span), last, _floats(scores))


def sample(library: Library, logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """The token drawn from each row of logits: (rows, vocab), which are overwritten."""
    rows, vocab = logits.shape
    tokens = (c_int32 * rows)()
    types = (c_void_p, c_int, c_int, c_void_p, c_void_p)  # as the runner has them, which draws from its own buffer
    library.function("native_sample", None, *types)(_floats(logits), rows, vocab, (Draw * rows)(*draws), tokens)
    return list(tokens)


def log_sum_exp(library: Library, logits: torch.Tensor) -> float:
    """logits: (vocab,)."""
    return float(library.function("native_log_sum_exp", c_float, c_void_p, c_int)(_floats(logits), logits.shape[0]))


def top(library: Library, logits: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
    """The ids and values of the `count` greatest of logits: (vocab,), the greatest first."""
    ids, values = (c_int32 * count)(), (c_float * count)()
    call = library.function("native_top", None, c_void_p, c_int, c_int, c_void_p, c_void_p)
    call(_floats(logits), logits.shape[0], count, ids, values)
    return list(ids), list(values)


def score(library: Library, logits: torch.Tensor, targets: Sequence[int]) -> tuple[list[float], list[float]]:
    """The log-probability of each row's target, and the entropy of the row; nats. logits: (rows, vocab)."""
    rows, vocab = logits.shape
    ids, logprobs, entropies = (c_int32 * rows)(*targets), (c_float * rows)(), (c_float * rows)()
    types = (c_void_p, c_int, c_int, c_void_p, c_void_p, c_void_p)
    library.function("native_score", None, *types)(_floats(logits), rows, vocab, ids, logprobs, entropies)
    return list(logprobs), list(entropies)


def _floats(tensor: torch.Tensor) -> int:
    if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"a contiguous float32 tensor on the CPU is needed, not {tensor.dtype} on {tensor.device}")
    return tensor.data_ptr()


def _span(rows: Rows) -> tuple[Span, ctypes.Array[c_int32]]:
    """The structure, and the table that it points to, which the caller keeps alive."""
    table = (c_int32 * len(rows.table))(*rows.table)
    return Span(rows.row, rows.count, rows.start, rows.sinks, ctypes.addressof(table)), table


def _request(cache: Cache, queries: Queries) -> _Request:
    heads, head_dim = queries.q.shape[1:]
    rebased = None if queries.q_rebased is None else _floats(queries.q_rebased)
    group = heads // cache.shape.kv_heads
    return _Request(
        ctypes.addressof(cache.struct),
        queries.layer,
        group,
        queries.window,
        heads * head_dim,
        queries.scale,
        _floats(queries.q),
        rebased,
    )

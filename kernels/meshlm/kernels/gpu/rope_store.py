"""Rotary positions and the store into the paged cache in one pass over a step's queries, keys and values.

Queries are rotated in place; keys are rotated and stored, values stored, in whatever format the cache has. Heads of
queries and keys may be normalized before (Qwen3, Gemma 3). Rotation: Su et al. 2021, arXiv:2104.09864, split halves, as
in `kernels/rope.py`, whose frequencies (linear, llama3, yarn) the table of turns is made of.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from meshlm.kernels.gpu.attention_checks import check_layer
from meshlm.kernels.gpu.checks import require, require_runs_on, require_tensor
from meshlm.kernels.gpu.fp8 import to_fp8
from meshlm.kernels.gpu.kv_cache import KvFormat, KvLayer
from meshlm.kernels.gpu.variants import ARCHITECTURES, FP8_ARCHITECTURES, Variant

HEADS_AT_A_TIME = 8  # of 128 elements: 16 bytes a thread and half, the widest access
WARPS = 2
_FORMATS: dict[KvFormat, int] = {"float32": 0, "float16": 0, "bfloat16": 0, "fp8": 1, "int8": 2, "int4": 3}
_FP8, _INT8, _INT4 = (tl.constexpr(number) for number in (1, 2, 3))
_LEAST_SCALE = tl.constexpr(1e-7)  # a float16 holds it; what is smaller is stored as 0
_LARGEST_SCALE = tl.constexpr(65504.0)  # of float16


def turns_table(frequencies: torch.Tensor, positions: int, factor: float = 1.0) -> torch.Tensor:
    """Cosines and sines of every position below `positions`, times `factor`: (positions, 2, rotated / 2) float32.

    frequencies: (rotated / 2,) float32, radians a position. Angles are computed in float64.
    """
    angles = torch.arange(positions, device=frequencies.device, dtype=torch.float64).unsqueeze(1) * frequencies.double()
    return (torch.stack((angles.cos(), angles.sin()), 1) * factor).float()


def rope_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    turns: torch.Tensor,
    layer: KvLayer,
    *,
    heads: int,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """qkv: (rows, heads + 2 * kv_heads, head_dim), query heads first, then keys, then values; queries change in place.

    positions: (rows,) int32, within the table. slots: (rows,) int32, no two equal; a row whose slot is not within the
    cache stores nothing. turns: see `turns_table`; elements of a head from `rotated` on do not turn. query_norm,
    key_norm: (head_dim,) float32, weights of a root-mean-square norm over each head, with `eps`.
    A number is stored as the nearest of its format; int8 and int4 codes by a scale of the token's head, where what is
    no number becomes some number. Raises ArgumentError.
    """
    _check(qkv, positions, slots, turns, layer, heads)
    device, kv_heads, head_dim = qkv.device, layer.kv_heads, layer.head_dim
    for name, weight in (("query_norm", query_norm), ("key_norm", key_norm)):
        if weight is not None:
            require_tensor(name, weight, shape=(head_dim,), dtypes=(torch.float32,), device=device)
    rows, rotated = len(qkv), 2 * turns.shape[2]
    if rows == 0:
        return
    half = triton.next_power_of_2(head_dim // 2)
    _rope_store[(rows, triton.cdiv(heads + 2 * kv_heads, HEADS_AT_A_TIME))](
        qkv, qkv.stride(0), qkv.stride(1), positions, slots, turns, turns.shape[0], query_norm, key_norm, eps,
        layer.keys, layer.values, layer.key_scales, layer.value_scales, layer.blocks * layer.block_size,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, ROTATED=rotated, HALF=half, BLOCK_SIZE=layer.block_size,
        FORMAT=_FORMATS[layer.format], QUERY_NORM=query_norm is not None, KEY_NORM=key_norm is not None,
        AT_A_TIME=HEADS_AT_A_TIME, num_warps=WARPS,
    )  # fmt: skip


def _check(
    qkv: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, turns: torch.Tensor, layer: KvLayer, heads: int
) -> None:
    device = qkv.device
    require_runs_on(device, "qkv")
    check_layer(layer, device)
    kv_heads, head_dim = layer.kv_heads, layer.head_dim
    require(heads > 0, "heads", f"is {heads}, must be above 0")
    floats = (torch.float32, torch.float16, torch.bfloat16)
    require_tensor("qkv", qkv, shape=(None, heads + 2 * kv_heads, head_dim), dtypes=floats, device=device)
    for name, tensor in (("positions", positions), ("slots", slots)):
        require_tensor(name, tensor, shape=(len(qkv),), dtypes=(torch.int32,), device=device)
    require_tensor("turns", turns, shape=(None, 2, None), dtypes=(torch.float32,), device=device)
    require(turns.is_contiguous(), "turns", "must be contiguous")
    require(0 < 2 * turns.shape[2] <= head_dim, "turns", f"rotates {2 * turns.shape[2]} elements of {head_dim}")


@triton.jit
def _square_mean(low, high, HEAD_DIM: tl.constexpr):
    return (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / HEAD_DIM


@triton.jit
def _turned(x, partner, columns, turn, ROTATED: tl.constexpr):
    """Elements of a head turned with their partners; `turn`: the position's row of the table."""
    pairs: tl.constexpr = ROTATED // 2
    turns = columns < ROTATED
    cos = tl.load(turn + columns % pairs, mask=turns, other=1.0)
    sin = tl.load(turn + pairs + columns % pairs, mask=turns, other=0.0)
    sin = tl.where(columns < pairs, -sin, sin)
    return x * cos[None, :] + partner * sin[None, :]


@triton.jit
def _partners(head, columns, held, ROTATED: tl.constexpr):
    """The elements that those at `columns` turn with. head: pointers to the heads, (heads, 1)."""
    pairs: tl.constexpr = ROTATED // 2
    other = tl.where(columns < pairs, columns + pairs, tl.where(columns < ROTATED, columns - pairs, columns))
    return tl.load(head + other[None, :], mask=held, other=0.0).to(tl.float32), other


@triton.jit
def _normed(x, scale, weights, columns, inside, applies):
    """x * scale * weights in the heads to which it applies."""
    factors = tl.load(weights + columns, mask=inside, other=0.0)[None, :]
    return tl.where(applies, x * scale * factors, x)


@triton.jit
def _rounded(x):
    return tl.floor(x + 0.5)


@triton.jit
def _store(
    cache, scales, place, head, low, high, columns, mask, HEAD_DIM: tl.constexpr, FORMAT: tl.constexpr
):  # fmt: skip
    """Heads (heads, HALF) twice, into the cache at `place` (heads,), a slot of each head."""
    inside = mask[:, None] & (columns < HEAD_DIM // 2)[None, :]
    if FORMAT == _INT8 or FORMAT == _INT4:  # noqa: SIM109 - Triton knows no `in`
        most = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
        levels: tl.constexpr = 127.0 if FORMAT == _INT8 else 7.0
        scale = tl.minimum(most / levels, _LARGEST_SCALE).to(tl.float16)
        tl.store(scales + place, scale, mask=mask)
        exact = scale.to(tl.float32)
        inverse = tl.where(exact > _LEAST_SCALE, 1 / tl.maximum(exact, _LEAST_SCALE), 0.0)[:, None]
        low = tl.clamp(_rounded(low * inverse), -levels, levels)
        high = tl.clamp(_rounded(high * inverse), -levels, levels)
    if FORMAT == _FP8:
        scale = tl.load(scales + head, mask=mask, other=1.0)[:, None]
        low, high = to_fp8(low / scale), to_fp8(high / scale)
    if FORMAT == _INT4:
        byte = (low.to(tl.int32) + 8) | ((high.to(tl.int32) + 8) << 4)
        tl.store(cache + place[:, None] * (HEAD_DIM // 2) + columns[None, :], byte.to(tl.uint8), mask=inside)
    else:
        at = cache + place[:, None] * HEAD_DIM + columns[None, :]
        tl.store(at, low.to(cache.dtype.element_ty), mask=inside)
        tl.store(at + HEAD_DIM // 2, high.to(cache.dtype.element_ty), mask=inside)


@triton.jit
def _rope_store(
    qkv, row_stride, head_stride, positions, slots, turns, known, query_norm, key_norm, eps,
    keys, values, key_scales, value_scales, slots_n,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTATED: tl.constexpr, HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, FORMAT: tl.constexpr, QUERY_NORM: tl.constexpr, KEY_NORM: tl.constexpr,
    AT_A_TIME: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * AT_A_TIME + tl.arange(0, AT_A_TIME)
    is_query, is_key = head < HEADS, (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_value = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    middle: tl.constexpr = HEAD_DIM // 2
    columns = tl.arange(0, HALF)
    inside = columns < middle
    held = (head < HEADS + 2 * KV_HEADS)[:, None] & inside[None, :]
    pointer = qkv + row * row_stride + head.to(tl.int64)[:, None] * head_stride
    low = tl.load(pointer + columns[None, :], mask=held, other=0.0).to(tl.float32)
    high = tl.load(pointer + middle + columns[None, :], mask=held, other=0.0).to(tl.float32)
    if ROTATED < HEAD_DIM:
        low_partner, low_other = _partners(pointer, columns, held, ROTATED)
        high_partner, high_other = _partners(pointer, columns + middle, held, ROTATED)
        tl.debug_barrier()  # queries are stored in place: no thread may, before all have read their partners
    if QUERY_NORM or KEY_NORM:
        scale = tl.rsqrt(_square_mean(low, high, HEAD_DIM) + eps)[:, None]
        if QUERY_NORM:
            applies = is_query[:, None]
            low = _normed(low, scale, query_norm, columns, inside, applies)
            high = _normed(high, scale, query_norm, columns + middle, inside, applies)
            if ROTATED < HEAD_DIM:
                low_partner = _normed(low_partner, scale, query_norm, low_other, inside, applies)
                high_partner = _normed(high_partner, scale, query_norm, high_other, inside, applies)
        if KEY_NORM:
            applies = is_key[:, None]
            low = _normed(low, scale, key_norm, columns, inside, applies)
            high = _normed(high, scale, key_norm, columns + middle, inside, applies)
            if ROTATED < HEAD_DIM:
                low_partner = _normed(low_partner, scale, key_norm, low_other, inside, applies)
                high_partner = _normed(high_partner, scale, key_norm, high_other, inside, applies)
    position = tl.minimum(tl.maximum(tl.load(positions + row), 0), known - 1).to(tl.int64)
    turn = turns + position * ROTATED
    if ROTATED < HEAD_DIM:
        turned_low = _turned(low, low_partner, columns, turn, ROTATED)
        turned_high = _turned(high, high_partner, columns + middle, turn, ROTATED)
    else:
        cos = tl.load(turn + columns, mask=inside, other=1.0)[None, :]
        sin = tl.load(turn + middle + columns, mask=inside, other=0.0)[None, :]
        turned_low, turned_high = low * cos - high * sin, high * cos + low * sin
    plain = is_value[:, None]
    low, high = tl.where(plain, low, turned_low), tl.where(plain, high, turned_high)
    queries = is_query[:, None] & inside[None, :]
    tl.store(pointer + columns[None, :], low.to(qkv.dtype.element_ty), mask=queries)
    tl.store(pointer + middle + columns[None, :], high.to(qkv.dtype.element_ty), mask=queries)
    slot = tl.zeros([AT_A_TIME], tl.int64) + tl.load(slots + row)  # the interpreter makes no mask of one number
    stored = (slot >= 0) & (slot < slots_n)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    key_head, value_head = head - HEADS, head - HEADS - KV_HEADS
    place = (block * KV_HEADS + key_head) * BLOCK_SIZE + offset
    _store(keys, key_scales, place, key_head, low, high, columns, is_key & stored, HEAD_DIM, FORMAT)
    place = (block * KV_HEADS + value_head) * BLOCK_SIZE + offset
    _store(values, value_scales, place, value_head, low, high, columns, is_value & stored, HEAD_DIM, FORMAT)


def variants() -> Iterator[Variant]:
    """Heads of Llama 3 8B over caches of each kind, of Qwen3 with norms, and of Phi 4 mini, which turns in part."""
    types = {
        "qkv": "*bf16:16", "row_stride": "i32:16", "head_stride": "i32:16", "positions": "*i32:16", "slots": "*i32:16",
        "turns": "*fp32:16", "known": "i32:16", "query_norm": "*fp32:16", "key_norm": "*fp32:16", "eps": "fp32",
        "slots_n": "i32:16",
    }  # fmt: skip
    codes: dict[KvFormat, str] = {"bfloat16": "*bf16:16", "fp8": "*fp8e4nv:16", "int8": "*i8:16", "int4": "*u8:16"}
    scales: dict[KvFormat, str] = {"fp8": "*fp32:16", "int8": "*fp16:16", "int4": "*fp16:16"}
    for name, heads, kv_heads, rotated, norms, formats in (
        ("llama 8b", 32, 8, 128, False, tuple(codes)),
        ("qwen3 8b", 32, 8, 128, True, ("bfloat16",)),
        ("phi 4 mini", 24, 8, 96, False, ("bfloat16",)),
    ):
        for kv_format in formats:
            constants = {
                "HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": 128, "ROTATED": rotated, "HALF": 64, "BLOCK_SIZE": 16,
                "FORMAT": _FORMATS[kv_format], "QUERY_NORM": norms, "KEY_NORM": norms, "AT_A_TIME": HEADS_AT_A_TIME,
            }  # fmt: skip
            given = types | dict.fromkeys(("keys", "values"), codes[kv_format])
            absent = [] if norms else ["query_norm", "key_norm"]
            if kv_format in scales:
                given |= dict.fromkeys(("key_scales", "value_scales"), scales[kv_format])
            else:
                absent += ["key_scales", "value_scales"]
            yield Variant(
                f"rope_store {name} {kv_format}",
                _rope_store,
                {key: value for key, value in given.items() if key not in absent},
                constants | dict.fromkeys(absent),
                {"num_warps": WARPS},
                architectures=FP8_ARCHITECTURES if kv_format == "fp8" else ARCHITECTURES,
            )

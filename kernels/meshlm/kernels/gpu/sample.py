"""From logits to tokens on the device, in two launches and without a sort.

The first reads the logits once, split over the vocabulary: it applies bias and penalties, and leaves of every piece of
PIECE tokens the greatest logit and the weight. The second has one program a row: it finds the filters' thresholds
(`sample_filters`), which need only the pieces that reach them, and draws. See `kernels/sample.py` for what is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl

from meshlm.kernels.gpu.capabilities import LATEST_MAJOR, multiplies_from_shared
from meshlm.kernels.gpu.checks import ArgumentError, require, require_runs_on, require_tensor
from meshlm.kernels.gpu.configs import Config, choose
from meshlm.kernels.gpu.sample_filters import (
    LOWEST,
    cool,
    key,
    list_pieces,
    pick,
    read,
    read_listed,
    sum_above,
    threshold,
    value,
)
from meshlm.kernels.gpu.variants import ARCHITECTURES, Variant, by_config
from meshlm.kernels.sample import COLDEST, NO_TOKEN, OUTPUT, SEEN_IN_PROMPT, SampleRows

PIECE = 128  # tokens
TILE = 16  # pieces that a program of the first launch reads
MOST_VOCAB = 1 << 19
MOST_BIAS = 2048  # ids of a row: a request may have 1,024, and its stop tokens
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

_COLDEST = tl.constexpr(COLDEST)
_NO_TOKEN = tl.constexpr(NO_TOKEN)
_OUTPUT = tl.constexpr(OUTPUT)
_SEEN_IN_PROMPT = tl.constexpr(SEEN_IN_PROMPT)


def sample(
    logits: torch.Tensor,
    rows: SampleRows,
    *,
    counts: torch.Tensor | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row, (rows,) int32, and its log-probability in the model's own distribution, float32.

    logits: (rows, vocab), vocab up to 524288, of a float type; not overwritten. counts: (slots, vocab) int32, as
    `count_tokens` keeps it; without it no row is penalized. Rows with bias or penalties cost a float32 copy of the
    logits' size, if any row of the batch may have them. A row of which a logit is no number, or none is above -inf, is
    no distribution: NO_TOKEN, and a log-probability that is no number. Equal inputs give equal tokens, whatever the
    other rows are.
    Raises ArgumentError.
    """
    _check(logits, rows, counts)
    count, vocab = logits.shape
    tokens, logprobs = _outputs(logits, out)
    if count == 0:
        return tokens, logprobs
    device, tiles = logits.device, triton.cdiv(vocab, PIECE * TILE)
    pieces = max(16, triton.next_power_of_2(tiles * TILE))
    config = choose("sample", (pieces,), default_config(pieces, device_major(device)), device)
    penalizes, bias = counts is not None, _bias_width(rows)
    adjusts = penalizes or bias > 0
    piece_top, piece_weight = (torch.empty(count, tiles * TILE, device=device) for _ in range(2))
    # Each by itself: halves of one would lie where 16 divides or not, by the rows, and be compiled for twice.
    tile_top, tile_weight = (torch.empty(count, tiles, device=device) for _ in range(2))
    adjusted = torch.empty(count, dtype=torch.int32, device=device)
    worked = torch.empty(count, vocab, device=device) if adjusts else None
    _survey[(tiles, count)](
        logits, logits.stride(0), vocab, rows.temperature,
        rows.repetition, rows.presence, rows.frequency, rows.slots, counts, 0 if counts is None else len(counts),
        rows.bias_ids, rows.bias_values, 0 if rows.bias_ids is None else rows.bias_ids.shape[1],
        worked, adjusted, piece_top, piece_weight, tile_top, tile_weight,
        PENALIZES=penalizes, BIAS=bias, PIECE=PIECE, TILE=TILE, num_warps=4,
    )  # fmt: skip
    listed = torch.empty(count, pieces, dtype=torch.int32, device=device)
    found = torch.empty(count, pieces + config["CANDIDATES"], device=device)
    _choose[(count,)](
        logits, logits.stride(0), vocab, worked, adjusted, piece_top, piece_weight, tile_top, tile_weight, tiles,
        rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.uniform, listed, found, tokens, logprobs,
        ADJUSTS=adjusts, PIECE=PIECE, TILE=TILE, PIECES=pieces, TILES=triton.next_power_of_2(tiles), **config,
    )  # fmt: skip
    return tokens, logprobs


def default_config(pieces: int, major: int) -> Config:
    """Of the second launch: how many pieces it reads at a time, how many tokens it holds in registers, warps. By the
    device's major compute capability, since what fits in registers on one spills on another."""
    if not multiplies_from_shared(major):
        warps = 4 if pieces <= 256 else 16 if pieces > 1024 and major == 12 else 8
        group = 16 if 256 < pieces <= 1024 and major == 8 else 8
        return {"GROUP": group, "CANDIDATES": 2048, "num_warps": warps}
    return {"GROUP": 16, "CANDIDATES": 2048, "num_warps": 8 if pieces <= 256 else 16}


def _of_architecture(pieces: int, architecture: int) -> Config:
    return default_config(pieces, architecture // 10)


def device_major(device: torch.device) -> int:
    """Of a CPU, which interprets, the latest."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else LATEST_MAJOR


def count_tokens(counts: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor, *, prompt: bool = False) -> None:
    """Notes in `counts` (slots, vocab) int32, in place, that the sequence of slots[i] has said tokens[i], or, with
    `prompt`, that its prompt has it.

    slots, tokens: (n,) int32. A slot or a token that is not within `counts` is passed over. A new sequence's row is 0.
    """
    require_runs_on(counts.device, "counts")
    require_tensor("counts", counts, shape=(None, None), dtypes=(torch.int32,), device=counts.device)
    require_tensor("tokens", tokens, shape=(None,), dtypes=(torch.int32,), device=counts.device)
    require_tensor("slots", slots, shape=(len(tokens),), dtypes=(torch.int32,), device=counts.device)
    if len(tokens):
        _count[(triton.cdiv(len(tokens), 128),)](
            counts, counts.stride(0), *counts.shape, slots, tokens, len(tokens), PROMPT=prompt, BLOCK=128, num_warps=4
        )


def _bias_width(rows: SampleRows) -> int:
    ids = rows.bias_ids
    return 0 if ids is None or ids.shape[1] == 0 else max(16, triton.next_power_of_2(ids.shape[1]))


def _outputs(logits: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[torch.Tensor, torch.Tensor]:
    count, device = len(logits), logits.device
    if out is None:
        return torch.empty(count, dtype=torch.int32, device=device), torch.empty(count, device=device)
    require_tensor("out", out[0], shape=(count,), dtypes=(torch.int32,), device=device)
    require_tensor("out", out[1], shape=(count,), dtypes=(torch.float32,), device=device)
    return out


def _check(logits: torch.Tensor, rows: SampleRows, counts: torch.Tensor | None) -> None:
    device = logits.device
    require_runs_on(device, "logits")
    require_tensor("logits", logits, shape=(None, None), dtypes=FLOATS, device=device)
    count, vocab = logits.shape
    require(0 < vocab <= MOST_VOCAB, "logits", f"has {vocab} tokens a row, must have 1 to {MOST_VOCAB}")
    for name in ("temperature", "top_p", "min_p", "repetition", "presence", "frequency"):
        column = getattr(rows, name)
        if column is not None:
            require_tensor(f"rows.{name}", column, shape=(count,), dtypes=(torch.float32,), device=device)
    for name, dtype in (("top_k", torch.int32), ("slots", torch.int32), ("uniform", torch.float64)):
        column = getattr(rows, name)
        if column is not None:
            require_tensor(f"rows.{name}", column, shape=(count,), dtypes=(dtype,), device=device)
    penalties = (rows.repetition, rows.presence, rows.frequency)
    if counts is not None:
        require_tensor("counts", counts, shape=(None, vocab), dtypes=(torch.int32,), device=device)
        require(rows.slots is not None, "rows.slots", "is None, must be given with counts")
        require(all(p is not None for p in penalties), "rows", "needs all three penalties with counts")
    if rows.bias_ids is not None:
        require_tensor("rows.bias_ids", rows.bias_ids, shape=(count, None), dtypes=(torch.int32,), device=device)
        width = rows.bias_ids.shape[1]
        require(width <= MOST_BIAS, "rows.bias_ids", f"has {width} ids a row, must have up to {MOST_BIAS}")
        require(rows.bias_ids.is_contiguous(), "rows.bias_ids", "must be contiguous")
        values = rows.bias_values
        if values is None:
            raise ArgumentError("rows.bias_values", "is None, must be given with bias_ids")
        require_tensor("rows.bias_values", values, shape=(count, width), dtypes=(torch.float32,), device=device)
        require(values.is_contiguous(), "rows.bias_values", "must be contiguous")


@triton.jit
def _number(x):
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def _penalize(x, said, repetition, presence, frequency):
    """Of logits x, whose tokens' counts are `said`."""
    output = (said // _OUTPUT).to(tl.float32)
    scaled = tl.where(x > 0, tl.math.div_rn(x, tl.zeros_like(x) + repetition), x * repetition)
    x = tl.where(said > 0, scaled, x)
    return x - frequency * output - presence * (output > 0).to(tl.float32)


@triton.jit
def _survey(
    logits, stride, vocab, temperature, repetition, presence, frequency, slots, counts, slots_n,
    bias_ids, bias_values, bias_n, worked, adjusted, piece_top, piece_weight, tile_top, tile_weight,
    PENALIZES: tl.constexpr, BIAS: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles, rows)."""
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    tiles = tl.num_programs(0)
    logits += row * stride
    if PENALIZES or BIAS > 0:
        worked += row * vocab
    pieces = tile * TILE + tl.arange(0, TILE)
    at = pieces[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
    inside = at < vocab
    x = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
    broken = tl.sum((x != x).to(tl.int32)) > 0
    x = _number(x)
    top = tl.max(x)
    tl.store(tile_top + row * tiles + tile, tl.where(broken, float("nan"), top))  # tells the second launch
    tl.store(tile_weight + row * tiles + tile, tl.sum(tl.exp(x - tl.where(top == float("-inf"), 0.0, top))))
    if PENALIZES:
        slot = tl.load(slots + row).to(tl.int64)
        again, present, often = tl.load(repetition + row), tl.load(presence + row), tl.load(frequency + row)
        penalized = (slot >= 0) & (slot < slots_n) & ((again != 1.0) | (present != 0.0) | (often != 0.0))
        counts += slot * vocab
        counted = tl.where(penalized, vocab, 0)
        x = _penalize(x, tl.load(counts + at, mask=at < counted, other=0), again, present, often)
        changed = penalized
    if BIAS > 0:
        j = tl.arange(0, BIAS)
        ids = tl.load(bias_ids + row * bias_n + j, mask=j < bias_n, other=-1)
        if PENALIZES:
            changed = penalized | (tl.max(ids) >= 0)
        else:
            changed = tl.max(ids) >= 0
        kept = tl.where(changed, vocab, 0)
        tl.store(worked + at, x, mask=at < kept)
        tl.debug_barrier()  # these tokens' own logits come over those
        here = (ids >= tile * TILE * PIECE) & (ids < (tile + 1) * TILE * PIECE) & (ids < vocab)
        biased = _number(tl.load(logits + ids, mask=here, other=0.0).to(tl.float32))
        biased += tl.load(bias_values + row * bias_n + j, mask=here, other=0.0)
        if PENALIZES:
            said = tl.load(counts + ids, mask=here & (ids < counted), other=0)
            biased = _penalize(biased, said, again, present, often)
        tl.store(worked + ids, biased, mask=here)
        tl.debug_barrier()
        x = tl.where(at < kept, tl.load(worked + at, mask=at < kept, other=0.0), x)
    elif PENALIZES:
        tl.store(worked + at, x, mask=at < counted)
    if PENALIZES or BIAS > 0:
        tl.store(adjusted + row, changed.to(tl.int32))
    heat = tl.load(temperature + row)
    x = cool(x, tl.where(heat > 0, tl.maximum(heat, _COLDEST), 1.0))
    top = tl.max(x, 1)
    weight = tl.sum(tl.exp(x - tl.where(top == float("-inf"), 0.0, top)[:, None]), 1)
    tl.store(piece_top + row * tiles * TILE + pieces, top)
    tl.store(piece_weight + row * tiles * TILE + pieces, weight)


@triton.jit
def _choose(
    logits, stride, vocab, worked, adjusted, piece_top, piece_weight, tile_top, tile_weight, tiles,
    temperature, top_k, top_p, min_p, uniform, listed, found, tokens, logprobs,
    ADJUSTS: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr, PIECES: tl.constexpr, TILES: tl.constexpr,
    GROUP: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Grid: (rows,)."""
    number = tl.program_id(0).to(tl.int64)
    heat = tl.load(temperature + number)
    cooled = tl.where(heat > 0, tl.maximum(heat, _COLDEST), 1.0)
    logits += number * stride
    if ADJUSTS:
        row = (logits, worked + number * vocab, tl.load(adjusted + number), cooled)
    else:
        row = (logits, logits, 0, cooled)
    listed += number * PIECES
    masses = found + number * (PIECES + CANDIDATES)
    found = masses + PIECES
    j = tl.arange(0, PIECES)
    greatest = tl.load(piece_top + number * tiles * TILE + j, mask=j < tiles * TILE, other=float("-inf"))
    top = tl.max(greatest)
    k = tl.arange(0, TILES)
    tops = tl.load(tile_top + number * tiles + k, mask=k < tiles, other=float("-inf"))
    broken = (tl.sum((tops != tops).to(tl.int32)) > 0) | (top == float("-inf"))
    if broken:
        token = tl.full([], _NO_TOKEN, tl.int32)
    elif heat <= 0:
        first = tl.min(tl.where(greatest == top, j, PIECES))
        at = first * PIECE + tl.arange(0, PIECE)
        x = read(row, vocab, at, at >= 0, ADJUSTS)
        token = tl.min(tl.where((x == top) & (at < vocab), at, vocab - 1))
    else:
        mass = tl.load(piece_weight + number * tiles * TILE + j, mask=j < tiles * TILE, other=0.0)
        mass *= tl.exp(greatest - top)
        floor = _floor(
            row, vocab, greatest, mass, top, tl.load(top_k + number), tl.load(top_p + number), tl.load(min_p + number),
            listed, found, ADJUSTS, PIECE, PIECES, GROUP, CANDIDATES,
        )  # fmt: skip
        if floor > LOWEST:
            n = list_pieces(greatest >= value(floor), listed, PIECES)
            for begin in range(0, n, GROUP):
                x = read_listed(row, vocab, listed, begin, n, ADJUSTS, PIECE, GROUP)
                kept = tl.sum(tl.where(x >= value(floor), tl.exp(x - top), 0.0), 1)
                tl.store(masses + begin + tl.arange(0, GROUP), kept, mask=begin + tl.arange(0, GROUP) < n)
            tl.debug_barrier()
            mass = tl.load(masses + j, mask=j < n, other=0.0)
            j = tl.load(listed + j, mask=j < n, other=0)
        token = pick(row, vocab, top, floor, mass, j, tl.load(uniform + number), ADJUSTS, PIECE, PIECES)
    tl.store(tokens + number, token)
    top = tl.max(tops)
    weights = tl.load(tile_weight + number * tiles + k, mask=k < tiles, other=0.0) * tl.exp(tops - top)
    own = tl.load(logits + tl.maximum(token, 0)).to(tl.float32)
    logprob = own - (top + tl.log(tl.sum(weights)))
    tl.store(logprobs + number, tl.where(broken, float("nan"), logprob))


@triton.jit
def _floor(
    row, vocab, greatest, mass, top, top_k, top_p, min_p, listed, found,
    ADJUSTS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, GROUP: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """The key of the least logit that min-p, top-k and top-p leave in; LOWEST where all stay."""
    floor = tl.zeros_like(key(top)) + LOWEST
    if min_p > 0:
        floor = key(top + tl.log(min_p))
    if (top_k > 0) & (top_k < vocab):
        least = threshold(
            row, vocab, greatest, top, tl.maximum(floor - 1, LOWEST), top_k.to(tl.float32), listed, found,
            False, ADJUSTS, PIECE, PIECES, GROUP, CANDIDATES,
        )  # fmt: skip
        floor = tl.maximum(floor, least)
    if top_p < 1:
        whole = tl.sum(mass)
        if floor > LOWEST:
            n = list_pieces(greatest >= value(floor), listed, PIECES)
            _, whole = sum_above(row, vocab, listed, n, top, value(floor - 1), ADJUSTS, PIECE, GROUP)
        least = threshold(
            row, vocab, greatest, top, tl.maximum(floor - 1, LOWEST), tl.maximum(top_p * whole, 1e-30), listed, found,
            True, ADJUSTS, PIECE, PIECES, GROUP, CANDIDATES,
        )  # fmt: skip
        floor = tl.maximum(floor, least)
    return floor


@triton.jit
def _count(
    counts, stride, slots_n, vocab, slots, tokens, n, PROMPT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + at, mask=at < n, other=-1).to(tl.int64)
    token = tl.load(tokens + at, mask=at < n, other=-1)
    known = (slot >= 0) & (slot < slots_n) & (token >= 0) & (token < vocab)
    if PROMPT:
        tl.atomic_or(counts + slot * stride + token, _SEEN_IN_PROMPT, mask=known)
    else:
        tl.atomic_add(counts + slot * stride + token, _OUTPUT, mask=known)


def variants() -> Iterator[Variant]:
    """Vocabularies of 32,000, 128,256 (Llama 3) and 262,144 (Gemma), with and without penalties and bias."""
    rows = dict.fromkeys(("temperature", "top_p", "min_p", "repetition", "presence", "frequency"), "*fp32:16")
    types = rows | {
        "stride": "i32:16", "vocab": "i32:16", "slots_n": "i32", "bias_n": "i32:16", "tiles": "i32", "n": "i32",
        "top_k": "*i32:16", "uniform": "*fp64:16", "tokens": "*i32:16", "slots": "*i32:16", "counts": "*i32:16",
        "bias_ids": "*i32:16", "adjusted": "*i32:16", "listed": "*i32:16",
    }  # fmt: skip
    for name in ("bias_values", "worked", "found", "logprobs", "piece_top", "piece_weight", "tile_top", "tile_weight"):
        types[name] = "*fp32:16"
    sizes = {"PIECE": PIECE, "TILE": TILE}
    for dtype, vocabs in (("fp32", (32_000, 128_256, 262_144)), ("bf16", (128_256,))):
        of_dtype = types | {"logits": f"*{dtype}:16"}
        for adjusts, bias in ((False, 0), (True, 16), (True, 512)):
            absent = {} if adjusts else dict.fromkeys(("slots", "counts", "bias_ids", "bias_values", "worked"))
            constants = sizes | absent | {"PENALIZES": adjusts, "BIAS": bias}
            name = f"sample survey {dtype}" + (f" penalties bias {bias}" if adjusts else "")
            yield Variant(name, _survey, of_dtype, constants, {"num_warps": 4})
        for vocab in vocabs:
            pieces = triton.next_power_of_2(triton.cdiv(vocab, PIECE * TILE) * TILE)
            for suffix, config, served in by_config(ARCHITECTURES, partial(_of_architecture, pieces)):
                options = {"num_warps": config.pop("num_warps")}
                for adjusts in (False, True):
                    constants = sizes | config | {"PIECES": pieces, "TILES": pieces // TILE, "ADJUSTS": adjusts}
                    absent = {} if adjusts else {"worked": None}
                    name = f"sample choose {dtype} {vocab}{' adjusted' if adjusts else ''}{suffix}"
                    yield Variant(name, _choose, of_dtype, constants | absent, options, architectures=served)
    for prompt in (False, True):
        name = "sample count " + ("prompt" if prompt else "output")
        yield Variant(name, _count, types, {"PROMPT": prompt, "BLOCK": 128}, {"num_warps": 4}, hot=not prompt)

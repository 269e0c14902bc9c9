"""Low-rank adapters of mixed ranks in one batch: the two products of SGMV (Chen et al. 2023, arXiv:2310.18547).

Rows are brought together by adapter on the device, see `moe_align.align`. `lora_shrink` takes them to their adapters'
ranks, `lora_expand` from there to the width and adds them to what the base projection has computed. Both do work for
the ranks that there are, in steps of 16: none is padded to the largest. What is launched follows from shapes alone, and
sums have one order: the same rows give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from meshlm.kernels.gpu.checks import require, require_runs_on, require_tensor
from meshlm.kernels.gpu.configs import Config, choose
from meshlm.kernels.gpu.dot import dot
from meshlm.kernels.gpu.matmul_launch import Routed
from meshlm.kernels.gpu.moe_align import align
from meshlm.kernels.gpu.variants import Variant
from meshlm.kernels.lora import LowRank

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LEAST_RANK, MOST_RANK = 8, 128
RANKS = tl.constexpr(16)  # of an adapter at a time
_PROGRAMS = 256  # of a launch, from which on the columns need not be split
_MOST_SPLITS = 8


@dataclass(frozen=True, slots=True)
class AdapterTable:
    """Where the matrices of the adapters lie, of projections that share their input, such as queries, keys and values.

    down, up: (elements,) of one float type: of each adapter and projection (rank, cols) and (width, rank), rows beside
        one another.
    down_starts, up_starts: (adapters, projections) int64, elements, multiples of 8.
    ranks: (adapters, projections) int32, multiples of 8; 0 where an adapter leaves a projection as it is.
    scales: (adapters, projections) float32.
    columns: (projections + 1,) int32, where the outputs of the projections begin, and where the last ends.
    cols: of the input. widths: of the projections, multiples of 8. most_rank: a bound of all ranks.
    """

    down: torch.Tensor
    up: torch.Tensor
    down_starts: torch.Tensor
    up_starts: torch.Tensor
    ranks: torch.Tensor
    scales: torch.Tensor
    columns: torch.Tensor
    cols: int
    widths: tuple[int, ...]
    most_rank: int

    @property
    def adapters(self) -> int:
        return self.ranks.shape[0]


def build_adapter_table(
    adapters: Sequence[Sequence[LowRank | None]],
    *,
    cols: int,
    widths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    most_rank: int | None = None,
) -> AdapterTable:
    """The adapters' matrices copied into a table of `dtype` on `device`.

    adapters: at least one; of each, what it adds to each projection, or None. cols: of the input; widths: of the
    projections; all multiples of 8. most_rank: None is the largest there is; more is for graphs that outlive this
    table. Raises ArgumentError.
    """
    require(len(adapters) > 0, "adapters", "has none")
    require(cols > 0 and cols % 8 == 0, "cols", f"is {cols}, must be a multiple of 8")
    known = len(widths) > 0 and all(width > 0 and width % 8 == 0 for width in widths)
    require(known, "widths", f"is {tuple(widths)}, must be multiples of 8")
    require(dtype in FLOATS, "dtype", f"is {dtype}, must be float32, float16 or bfloat16")
    shape = (len(adapters), len(widths))
    ranks, scales = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape)
    starts = torch.zeros(2, *shape, dtype=torch.int64)
    parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    ends = [0, 0]
    for adapter, projections in enumerate(adapters):
        require(len(projections) == len(widths), "adapters", f"has {len(projections)} projections, not {len(widths)}")
        for index, added in enumerate(projections):
            if added is None:
                continue
            _check_low_rank(added, cols, widths[index])
            ranks[adapter, index], scales[adapter, index] = added.rank, added.scale
            for which, matrix in enumerate((added.down, added.up)):
                starts[which, adapter, index] = ends[which]
                ends[which] += matrix.numel()
                parts[which].append(matrix.to(device, dtype).reshape(-1))
    largest = int(ranks.max())
    bound = max(largest, LEAST_RANK) if most_rank is None else most_rank
    require(largest <= bound <= MOST_RANK, "most_rank", f"is {bound}, must be {largest} to {MOST_RANK}")
    down, up = (torch.cat(part) if part else torch.zeros(8, dtype=dtype, device=device) for part in parts)
    columns = torch.tensor([0, *widths]).cumsum(0).to(device, torch.int32)
    down_starts, up_starts, ranks, scales = (part.to(device) for part in (*starts, ranks, scales))
    return AdapterTable(down, up, down_starts, up_starts, ranks, scales, columns, cols, tuple(widths), bound)


def _check_low_rank(added: LowRank, cols: int, width: int) -> None:
    down, up, rank = tuple(added.down.shape), tuple(added.up.shape), added.rank
    fits = down == (rank, cols) and up == (width, rank)
    require(fits, "adapters", f"has {down} and {up}, must be (rank, {cols}) and ({width}, rank)")
    known = rank % 8 == 0 and LEAST_RANK <= rank <= MOST_RANK
    require(known, "adapters", f"has rank {rank}, must be a multiple of 8 from {LEAST_RANK} to {MOST_RANK}")


def rows_by_adapter(rows: torch.Tensor, table: AdapterTable) -> Routed:
    """The rows of a batch by their adapters, once a step for all layers. No sync with the device.

    rows: (rows,) int32, of each row its adapter; a number that the table does not have is none. Raises ArgumentError.
    """
    require_runs_on(rows.device, "rows")
    require_tensor("rows", rows, shape=(None,), dtypes=(torch.int32,), device=table.ranks.device)
    return align(rows.unsqueeze(1), table.adapters)


def lora(x: torch.Tensor, table: AdapterTable, routed: Routed, out: torch.Tensor) -> torch.Tensor:
    """Adds to each row of `out` what its adapter makes of its row of `x`; rows without an adapter are not touched.

    x: (rows, cols) of the table's type; routed: see `rows_by_adapter`; out: (rows, sum of widths) of the same type,
    what the base projections have computed. Rows may lie apart. Sums are of float32; what lies between the products is
    rounded to the table's type. Returns `out`. Raises ArgumentError.
    """
    return lora_expand(lora_shrink(x, table, routed), table, routed, out)


def lora_shrink(x: torch.Tensor, table: AdapterTable, routed: Routed) -> torch.Tensor:
    """(splits, projections, rows, most_rank) float32, to be summed over the splits: each row times its adapter's
    `down`. What is beyond an adapter's rank, or of no adapter, is undefined. As in `lora`."""
    require_runs_on(x.device, "x")
    require_tensor("x", x, shape=(None, table.cols), dtypes=(table.down.dtype,), device=table.down.device)
    rows, cols = x.shape
    require(routed.pairs == rows, "routed", f"is of {routed.pairs} rows, x has {rows}")
    projections, blocks = len(table.widths), len(routed.experts)
    tiles = triton.cdiv(table.most_rank, RANKS.value)
    key = (cols, table.most_rank, projections, routed.block, triton.next_power_of_2(max(rows, 1)))
    programs = triton.cdiv(rows, routed.block) * projections * tiles
    config = choose("lora_shrink", key, shrink_config(programs, cols, routed.block), x.device)
    steps = triton.cdiv(triton.cdiv(cols, config["STEP"]), config["splits"])
    shrunk = x.new_empty(config["splits"], projections, rows, table.most_rank, dtype=torch.float32)
    if rows:
        _shrink[(blocks, projections * tiles, config["splits"])](
            x, x.stride(0), routed.order, routed.experts, table.down, table.down_starts, table.ranks, shrunk,
            rows, cols, steps, projections,
            TILES=tiles, MOST_RANK=table.most_rank, BLOCK=routed.block, STEP=config["STEP"],
            EVEN=cols % config["STEP"] == 0, num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip
    return shrunk


def lora_expand(shrunk: torch.Tensor, table: AdapterTable, routed: Routed, out: torch.Tensor) -> torch.Tensor:
    """Adds to each row of `out` its row of `shrunk` times its adapter's `up` and scale. As in `lora`."""
    require_runs_on(out.device, "out")
    rows, projections = routed.pairs, len(table.widths)
    device = table.up.device
    require_tensor("out", out, shape=(rows, sum(table.widths)), dtypes=(table.up.dtype,), device=device)
    shape = (None, projections, rows, table.most_rank)
    require_tensor("shrunk", shrunk, shape=shape, dtypes=(torch.float32,), device=device)
    require(shrunk.is_contiguous(), "shrunk", "must be contiguous")
    width = max(table.widths)
    key = (width, table.most_rank, projections, routed.block, triton.next_power_of_2(max(rows, 1)))
    config = choose("lora_expand", key, expand_config(routed.block), device)
    if rows:
        _expand[(len(routed.experts), triton.cdiv(width, config["COLUMNS"]), projections)](
            shrunk, routed.order, routed.experts, table.up, table.up_starts, table.ranks, table.scales, table.columns,
            out, out.stride(0), rows,
            SPLITS=len(shrunk), MOST_RANK=table.most_rank, BLOCK=routed.block, COLUMNS=config["COLUMNS"],
            num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip
    return out


def shrink_config(programs: int, cols: int, block: int) -> Config:
    """Columns are split where a launch would have few programs. programs: without splits, if all adapters of a batch
    are one and its rank is the largest."""
    splits = max(1, min(_MOST_SPLITS, _PROGRAMS // max(programs, 1), cols // 256))
    tall = block > 32
    return {"STEP": 64 if tall else 128, "splits": splits, "num_warps": 4, "num_stages": 3 if tall else 4}


def expand_config(block: int) -> Config:
    """So that a thread holds 16 to 32 elements of the output."""
    return {"COLUMNS": 64 if block > 64 else 128, "num_warps": 8 if block > 32 else 4, "num_stages": 2}


@triton.jit
def _shrink(
    x, x_stride, order, owners, down, down_starts, ranks, shrunk, rows, cols, steps, projections,
    TILES: tl.constexpr, MOST_RANK: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of rows, projections * TILES of ranks, splits of the columns)."""
    block, part, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    projection = part // TILES
    adapter = tl.load(owners + block)
    if adapter < 0:
        return
    entry = adapter * projections + projection
    rank = tl.load(ranks + entry)
    r = part % TILES * RANKS + tl.arange(0, RANKS)
    if part % TILES * RANKS >= rank:
        return
    row = tl.load(order + block * BLOCK + tl.arange(0, BLOCK))
    start = tl.multiple_of(tl.load(down_starts + entry), 8)
    k = tl.arange(0, STEP)
    x_rows = x + row.to(tl.int64)[:, None] * x_stride
    down_rows = down + start + r[None, :] * cols
    valid, exists = (row < rows)[:, None], (r < rank)[None, :]
    acc = tl.zeros([BLOCK, RANKS], tl.float32)
    for step in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(cols, STEP))):
        at = step * STEP + k
        x_mask = valid if EVEN else valid & (at < cols)[None, :]
        down_mask = exists if EVEN else exists & (at < cols)[:, None]
        tile = tl.load(x_rows + at[None, :], mask=x_mask, other=0.0)
        acc = dot(tile, tl.load(down_rows + at[:, None], mask=down_mask, other=0.0), acc)
    place = ((split * projections + projection) * rows + row).to(tl.int64) * MOST_RANK
    tl.store(shrunk + place[:, None] + r[None, :], acc, mask=valid & exists)


@triton.jit
def _expand(
    shrunk, order, owners, up, up_starts, ranks, scales, columns, out, out_stride, rows,
    SPLITS: tl.constexpr, MOST_RANK: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of rows, tiles of the widest projection's columns, projections)."""
    block, projection, projections = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    adapter = tl.load(owners + block)
    if adapter < 0:
        return
    entry = adapter * projections + projection
    rank = tl.multiple_of(tl.load(ranks + entry), 8)
    first = tl.multiple_of(tl.load(columns + projection), 8)
    width = tl.multiple_of(tl.load(columns + projection + 1) - first, 8)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if rank == 0 or tl.program_id(1) * COLUMNS >= width:
        return
    row = tl.load(order + block * BLOCK + tl.arange(0, BLOCK))
    valid, exists = (row < rows)[:, None], (n < width)[None, :]
    start = tl.multiple_of(tl.load(up_starts + entry), 8)
    up_rows = up + start + n.to(tl.int64)[None, :] * rank
    acc = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for begin in range(0, rank, RANKS):
        r = begin + tl.arange(0, RANKS)
        inside = r < rank
        low = tl.zeros([BLOCK, RANKS], tl.float32)
        for split in tl.static_range(SPLITS):
            place = ((split * projections + projection) * rows + row).to(tl.int64) * MOST_RANK
            low += tl.load(shrunk + place[:, None] + r[None, :], mask=valid & inside[None, :], other=0.0)
        tile = tl.load(up_rows + r[:, None], mask=exists & inside[:, None], other=0.0)
        acc = dot(low.to(tile.dtype), tile, acc)
    place = out + row.to(tl.int64)[:, None] * out_stride + (first + n)[None, :]
    base = tl.load(place, mask=valid & exists, other=0.0).to(tl.float32)
    tl.store(place, (base + tl.load(scales + entry) * acc).to(out.dtype.element_ty), mask=valid & exists)


def variants() -> Iterator[Variant]:
    """Queries, keys and values of Llama 3 8B, of a few rows and of prefill, and its down projection."""
    types = dict.fromkeys(("x", "down", "up", "out"), "*bf16:16")
    types |= dict.fromkeys(("order", "owners", "ranks", "columns"), "*i32:16")
    types |= dict.fromkeys(("down_starts", "up_starts"), "*i64:16") | dict.fromkeys(("shrunk", "scales"), "*fp32:16")
    types |= dict.fromkeys(("x_stride", "out_stride", "cols"), "i32:16") | dict.fromkeys(("rows", "steps"), "i32")
    for name, cols, projections in (("qkv", 4096, 3), ("down", 14336, 1)):
        for block in (16, 64, 128) if name == "qkv" else (16,):
            filled = projections * 4 * (1 if block == 16 else 16)
            config = dict(shrink_config(filled, cols, block))
            splits, step = config.pop("splits"), config.pop("STEP")
            constants = {"MOST_RANK": 64, "BLOCK": block}
            given = types | ({"projections": "i32"} if projections > 1 else {})
            single = {} if projections > 1 else {"projections": 1}
            shrink = constants | {"TILES": 4, "STEP": step, "EVEN": True} | single
            yield Variant(f"lora_shrink {name} {block} rows", _shrink, given, shrink, config)
            if name == "qkv":
                config = dict(expand_config(block))
                expand = constants | {"SPLITS": splits, "COLUMNS": config.pop("COLUMNS")}
                yield Variant(f"lora_expand {block} rows", _expand, given, expand, config)

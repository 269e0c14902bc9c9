"""Attention over a context that is cut into parts, each by a program of its own, and merged by a second, small launch
(flash-decoding, Dao et al. 2023; the merge by log-sum-exp is that of Rabe & Staats 2021, arXiv:2112.05682)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import triton
import triton.language as tl

from meshlm.kernels.gpu.variants import Variant

MOST_SPLITS = 128
LEAST_TILES = 4  # of a part: shorter ones are not worth a program
LONGEST_TILES = 512  # of a part, so that one long context among many does not keep the rest waiting

Parts = tuple[torch.Tensor, torch.Tensor]


def split_count(programs: int, tiles: int, processors: int, waves: int) -> int:
    """Into how many parts to cut each context, of at most `tiles` tiles, where there are `programs` without a cut.

    Enough for `waves` programs on each of the device's processors. It follows from shapes alone; a context that is
    shorter than what its table has room for leaves the last programs without work.
    """
    wanted = -(-waves * processors // max(1, programs))
    longest = -(-tiles // LONGEST_TILES)
    return max(1, min(max(wanted, longest), -(-tiles // LEAST_TILES), MOST_SPLITS))


@cache
def processors_of(device: torch.device) -> int:
    """Streaming multiprocessors; 1 of a CPU, which gains nothing from a cut."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) of a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def empty_parts(rows: int, heads: int, splits: int, head_dim: int, device: torch.device) -> Parts:
    """What the programs leave for the merge: outputs (rows, heads, splits, head_dim), and the base-2 logarithms of
    their weights' sums (rows, heads, splits), -inf where a part is empty and its output not written; both float32."""
    outputs = torch.empty(rows, heads, splits, head_dim, dtype=torch.float32, device=device)
    return outputs, torch.empty(rows, heads, splits, dtype=torch.float32, device=device)


def merge(parts: Parts, out: torch.Tensor) -> None:
    """Writes out, (rows, heads, head_dim), from `empty_parts` filled. Rows without a part are 0."""
    outputs, sums = parts
    rows, heads, splits, head_dim = outputs.shape
    _merge[(rows, heads)](
        out, out.stride(0), out.stride(1), outputs, sums, splits,
        HEAD_DIM=head_dim, **_launch(head_dim),
    )  # fmt: skip


def _launch(head_dim: int) -> dict[str, int]:
    return {"WIDTH": int(triton.next_power_of_2(head_dim)), "CHUNK": 8, "num_warps": 4}


@triton.jit(do_not_specialize=["splits"])
def _merge(
    out, row_stride, head_stride, outputs, sums, splits,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = (row * tl.num_programs(1) + head) * splits
    columns = tl.arange(0, WIDTH)
    largest, total = float("-inf"), 0.0
    merged = tl.zeros([WIDTH], tl.float32)
    for begin in range(0, splits, CHUNK):
        numbers = begin + tl.arange(0, CHUNK)
        logs = tl.load(sums + first + numbers, mask=numbers < splits, other=float("-inf"))
        mask = (logs > float("-inf"))[:, None] & (columns < HEAD_DIM)[None, :]
        parts = tl.load(outputs + (first + numbers)[:, None] * HEAD_DIM + columns[None, :], mask=mask, other=0.0)
        raised = tl.maximum(largest, tl.max(logs, 0))
        anchor = tl.where(raised == float("-inf"), 0.0, raised)
        weights, factor = tl.exp2(logs - anchor), tl.exp2(largest - anchor)
        merged = merged * factor + tl.sum(parts * weights[:, None], 0)
        total = total * factor + tl.sum(weights, 0)
        largest = raised
    merged = merged / tl.where(total == 0.0, 1.0, total)
    target = out + row * row_stride + head * head_stride + columns
    tl.store(target, merged.to(out.dtype.element_ty), mask=columns < HEAD_DIM)


def variants() -> Iterator[Variant]:
    for head_dim in (64, 96, 128, 256):
        launch = _launch(head_dim)
        options = {"num_warps": launch.pop("num_warps")}
        types = {"out": "*bf16:16", "row_stride": "i32:16", "head_stride": "i32:16", "splits": "i32"}
        types |= dict.fromkeys(("outputs", "sums"), "*fp32:16")
        yield Variant(f"attention_merge/{head_dim}", _merge, types, {"HEAD_DIM": head_dim, **launch}, options)

"""Adapters of mixed ranks in one batch: each row meets its own adapter, and one without keeps its bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from meshlm.kernels.gpu.checks import ArgumentError
from meshlm.kernels.gpu.lora import (
    AdapterTable,
    build_adapter_table,
    lora,
    lora_expand,
    lora_shrink,
    rows_by_adapter,
    shrink_config,
)
from meshlm.kernels.lora import LowRank, reference_lora
from tests.kernels.gpu.attention_cases import relative_error

# float16: what lies between the products is rounded, and so is the sum
NEAR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def made_adapters(
    ranks: Sequence[Sequence[int]], cols: int, widths: Sequence[int], dtype: torch.dtype, device: torch.device
) -> list[list[LowRank | None]]:
    """Random ones, which add about as much as there is; rank 0 is none."""

    def one(rank: int, width: int) -> LowRank | None:
        if rank == 0:
            return None
        down, up = torch.randn(rank, cols, device=device), torch.randn(width, rank, device=device)
        return LowRank((down * cols**-0.5).to(dtype), (up * rank**-0.5).to(dtype), 0.5 + rank / 16)

    return [[one(rank, width) for rank, width in zip(row, widths, strict=True)] for row in ranks]


def poisoned(table: AdapterTable) -> AdapterTable:
    """The same table between matrices that are no numbers: what is read beyond an adapter's own shows."""
    around = torch.full((64,), torch.nan, dtype=table.down.dtype, device=table.down.device)
    return AdapterTable(
        torch.cat([around, table.down, around]),
        torch.cat([around, table.up, around]),
        table.down_starts + 64,
        table.up_starts + 64,
        table.ranks,
        table.scales,
        table.columns,
        table.cols,
        table.widths,
        table.most_rank,
    )


def int32(values: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.integers(-1, 3), min_size=1, max_size=20),
    cols=st.sampled_from([8, 64, 136, 264]),
    widths=st.sampled_from([(8,), (136,), (40, 24, 24)]),
    seed=st.integers(0, 99),
)
def test_each_row_meets_its_own_adapter(
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    rows: list[int],
    cols: int,
    widths: tuple[int, ...],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    ranks = torch.tensor([0, 8, 16, 24, 64, 128])[torch.randint(6, (4, len(widths)))].tolist()
    adapter_of = int32(rows, device)
    for dtype in dtypes:
        adapters = made_adapters(ranks, cols, widths, dtype, device)
        table = poisoned(build_adapter_table(adapters, cols=cols, widths=widths, dtype=dtype, device=device))
        x = torch.randn(len(rows), cols + 8, device=device).to(dtype)[:, :cols]  # rows lie apart
        out = torch.randn(len(rows), sum(widths) + 8, device=device).to(dtype)[:, : sum(widths)]
        expected = reference_lora(x, adapter_of, adapters, out, widths)
        before = out.clone()
        assert lora(x, table, rows_by_adapter(adapter_of, table), out) is out
        assert relative_error(out, expected) < NEAR[dtype]
        assert torch.equal(out[adapter_of < 0], before[adapter_of < 0])


@pytest.mark.parametrize("count", [70, 200])
def test_rows_of_one_adapter_fill_larger_blocks(device: torch.device, count: int) -> None:
    adapters = made_adapters([[24], [8]], 72, (40,), torch.float32, device)
    table = build_adapter_table(adapters, cols=72, widths=(40,), dtype=torch.float32, device=device)
    adapter_of = int32([1, *[0] * (count - 3), -1, 1], device)
    routed = rows_by_adapter(adapter_of, table)
    assert routed.block > 16
    x, out = torch.randn(count, 72, device=device), torch.randn(count, 40, device=device)
    expected = reference_lora(x, adapter_of, adapters, out, (40,))
    assert relative_error(lora(x, table, routed, out), expected) < NEAR[torch.float32]


def test_columns_that_are_split_are_summed_and_the_bits_are_the_same_again(device: torch.device) -> None:
    cols = 1096  # the last split has less than the others
    adapters = made_adapters([[8], [40]], cols, (16,), torch.float32, device)
    table = build_adapter_table(adapters, cols=cols, widths=(16,), dtype=torch.float32, device=device)
    adapter_of = int32([1, 0, 1], device)
    routed = rows_by_adapter(adapter_of, table)
    x, out = torch.randn(3, cols, device=device), torch.zeros(3, 16, device=device)
    shrunk = lora_shrink(x, table, routed)
    assert shrunk.shape == (4, 1, 3, 40)
    down = adapters[1][0].down.double()  # type: ignore[union-attr]
    assert relative_error(shrunk[:, 0, [0, 2], :].sum(0), x[[0, 2]].double() @ down.t()) < 2e-6
    again = lora_expand(lora_shrink(x, table, routed), table, routed, torch.zeros_like(out))
    assert torch.equal(lora_expand(shrunk, table, routed, out), again)


def test_a_row_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    adapters = made_adapters([[16], [8], [24]], 64, (32,), torch.float32, device)
    table = build_adapter_table(adapters, cols=64, widths=(32,), dtype=torch.float32, device=device)
    x = torch.randn(6, 64, device=device)
    made = [
        lora(x, table, rows_by_adapter(int32(rows, device), table), torch.zeros(6, 32, device=device))[2]
        for rows in ([0, 1, 2, 0, 1, 2], [2, 2, 2, -1, -1, 0])
    ]
    assert torch.equal(*made)


def test_an_adapter_that_the_table_does_not_have_adds_nothing(device: torch.device) -> None:
    adapters = made_adapters([[8], [0]], 8, (8,), torch.float32, device)
    table = build_adapter_table(adapters, cols=8, widths=(8,), dtype=torch.float32, device=device, most_rank=64)
    assert table.most_rank == 64
    out = torch.randn(4, 8, device=device)
    before = out.clone()
    lora(torch.randn(4, 8, device=device), table, rows_by_adapter(int32([2, -1, 1, 1 << 30], device), table), out)
    assert torch.equal(out, before)
    none = rows_by_adapter(int32([], device), table)
    assert lora(torch.zeros(0, 8, device=device), table, none, torch.zeros(0, 8, device=device)).shape == (0, 8)


def test_columns_are_split_where_programs_are_few() -> None:
    assert shrink_config(1, 4096, 16)["splits"] == 8
    assert shrink_config(64, 4096, 16)["splits"] == 4
    assert shrink_config(512, 4096, 64)["splits"] == 1
    assert shrink_config(1, 64, 16)["splits"] == 1


def test_what_it_cannot_work_with_is_named(device: torch.device) -> None:
    def table(adapters: Any = None, **change: Any) -> AdapterTable:
        known = made_adapters([[8, 16]], 16, (8, 24), torch.float32, device)
        wanted = {"cols": 16, "widths": (8, 24), "dtype": torch.float32, "device": device} | change
        return build_adapter_table(known if adapters is None else adapters, **wanted)

    def low_rank(rank: int, width: int) -> LowRank:
        return LowRank(torch.zeros(rank, 16), torch.zeros(width, rank))

    good = table()
    routed = rows_by_adapter(int32([0, 0, -1], device), good)
    x, out = torch.zeros(3, 16, device=device), torch.zeros(3, 32, device=device)
    shrunk = lora_shrink(x, good, routed)
    cases = {
        "adapters": [
            lambda: table([]),
            lambda: table([[low_rank(8, 8)]]),
            lambda: table([[low_rank(12, 8), None]]),
            lambda: table([[low_rank(136, 8), None]]),
            lambda: table([[low_rank(8, 9), None]]),
        ],
        "cols": [lambda: table(cols=12)],
        "widths": [lambda: table(widths=(8, 0)), lambda: table(widths=(8, 12)), lambda: table([[]], widths=())],
        "dtype": [lambda: table(dtype=torch.float64)],
        "most_rank": [lambda: table(most_rank=8), lambda: table(most_rank=256)],
        "rows": [lambda: rows_by_adapter(torch.zeros(3, dtype=torch.int64, device=device), good)],
        "x": [lambda: lora(x.half(), good, routed, out), lambda: lora(x[:, :8], good, routed, out)],
        "routed": [lambda: lora(x[:2], good, routed, out[:2])],
        "out": [lambda: lora(x, good, routed, out[:, :31]), lambda: lora(x, good, routed, out.half())],
        "shrunk": [lambda: lora_expand(shrunk[..., :8], good, routed, out)],
    }
    for argument, calls in cases.items():
        for call in calls:
            with pytest.raises(ArgumentError) as caught:
                call()
            assert caught.value.argument == argument

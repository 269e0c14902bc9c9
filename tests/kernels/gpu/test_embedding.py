from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from meshlm.kernels.embedding import reference_embedding
from meshlm.kernels.gpu.checks import ArgumentError
from meshlm.kernels.gpu.embedding import embedding
from meshlm.kernels.gpu.matrix import pack, unpack
from tests.kernels.gpu.attention_cases import relative_error, tolerance

TOKENS = [3, 0, 96, 3, -1, 97, 50]  # the last row of the table, one that comes twice, and two that it does not have


def tokens(device: torch.device) -> torch.Tensor:
    return torch.tensor(TOKENS, dtype=torch.int32, device=device)


@pytest.mark.parametrize("width", [1, 96, 1100])
def test_rows_of_a_dense_table(device: torch.device, dtypes: tuple[torch.dtype, ...], width: int) -> None:
    torch.manual_seed(width)
    table = torch.randn(97, width, device=device)
    for dtype in dtypes:
        out = embedding(tokens(device), table.to(dtype), scale=1.5, dtype=dtype)
        expected = reference_embedding(tokens(device), table.to(dtype), 1.5)
        assert out.dtype == dtype
        assert relative_error(out, expected) < tolerance(dtype)


@pytest.mark.parametrize(
    "packing",
    [
        {"format": "int4"},
        {"format": "int4", "minimum": True, "group": 64},
        {"format": "int8", "group": 32},
        {"format": "int8"},
        {"format": "fp8"},
    ],
    ids=str,
)
@pytest.mark.parametrize("width", [32, 96, 1100])
def test_rows_of_a_quantized_table(device: torch.device, width: int, packing: dict[str, Any]) -> None:
    torch.manual_seed(width)
    matrix = pack(torch.randn(97, width, device=device), **packing)
    out = embedding(tokens(device), matrix, scale=0.5, dtype=torch.float32)
    assert relative_error(out, reference_embedding(tokens(device), unpack(matrix), 0.5)) < 1e-6


def test_a_part_of_a_quantized_table_is_read_by_its_strides(device: torch.device) -> None:
    whole = pack(torch.randn(97, 96, device=device), "int4", minimum=True)
    assert whole.minimums is not None
    part = replace(whole, codes=whole.codes[32:64], scales=whole.scales[:, 32:64], minimums=whole.minimums[:, 32:64])
    chosen = torch.tensor([31, 0], dtype=torch.int32, device=device)
    out = embedding(chosen, part, dtype=torch.float32)
    torch.testing.assert_close(out, unpack(whole)[[63, 32]])
    with pytest.raises(ArgumentError, match="matrix: has scales"):
        embedding(chosen, replace(part, minimums=whole.minimums[:, 32:64].contiguous()))
    with pytest.raises(ArgumentError, match="matrix: has a stride"):
        embedding(chosen, replace(part, scales=whole.scales[:, ::2]))


def test_bad_arguments_are_named(device: torch.device) -> None:
    table = torch.zeros(4, 8, device=device)
    with pytest.raises(ArgumentError, match="tokens"):
        embedding(torch.zeros(2, dtype=torch.int64, device=device), table)
    with pytest.raises(ArgumentError, match="dtype"):
        embedding(tokens(device), table, dtype=torch.float64)
    with pytest.raises(ArgumentError, match="matrix"):
        embedding(tokens(device), torch.zeros(4, dtype=torch.float32, device=device))
    assert embedding(tokens(device)[:0], table).shape == (0, 8)

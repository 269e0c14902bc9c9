"""Products with quantized weights: the values that the codes stand for, multiplied in float64, are what is expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.kernels.gpu import matmul_launch
from meshlm.kernels.gpu.checks import ArgumentError
from meshlm.kernels.gpu.matrix import QuantizedMatrix, WeightFormat, pack, unpack
from meshlm.kernels.gpu.quant_matmul import quant_matmul
from meshlm.kernels.gpu.quantize_rows import quantize_rows
from meshlm.kernels.quant_matmul import reference_quant_matmul

MOST = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FORMATS: dict[str, tuple[WeightFormat, Mapping[str, Any]]] = {
    "int4 in 32": ("int4", {}),
    "int4 in 64": ("int4", {"group": 64}),
    "int4 in 128": ("int4", {"group": 128}),
    "int4 in 32 with minimums": ("int4", {"minimum": True}),
    "int4 in 128 with minimums": ("int4", {"group": 128, "minimum": True}),
    "int8 in 32": ("int8", {"group": 32}),
    "int8 in 64": ("int8", {"group": 64}),
    "int8": ("int8", {}),
    "fp8": ("fp8", {}),
    "fp8 of a tensor": ("fp8", {"per_tensor": True}),
}


def made(name: str, rows: int, cols: int, device: torch.device) -> QuantizedMatrix:
    format_, options = FORMATS[name]
    return pack(torch.randn(rows, cols) + 0.1, format_, device=device, **options)


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm())


def rows_of(count: int, cols: int, device: torch.device) -> torch.Tensor:
    """Random, and such that fp8 with the scale 2^-7 holds them: what rounding them costs is no matter of products."""
    codes = (torch.randn(count, cols, device=device) * 100).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    codes[:, cols // 2] = 448
    return codes / 128


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "outputs", "cols"), [(1, 40, 192), (35, 24, 96), (70, 130, 64)])
def test_products_of_every_format(
    name: str, rows: int, outputs: int, cols: int, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    matrix = made(name, outputs, cols, device)
    for dtype in dtypes:
        x = rows_of(rows, cols, device).to(dtype)
        assert error_of(quant_matmul(x, matrix), reference_quant_matmul(x, unpack(matrix))) < MOST[dtype]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    rows=st.sampled_from([1, 3, 16, 17, 33]),
    outputs=st.integers(1, 70).map(lambda half: 2 * half),
    cols=st.integers(1, 300),
    activation=st.sampled_from([None, "silu", "gelu_tanh"]),
    adds=st.booleans(),
)
def test_products_of_any_shape_with_what_comes_after(
    name: str, rows: int, outputs: int, cols: int, activation: Any, adds: bool
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matrix = made(name, outputs, cols, device)
    x = torch.cat([rows_of(rows, cols, device), torch.full((rows, 3), torch.nan, device=device)], 1)[:, :cols]
    bias = torch.randn(outputs, device=device) if adds else None
    residual = torch.randn(rows, outputs if activation is None else outputs // 2, device=device) if adds else None
    found = quant_matmul(x, matrix, bias=bias, residual=residual, activation=activation)
    expected = reference_quant_matmul(x, unpack(matrix), bias, residual, activation)
    assert error_of(found, expected) < MOST[x.dtype]


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_columns_that_are_split_add_up(
    rows: int, activation: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = []

    def split_of(steps: int, *_: object) -> tuple[int, int]:
        grids.append(steps)
        return -(-steps // 2), 2  # the last of an odd number of steps has one alone

    monkeypatch.setattr(matmul_launch, "split_of", split_of)
    matrix = made("int4 in 32 with minimums", 48, 576, device)
    x = torch.randn(rows, 576, device=device)
    expected = reference_quant_matmul(x, unpack(matrix), activation=activation)
    first = quant_matmul(x, matrix, activation=activation)
    assert grids == [9 if rows == 40 else 5]
    assert error_of(first, expected) < MOST[torch.float32]
    assert torch.equal(first, quant_matmul(x, matrix, activation=activation)), "the counters were not left at 0"


def test_rows_become_the_nearest_fp8(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    for dtype in dtypes:
        x = torch.randn(3, 5000, device=device).to(dtype)
        x[1] = 0
        codes, scales = quantize_rows(x)
        assert float(scales[1]) == 1
        torch.testing.assert_close(scales[::2], x[::2].float().abs().amax(1) / 448)
        nearest = (x.float() / scales[:, None]).to(torch.float8_e4m3fn)
        assert float((codes.float() != nearest.float()).float().mean()) < 1e-3  # ties, after another division


def test_the_sum_is_put_where_the_caller_says(device: torch.device) -> None:
    matrix = made("int4 in 32", 32, 64, device)
    x, whole = torch.randn(3, 64, device=device), torch.randn(3, 48, device=device)
    before = whole.clone()
    part = whole[:, 8:40]
    assert quant_matmul(x, matrix, residual=part, out=part) is part
    assert error_of(part, reference_quant_matmul(x, unpack(matrix), residual=before[:, 8:40])) < MOST[torch.float32]
    assert torch.equal(whole[:, :8], before[:, :8])
    assert torch.equal(whole[:, 40:], before[:, 40:])


def test_no_rows_are_no_product(device: torch.device) -> None:
    assert quant_matmul(torch.empty(0, 64, device=device), made("int8", 32, 64, device)).shape == (0, 32)


def test_matrices_below_one_another_are_one(device: torch.device) -> None:
    parts = [made("int4 in 32 with minimums", rows, 96, device) for rows in (32, 16)]
    whole = QuantizedMatrix(
        "int4",
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts], -1),
        torch.cat([part.minimums for part in parts if part.minimums is not None], -1),
        32,
        96,
    )
    x = torch.randn(2, 96, device=device)
    expected = torch.cat([quant_matmul(x, part) for part in parts], -1)
    torch.testing.assert_close(quant_matmul(x, whole), expected)


def test_the_reference_is_what_torch_computes() -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(6, 8), torch.randn(6)
    torch.testing.assert_close(
        reference_quant_matmul(x, weight, bias).float(), torch.nn.functional.linear(x, weight, bias)
    )


def test_what_cannot_be_multiplied_is_named(device: torch.device) -> None:
    matrix = made("int4 in 32", 30, 64, device)
    odd = made("int8", 31, 64, device)
    x = torch.randn(2, 64, device=device)
    broken = QuantizedMatrix("int4", matrix.codes, matrix.scales[:1], None, 32, 64)
    cases = {
        "x": lambda: quant_matmul(x[:, :32], matrix),
        "matrix": lambda: quant_matmul(x, broken),
        "bias": lambda: quant_matmul(x, matrix, bias=torch.zeros(31, device=device)),
        "residual": lambda: quant_matmul(x, matrix, residual=torch.zeros(2, 30, dtype=torch.float64, device=device)),
        "out": lambda: quant_matmul(x, matrix, out=torch.zeros(30, 2, device=device).t()),
        "activation": lambda: quant_matmul(x, odd, activation="silu"),
    }
    for argument, call in cases.items():
        with pytest.raises(ArgumentError) as raised:
            call()
        assert raised.value.argument == argument

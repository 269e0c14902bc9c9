from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from meshlm.kernels.gpu.checks import ArgumentError
from meshlm.kernels.gpu.rms_norm import MOST_WIDTH, rms_norm
from meshlm.kernels.rms_norm import reference_rms_norm
from tests.kernels.gpu.attention_cases import relative_error, tolerance


@settings(max_examples=12, deadline=None, derandomize=True)
@given(rows=st.integers(1, 5), width=st.sampled_from([1, 31, 64, 96, 576, 2049]), adds=st.booleans())
def test_it_is_the_definition_with_and_without_a_residual(
    device: torch.device, dtypes: tuple[torch.dtype, ...], rows: int, width: int, adds: bool
) -> None:
    for dtype in dtypes:
        torch.manual_seed(rows * width)
        x = torch.randn(rows, 2 * width, device=device).to(dtype)[:, :width]  # rows lie apart
        weight = torch.rand(width, device=device) + 0.5
        residual = torch.randn(rows, width, device=device).to(dtype)
        summed = x + residual if adds else x
        expected = reference_rms_norm(summed.double(), weight, 1e-5)
        out = rms_norm(x, weight, 1e-5, residual=residual if adds else None)
        assert relative_error(out, expected) < tolerance(dtype)
        if adds:
            assert torch.equal(residual, summed)


def test_a_row_of_zeros_is_zeros_and_no_row_is_no_launch(device: torch.device) -> None:
    weight = torch.ones(64, device=device)
    assert rms_norm(torch.zeros(1, 64, device=device), weight, 1e-6).eq(0).all()
    assert rms_norm(torch.zeros(0, 64, device=device), weight, 1e-6).shape == (0, 64)


def test_large_values_do_not_overflow_a_sum_of_squares(device: torch.device) -> None:
    x = torch.full((1, 64), 3e4, device=device, dtype=torch.float16)
    torch.testing.assert_close(rms_norm(x, torch.ones(64, device=device), 0.0), torch.ones_like(x))


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("x", {"x": torch.zeros(2, 64, dtype=torch.int32)}),
        ("x", {"x": torch.zeros(1, MOST_WIDTH + 1)}),
        ("x", {"x": torch.zeros(64, 2).T}),
        ("weight", {"weight": torch.ones(63)}),
        ("residual", {"residual": torch.zeros(2, 64, dtype=torch.float64)}),
        ("out", {"out": torch.zeros(3, 64)}),
    ],
)
def test_what_it_cannot_work_with_is_named(
    device: torch.device, argument: str, change: dict[str, torch.Tensor]
) -> None:
    given = {"x": torch.zeros(2, 64), "weight": torch.ones(64), "eps": 1e-5} | change
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    if argument == "x" and "x" in change and change["x"].stride(-1) != 1:
        moved["x"] = torch.zeros(64, 2, device=device).T
    with pytest.raises(ArgumentError) as caught:
        rms_norm(**moved)  # type: ignore[arg-type]
    assert caught.value.argument == argument

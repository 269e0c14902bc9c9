from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from meshlm.kernels.gpu.checks import ArgumentError
from meshlm.kernels.gpu.nf4 import dequantize_nf4, quantize_nf4
from meshlm.kernels.low_bits import NF4_LEVELS, reference_nf4
from tests.kernels.gpu.attention_cases import relative_error


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 64), (70, 200), (33, 640)])
def test_it_is_the_definition(device: torch.device, rows: int, cols: int) -> None:
    torch.manual_seed(cols)
    weight = torch.randn(rows, cols + 3, device=device)[:, :cols]  # rows lie apart
    weight[0, :64] = 0
    found = dequantize_nf4(quantize_nf4(weight), dtype=torch.float32)
    expected = reference_nf4(weight)
    same = torch.isclose(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert float(same.double().mean()) > 0.998  # all but a weight on the border between two levels
    assert relative_error(found, expected) < 1e-2


def test_levels_have_equal_shares_of_a_normal_distribution() -> None:
    """As the paper makes them (section 3), and bitsandbytes: offset 0.9677083, 8 steps above 0 and 7 below."""
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    offset = 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values
    torch.testing.assert_close(torch.tensor(NF4_LEVELS, dtype=torch.float64), levels / levels.max(), atol=1e-6, rtol=0)


def test_normal_weights_err_as_little_as_the_format_allows_and_scales_cost_little(device: torch.device) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 1024, device=device)
    matrix = quantize_nf4(weight)
    error = relative_error(dequantize_nf4(matrix, dtype=torch.float32), weight.double())
    assert 0.08 < error < 0.1
    assert 8 * matrix.nbytes / weight.numel() < 4.13  # 4 + 8 / 64 + 32 / (64 * 256), the paper's 4.127


def test_narrow_floats_come_and_go(device: torch.device) -> None:
    weight = torch.randn(5, 96, device=device).bfloat16()
    matrix = quantize_nf4(weight)
    out = torch.empty(5, 96, dtype=torch.bfloat16, device=device)
    assert dequantize_nf4(matrix, out=out) is out
    assert relative_error(out, reference_nf4(weight)) < 1e-2


def test_a_weight_of_zeros_is_zeros(device: torch.device) -> None:
    assert dequantize_nf4(quantize_nf4(torch.zeros(2, 70, device=device))).eq(0).all()


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_not_finite_is_an_error(device: torch.device, number: float) -> None:
    weight = torch.zeros(40, 70, device=device)
    weight[39, 69] = number
    with pytest.raises(ArgumentError, match="weight: is not finite"):
        quantize_nf4(weight)


def test_what_it_cannot_work_with_is_named(device: torch.device) -> None:
    with pytest.raises(ArgumentError, match="weight"):
        quantize_nf4(torch.zeros(64, device=device))
    with pytest.raises(ArgumentError, match="weight"):
        quantize_nf4(torch.zeros(2, 0, device=device))
    matrix = quantize_nf4(torch.zeros(2, 64, device=device))
    with pytest.raises(ArgumentError, match="dtype"):
        dequantize_nf4(matrix, dtype=torch.float64)
    with pytest.raises(ArgumentError, match="out"):
        dequantize_nf4(matrix, out=torch.zeros(2, 63, dtype=torch.bfloat16, device=device))

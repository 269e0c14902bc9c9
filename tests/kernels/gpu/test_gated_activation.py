from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from meshlm.kernels.gelu_mul import reference_gelu_mul
from meshlm.kernels.gpu.checks import ArgumentError
from meshlm.kernels.gpu.gated_activation import gelu_mul, silu_mul
from meshlm.kernels.silu_mul import reference_silu_mul
from tests.kernels.gpu.attention_cases import relative_error, tolerance


@pytest.mark.parametrize("width", [1, 33, 96, 1024, 1536])
@pytest.mark.parametrize(("ours", "reference"), [(silu_mul, reference_silu_mul), (gelu_mul, reference_gelu_mul)])
def test_it_is_the_definition(
    device: torch.device, dtypes: tuple[torch.dtype, ...], width: int, ours: object, reference: object
) -> None:
    for dtype in dtypes:
        torch.manual_seed(width)
        both = (3 * torch.randn(3, 2 * width + 7, device=device)).to(dtype)[:, : 2 * width]  # rows lie apart
        expected = reference(both.double())  # type: ignore[operator]
        assert relative_error(ours(both), expected) < tolerance(dtype)  # type: ignore[operator]


@pytest.mark.parametrize("ours", [silu_mul, gelu_mul])
def test_far_from_zero_it_is_the_gate_or_nothing(device: torch.device, ours: object) -> None:
    both = torch.tensor([[200.0, -200.0, 2.0, 2.0]], device=device)
    assert ours(both).tolist() == [[400.0, 0.0]]  # type: ignore[operator]


def test_no_row_is_no_launch_and_odd_rows_are_named(device: torch.device) -> None:
    assert silu_mul(torch.zeros(0, 8, device=device)).shape == (0, 4)
    with pytest.raises(ArgumentError, match="gate_up"):
        silu_mul(torch.zeros(2, 7, device=device))
    with pytest.raises(ArgumentError, match="out"):
        silu_mul(torch.zeros(2, 8, device=device), out=torch.zeros(2, 8, device=device))

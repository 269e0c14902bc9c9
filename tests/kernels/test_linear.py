"""Dense products, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from meshlm.kernels.linear import linear, reference_linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 20, 40), (9, 100, 57)])
def test_linear_equals_the_definition(tokens: int, rows: int, columns: int, bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, added = torch.randn(tokens, columns), torch.randn(rows, columns), torch.randn(rows) if bias else None
    torch.testing.assert_close(linear(x, weight, added), reference_linear(x, weight, added), atol=1e-5, rtol=1e-5)

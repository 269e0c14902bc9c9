"""int8 products: exact integer sums, no saturation, rows independent of their neighbours."""

from __future__ import annotations

import pytest
import torch

from meshlm.kernels.linear import (
    ACTIVATION_STEPS,
    int8_supported,
    linear,
    linear_int8,
    pack_int8,
    quantize_weight,
    reference_linear,
    reference_linear_int8,
    rms_norm_linear_int8,
)
from meshlm.kernels.rms_norm import reference_rms_norm

pytestmark = pytest.mark.skipif(not int8_supported(torch.device("cpu")), reason="torch was built without fbgemm")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(64, 32), (100, 57), (960, 576)])
def test_int8_equals_integer_arithmetic(rows: int, columns: int, bias: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(rows, columns), torch.randn(9, columns) * 5
    added = torch.randn(rows) if bias else None
    expected = reference_linear_int8(x, weight, added)
    torch.testing.assert_close(linear_int8(x, pack_int8(weight, added)), expected, atol=1e-3, rtol=1e-5)


def test_the_worst_row_does_not_saturate() -> None:
    """All weights and activations at their largest: the case in which fbgemm's int16 sums would overflow."""
    weight, x = torch.ones(16, 64), torch.ones(2, 64)
    weight[8:] *= -1
    torch.testing.assert_close(linear_int8(x, pack_int8(weight)), x @ weight.T, atol=0.6, rtol=0)


def test_no_pair_of_weights_can_overflow_sixteen_bits() -> None:
    torch.manual_seed(0)
    weight = torch.randn(200, 576)
    weight[0] = 1.0
    pairs = quantize_weight(weight)[0].int().view(200, -1, 2)
    largest = 2 * ACTIVATION_STEPS + 1
    assert int(pairs.clamp_min(0).sum(-1).max()) * largest < 2**15
    assert int(pairs.clamp_max(0).sum(-1).min()) * largest >= -(2**15)


def test_a_row_gives_the_same_bits_alone_and_among_others() -> None:
    torch.manual_seed(0)
    packed = pack_int8(torch.randn(960, 576))
    x = torch.randn(33, 576)
    x[7] *= 1000
    together = linear_int8(x, packed)
    normed = rms_norm_linear_int8(x, packed, 1e-5)
    for row in range(33):
        assert torch.equal(linear_int8(x[row : row + 1], packed)[0], together[row])
        assert torch.equal(rms_norm_linear_int8(x[row : row + 1], packed, 1e-5)[0], normed[row])


def test_residual_is_added_in_place() -> None:
    torch.manual_seed(0)
    packed, x, residual = pack_int8(torch.randn(32, 64), torch.randn(32)), torch.randn(4, 64), torch.randn(4, 32)
    expected = residual + linear_int8(x, packed)
    out = linear_int8(x, packed, residual)
    assert out is residual
    torch.testing.assert_close(out, expected)


def test_folded_norm_equals_norm_then_product() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64), torch.randn(5, 64) * 20
    expected = linear_int8(reference_rms_norm(x, torch.ones(64), 1e-5), pack_int8(weight))
    torch.testing.assert_close(rms_norm_linear_int8(x, pack_int8(weight), 1e-5), expected, atol=0.05, rtol=0.01)


def test_a_row_of_zeros_gives_the_bias() -> None:
    bias = torch.randn(8)
    torch.testing.assert_close(linear_int8(torch.zeros(1, 16), pack_int8(torch.randn(8, 16), bias))[0], bias)


def test_plain_linear_equals_the_definition() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 40), torch.randn(20, 40), torch.randn(20)
    torch.testing.assert_close(linear(x, weight, bias), reference_linear(x, weight, bias), atol=1e-5, rtol=1e-5)

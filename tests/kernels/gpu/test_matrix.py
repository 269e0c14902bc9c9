"""The layout of quantized weights: packing keeps the values, quantizing comes near them."""

from __future__ import annotations

import pytest
import torch

from meshlm.kernels.gpu.checks import ArgumentError
from meshlm.kernels.gpu.matrix import QuantizedMatrix, pack, pack_codes, unpack
from meshlm.kernels.quantize import dequantize, quantize_groups


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("bits", "minimum"), [(4, False), (4, True), (8, False)])
@pytest.mark.parametrize("cols", [64, 96, 576])
def test_a_quantized_weight_keeps_its_values(bits: int, minimum: bool, cols: int, device: torch.device) -> None:
    weight = quantize_groups(torch.randn(5, cols), bits, minimum)
    matrix = pack(weight, device=device)
    assert (matrix.rows, matrix.cols, matrix.padded % 64) == (5, cols, 0)
    torch.testing.assert_close(unpack(matrix).cpu(), dequantize(weight), rtol=1e-6, atol=1e-6)


def test_a_byte_of_4_bit_codes_holds_columns_32_apart(device: torch.device) -> None:
    codes = torch.zeros(1, 128, dtype=torch.uint8)
    codes[0, 64 + 3], codes[0, 64 + 32 + 3] = 5, 9
    matrix = pack_codes(codes, torch.ones(1, 4), torch.zeros(1, 4), 4, 32, device)
    assert matrix.codes[0, 32 + 3].item() == 5 | 9 << 4
    assert torch.equal(matrix.codes.nonzero().cpu(), torch.tensor([[0, 32 + 3]]))


@pytest.mark.parametrize(("minimum", "group", "most"), [(False, 32, 0.10), (True, 64, 0.10), (True, 128, 0.11)])
def test_4_bits_come_near_a_normal_weight(minimum: bool, group: int, most: float, device: torch.device) -> None:
    weight = torch.randn(40, 400, generator=torch.Generator().manual_seed(0))
    matrix = pack(weight, "int4", group=group, minimum=minimum, device=device)
    assert (matrix.minimums is not None) == minimum
    assert matrix.scales.shape == (448 // group + (448 % group > 0), 40)
    assert error_of(unpack(matrix).cpu(), weight) < most


@pytest.mark.parametrize("group", [None, 32, 128])
def test_8_bits_come_nearer(group: int | None, device: torch.device) -> None:
    weight = torch.randn(40, 400, generator=torch.Generator().manual_seed(0))
    assert error_of(unpack(pack(weight, "int8", group=group, device=device)).cpu(), weight) < 0.01


@pytest.mark.parametrize("per_tensor", [False, True])
def test_fp8_rounds_to_four_digits(per_tensor: bool, device: torch.device) -> None:
    weight = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    matrix = pack(weight, "fp8", per_tensor=per_tensor, device=device)
    assert len(matrix.scales.unique()) == (1 if per_tensor else 40)
    nearest = torch.full_like(weight, 2.0**-4) * weight.abs()  # e4m3 keeps 3 bits behind the first
    assert bool(((unpack(matrix).cpu() - weight).abs() <= nearest + 1e-3).all())


def test_weights_of_0_stay_0(device: torch.device) -> None:
    for made in (
        pack(torch.zeros(3, 64), "int4", device=device),
        pack(torch.zeros(3, 64), "int4", minimum=True, device=device),
        pack(torch.zeros(3, 64), "int8", device=device),
        pack(torch.zeros(3, 64), "fp8", device=device),
    ):
        assert torch.equal(unpack(made).cpu(), torch.zeros(3, 64))


def test_what_cannot_be_packed_is_named() -> None:
    weight = torch.randn(4, 64)
    codes, scales = torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 2)
    cases = {
        "format": lambda: pack(weight),
        "minimum": lambda: pack(weight, "int8", minimum=True),
        "per_tensor": lambda: pack(weight, "int4", per_tensor=True),
        "group": lambda: pack(weight, "int4", group=48),
        "weight": lambda: pack(torch.full((4, 64), torch.nan), "int8"),
        "bits": lambda: pack_codes(codes, scales, None, 3, 32),
        "minimums": lambda: pack_codes(codes, scales, scales, 8, 32),
        "scales": lambda: pack_codes(codes, scales[:3], None, 4, 32),
    }
    for argument, call in cases.items():
        with pytest.raises(ArgumentError) as raised:
            made = call()
            assert not isinstance(made, QuantizedMatrix), argument
        assert raised.value.argument == argument


def test_a_quantized_weight_is_not_quantized_again() -> None:
    with pytest.raises(ArgumentError, match="format"):
        pack(quantize_groups(torch.randn(2, 64), 4, False), "int8")

"""Normalization, activation, rotary embedding and rotations, against their definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch

from meshlm.kernels.rms_norm import reference_rms_norm, rms_norm
from meshlm.kernels.rope import reference_rope, rope, rope_frequencies, rope_table, scale_linear, scale_llama3
from meshlm.kernels.rotation import group_size, hadamard, random_rotation, reference_rotate_groups, rotate_groups
from meshlm.kernels.silu_mul import reference_silu_mul, silu_mul


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_the_definition(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(7, 96) * 30).to(dtype), torch.randn(96).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-5), reference_rms_norm(x, weight, 1e-5), atol=1e-5, rtol=tolerance
    )


def test_rms_norm_of_zeros_is_zero_and_not_nan() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-5), torch.zeros(2, 8))


def test_silu_mul_takes_the_gate_from_the_first_half() -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(5, 64) * 4
    torch.testing.assert_close(silu_mul(gate_up), reference_silu_mul(gate_up), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("positions", [[0, 1, 2, 3], [5, 4000, 17, 8191]])
def test_rope_is_a_complex_turn_by_position(positions: list[int]) -> None:
    torch.manual_seed(0)
    frequencies = rope_frequencies(32, 10_000.0)
    x, at = torch.randn(4, 3, 32), torch.tensor(positions)
    expected = reference_rope(x, at, frequencies)
    rope(x, *rope_table(frequencies, 8192, torch.float32).index_select(1, at))
    torch.testing.assert_close(x, expected, atol=2e-6, rtol=1e-5)


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones() -> None:
    frequencies = rope_frequencies(128, 500_000.0)
    scaled = scale_llama3(frequencies, 8.0, 1.0, 4.0, 8192)
    waves = 2 * math.pi / frequencies
    short, long = waves < 8192 / 4, waves > 8192 / 1
    assert torch.equal(scaled[short], frequencies[short])
    torch.testing.assert_close(scaled[long], frequencies[long] / 8)
    between = ~short & ~long
    assert between.any()
    assert bool(((scaled[between] < frequencies[between]) & (scaled[between] > frequencies[between] / 8)).all())


def test_linear_scaling_divides_positions() -> None:
    frequencies = rope_frequencies(16, 10_000.0)
    torch.testing.assert_close(scale_linear(frequencies, 4.0) * 40, frequencies * 10)


@pytest.mark.parametrize("size", [64, 96, 576, 7])
def test_random_rotation_is_orthogonal_and_fixed_by_its_seed(size: int) -> None:
    turn = random_rotation(size)
    torch.testing.assert_close(turn @ turn.T, torch.eye(size, dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.equal(turn, random_rotation(size))
    assert not torch.equal(turn, random_rotation(size, seed=1))


def test_rotate_groups_equals_the_definition_and_undoes_itself() -> None:
    torch.manual_seed(0)
    x, matrix = torch.randn(3, 1536), hadamard(group_size(1536)).float()
    turned = rotate_groups(x, matrix)
    torch.testing.assert_close(turned, reference_rotate_groups(x, matrix), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotate_groups(turned, matrix), x, atol=1e-5, rtol=1e-5)

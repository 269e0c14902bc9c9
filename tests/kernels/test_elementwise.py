"""Normalization, activations and rotary embedding, against their definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch

from meshlm.kernels.gelu_mul import gelu_mul, reference_gelu_mul
from meshlm.kernels.rms_norm import reference_rms_norm, rms_norm
from meshlm.kernels.rope import (
    reference_rope,
    rope,
    rope_frequencies,
    rope_turns,
    scale_linear,
    scale_llama3,
    scale_yarn,
)
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


def test_gelu_mul_takes_the_gate_from_the_first_half() -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(5, 64) * 4
    torch.testing.assert_close(gelu_mul(gate_up), reference_gelu_mul(gate_up), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("positions", [[0, 1, 2, 3], [5, 4000, 17, 8191]])
def test_rope_is_a_complex_turn_by_position(positions: list[int]) -> None:
    torch.manual_seed(0)
    frequencies = rope_frequencies(32, 10_000.0)
    x, at = torch.randn(4, 3, 32), torch.tensor(positions)
    expected = reference_rope(x, at, frequencies)
    rope(x, *rope_turns(frequencies, at, torch.float32))
    torch.testing.assert_close(x, expected, atol=2e-6, rtol=1e-5)


def test_rope_of_a_part_of_each_head_leaves_the_rest_alone() -> None:
    torch.manual_seed(0)
    frequencies, at = rope_frequencies(24, 10_000.0), torch.tensor([3, 70])
    x = torch.randn(2, 3, 32)
    expected = torch.cat((reference_rope(x[..., :24], at, frequencies), x[..., 24:]), -1)
    rope(x[..., :24], *rope_turns(frequencies, at, torch.float32))
    torch.testing.assert_close(x, expected, atol=2e-6, rtol=1e-5)


def test_a_rope_factor_scales_what_is_rotated() -> None:
    frequencies, at = rope_frequencies(16, 10_000.0), torch.tensor([5])
    plain, scaled = torch.ones(1, 1, 16), torch.ones(1, 1, 16)
    rope(plain, *rope_turns(frequencies, at, torch.float32))
    rope(scaled, *rope_turns(frequencies, at, torch.float32, factor=1.5))
    torch.testing.assert_close(scaled, plain * 1.5)


def test_yarn_scaling_equals_transformers() -> None:
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": 1_000_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32_768,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
    }
    config = transformers.Qwen2Config(
        hidden_size=1024, num_attention_heads=8, max_position_embeddings=131_072, rope_parameters=rope_parameters
    )
    expected, _ = rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    ours = scale_yarn(rope_frequencies(128, 1_000_000.0), 1_000_000.0, 4.0, 2.0, 20.0, 32_768)
    torch.testing.assert_close(ours, expected, atol=0, rtol=1e-6)


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

"""Native norms, rope and activations against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.kernels.native import ops
from meshlm.kernels.native.library import Library, open_library
from meshlm.kernels.rms_norm import reference_rms_norm
from meshlm.kernels.rope import reference_rope, rope_frequencies
from tests.kernels.native.libraries import ISAS, needs_libraries

pytestmark = needs_libraries


@given(
    isa=st.sampled_from(ISAS),
    rows=st.integers(1, 5),
    width=st.integers(1, 700),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
)
@settings(deadline=None)
def test_rms_norm_of_any_width_is_the_definition(isa: str, rows: int, width: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(width)
    x, weight = torch.randn(rows, width, generator=generator) * scale, torch.randn(width, generator=generator)
    out = ops.rms_norm(open_library(isa), x, weight, 1e-5)
    wanted = reference_rms_norm(x.double(), weight, 1e-5).float()
    torch.testing.assert_close(out, wanted, rtol=2e-6, atol=1e-7)


def test_a_row_is_normed_the_same_whatever_is_beside_it(library: Library) -> None:
    x, weight = torch.randn(9, 575), torch.randn(575)
    together = ops.rms_norm(library, x, weight, 1e-6)
    for row in range(9):
        assert torch.equal(ops.rms_norm(library, x[row : row + 1].clone(), weight, 1e-6)[0], together[row])


@pytest.mark.parametrize(("head_dim", "rotated"), [(64, 64), (96, 96), (20, 20), (128, 32), (64, 6)])
def test_rope_turns_pairs_and_leaves_the_rest(library: Library, head_dim: int, rotated: int) -> None:
    positions = [0, 1, 77, 8191]
    frequencies = rope_frequencies(rotated, 10_000.0)
    x = torch.randn(4, 3, head_dim)
    turned = x.clone()
    ops.rope(library, turned, positions, frequencies)
    wanted = reference_rope(x[..., :rotated].double(), torch.tensor(positions), frequencies).float()
    torch.testing.assert_close(turned[..., :rotated], wanted, rtol=1e-5, atol=2e-6)
    assert torch.equal(turned[..., rotated:], x[..., rotated:])


def test_rope_is_right_at_the_millionth_position(library: Library) -> None:
    """A float32 angle would be off by up to 0.03 there."""
    frequencies = torch.tensor([1.0, 0.7, 0.001])
    x = torch.tensor([[[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]]])
    ops.rope(library, x, [1_000_003], frequencies)
    for i, frequency in enumerate(frequencies.double().tolist()):
        angle = math.fmod(1_000_003 * frequency, 2 * math.pi)
        assert x[0, 0, i].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert x[0, 0, 3 + i].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_rope_factor_scales_what_is_turned(library: Library) -> None:
    """YaRN's attention factor."""
    frequencies = rope_frequencies(32, 10_000.0)
    x = torch.randn(1, 1, 32)
    plain, scaled = x.clone(), x.clone()
    ops.rope(library, plain, [5], frequencies)
    ops.rope(library, scaled, [5], frequencies, 1.25)
    torch.testing.assert_close(scaled, plain * 1.25)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_activations_are_exact_to_a_millionth(library: Library, kind: str) -> None:
    x = torch.cat(
        (torch.linspace(-12, 12, 4000), torch.linspace(-1e-3, 1e-3, 96), torch.tensor([-90.0, 90, -1e4, 1e4] * 4))
    )
    wide = x.double()
    functional = torch.nn.functional
    wanted = functional.silu(wide) if kind == "silu" else functional.gelu(wide, approximate="tanh")
    torch.testing.assert_close(ops.activation(library, kind, x).double(), wanted, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_activations_pass_on_what_is_no_number(library: Library, kind: str) -> None:
    assert ops.activation(library, kind, torch.full((16,), math.nan)).isnan().all()

"""The quantizer against rounding to the nearest, written out here by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.kernels.quantize import GROUP, GroupQuantized, dequantize, quantize_groups

FORMATS = [(4, False), (4, True), (8, False)]


def weights(seed: int, rows: int = 5, groups: int = 3) -> torch.Tensor:
    """Gaussian, with a far outlier in some groups, as rows of real models have them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * GROUP, generator=generator) * 0.02
    weight[::2, ::GROUP] *= 1 + 20 * torch.rand(1, generator=generator)
    return weight


def nearest(weight: torch.Tensor, bits: int, minimum: bool) -> torch.Tensor:
    """Rounding to the nearest with the scale of the extreme: no search."""
    groups = weight.view(len(weight), -1, GROUP)
    if minimum:
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / 15).half().float()
        low = low.half().float()
        codes = ((groups - low) / scale.clamp_min(1e-30)).round().clamp(0, 15)
        return (codes * scale + low).view_as(weight)
    top = 2 ** (bits - 1) - 1
    scale = (groups.abs().amax(-1, keepdim=True) / top).half().float()
    return ((groups / scale.clamp_min(1e-30)).round().clamp(-top, top) * scale).view_as(weight)


def squares(weight: torch.Tensor, approximation: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    error = (weight.double() - approximation.double()).square()
    if importance is not None:
        error = error * importance.double()
    return error.view(len(weight), -1, GROUP).sum(-1)


@pytest.mark.parametrize(("bits", "minimum"), FORMATS)
@pytest.mark.parametrize("salient", [False, True])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_no_group_is_worse_than_rounded_to_the_nearest(bits: int, minimum: bool, salient: bool, seed: int) -> None:
    weight = weights(seed)
    importance = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed)) + 0.01 if salient else None
    searched = squares(weight, dequantize(quantize_groups(weight, bits, minimum, importance)), importance)
    rounded = squares(weight, nearest(weight, bits, minimum), importance)
    assert bool((searched <= rounded * (1 + 1e-4)).all())


@pytest.mark.parametrize(("bits", "minimum", "gain"), [(4, False, 0.8), (4, True, 0.9)])
def test_the_search_is_worth_its_time_on_gaussian_weights(bits: int, minimum: bool, gain: float) -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1))
    searched = squares(weight, dequantize(quantize_groups(weight, bits, minimum))).sum()
    assert searched < gain * squares(weight, nearest(weight, bits, minimum)).sum()


@pytest.mark.parametrize(("bits", "minimum"), FORMATS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_weights_that_are_on_a_grid_already_stay_as_they_are(bits: int, minimum: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (4, 2 * GROUP), generator=generator, dtype=torch.uint8)
    codes[:, ::GROUP], codes[:, 1::GROUP] = 0, 2**bits - 1  # a quantizer uses its whole range
    scales = (torch.rand(4, 2, generator=generator) + 0.1).half()
    minimums = torch.randn(4, 2, generator=generator).half() if minimum else None
    grid = GroupQuantized(bits, codes, scales, minimums)
    found = quantize_groups(dequantize(grid), bits, minimum)
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(dequantize(found), dequantize(grid), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("bits", "minimum"), FORMATS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), power=st.integers(-4, 4))
def test_scaling_the_weights_scales_what_comes_out(bits: int, minimum: bool, seed: int, power: int) -> None:
    weight, factor = weights(seed) * 64, 2.0**power
    plain, scaled = quantize_groups(weight, bits, minimum), quantize_groups(weight * factor, bits, minimum)
    assert torch.equal(plain.codes, scaled.codes)
    torch.testing.assert_close(dequantize(plain) * factor, dequantize(scaled), rtol=0, atol=0)


@pytest.mark.parametrize(("bits", "minimum"), FORMATS)
def test_a_column_that_matters_more_is_met_better(bits: int, minimum: bool) -> None:
    weight = torch.randn(256, GROUP, generator=torch.Generator().manual_seed(3))
    importance = torch.ones(GROUP)
    importance[7] = 1000.0

    def error(of: torch.Tensor | None) -> float:
        return float((dequantize(quantize_groups(weight, bits, minimum, of)) - weight)[:, 7].square().mean())

    assert error(importance) < error(None) / 2


@pytest.mark.parametrize(("bits", "minimum"), FORMATS)
@pytest.mark.parametrize("value", [0.0, 0.5, -0.25])
def test_a_group_without_range_is_not_divided_by_it(bits: int, minimum: bool, value: float) -> None:
    weight = torch.full((2, GROUP), value)
    torch.testing.assert_close(dequantize(quantize_groups(weight, bits, minimum)), weight, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("bits", "minimum"), FORMATS)
def test_a_lone_outlier_is_kept(bits: int, minimum: bool) -> None:
    weight = torch.zeros(1, GROUP)
    weight[0, 9] = -3.0
    torch.testing.assert_close(dequantize(quantize_groups(weight, bits, minimum)), weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("bits", "minimum"), FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(bits: int, minimum: bool, bad: float) -> None:
    weight = torch.ones(2, 2 * GROUP)
    weight[1, 40] = bad
    with pytest.raises(ValueError, match="not all of its values are finite"):
        quantize_groups(weight, bits, minimum)


@pytest.mark.parametrize(("bits", "minimum"), FORMATS)
def test_values_beyond_float16s_scales_are_refused(bits: int, minimum: bool) -> None:
    weight = torch.randn(1, GROUP) * 1e8
    with pytest.raises(ValueError, match="too large"):
        quantize_groups(weight, bits, minimum)


def test_unknown_formats_and_ragged_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="8 bits with minimum"):
        quantize_groups(torch.zeros(1, GROUP), 8, True)
    with pytest.raises(ValueError, match="33 columns"):
        quantize_groups(torch.zeros(1, 33), 4, True)
    with pytest.raises(ValueError, match="importance"):
        quantize_groups(torch.zeros(1, GROUP), 4, True, torch.ones(GROUP + 1))


@pytest.mark.parametrize(("bits", "minimum"), FORMATS)
def test_how_a_weight_was_cut_for_the_search_changes_no_row(bits: int, minimum: bool) -> None:
    weight = weights(7, rows=900, groups=4)  # more than one chunk
    whole, alone = quantize_groups(weight, bits, minimum), quantize_groups(weight[700:701], bits, minimum)
    assert torch.equal(whole.codes[700:701], alone.codes)
    assert torch.equal(whole.scales[700:701], alone.scales)


def test_it_works_inside_and_outside_of_inference_mode_alike() -> None:
    with torch.inference_mode():
        inside = quantize_groups(weights(3), 4, True)
    assert torch.equal(inside.codes, quantize_groups(weights(3), 4, True).codes)

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from meshlm.kernels.attention_reference import dequantize_kv
from meshlm.kernels.gpu.checks import ArgumentError
from meshlm.kernels.gpu.kv_cache import KvFormat, KvLayer, allocate_kv_layer
from meshlm.kernels.gpu.rope_store import rope_store, turns_table
from meshlm.kernels.rms_norm import reference_rms_norm
from meshlm.kernels.rope import reference_rope, rope_frequencies, scale_llama3, scale_yarn
from tests.kernels.gpu.attention_cases import FORMATS, relative_error, tolerance

POSITIONS = [0, 1, 17, 40, 5, 63]
SLOTS = [8, 3, -1, 31, 0, 32]  # one stores nothing, and one is behind the cache of 4 blocks of 8
# Of a stored number: half a step of the format, relative to the largest of a head, is what rounding costs.
NEAR = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3, "fp8": 7e-2, "int8": 1e-2, "int4": 2e-1}


def expected_of(
    qkv: torch.Tensor, heads: int, kv_heads: int, frequencies: torch.Tensor, norms: dict[str, Any], factor: float = 1.0
) -> torch.Tensor:
    """All heads, normalized and turned, in float64."""
    out = qkv.double()
    for name, first, count in (("query_norm", 0, heads), ("key_norm", heads, kv_heads)):
        part = out[:, first : first + count]
        if name in norms:
            part = reference_rms_norm(part, norms[name], norms["eps"])
        rotated = 2 * len(frequencies)
        turned = reference_rope(part[..., :rotated], torch.tensor(POSITIONS), frequencies.cpu()) * factor
        out[:, first : first + count] = torch.cat([turned, part[..., rotated:]], -1)
    return out


def case(device: torch.device, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(head_dim + heads)
    wide = torch.randn(len(POSITIONS), (heads + 2 * kv_heads) * head_dim + 8, device=device).to(dtype)
    return wide[:, :-8].view(len(POSITIONS), heads + 2 * kv_heads, head_dim)  # rows lie apart


def run(qkv: torch.Tensor, layer: KvLayer, turns: torch.Tensor, heads: int, norms: dict[str, Any]) -> torch.Tensor:
    device = qkv.device
    positions, slots = (torch.tensor(values, dtype=torch.int32, device=device) for values in (POSITIONS, SLOTS))
    rope_store(qkv, positions, slots, turns, layer, heads=heads, **norms)
    return qkv


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotated"), [(4, 2, 64, 64), (9, 3, 64, 64), (3, 1, 96, 72), (2, 2, 128, 128)]
)
@pytest.mark.parametrize("with_norms", [False, True])
def test_queries_turn_in_place_and_keys_and_values_are_stored(
    device: torch.device, heads: int, kv_heads: int, head_dim: int, rotated: int, with_norms: bool, kv_format: KvFormat
) -> None:
    qkv = case(device, heads, kv_heads, head_dim, torch.float32)
    norms: dict[str, Any] = {}
    if with_norms:
        norms = {name: torch.rand(head_dim, device=device) + 0.5 for name in ("query_norm", "key_norm")} | {"eps": 1e-6}
    frequencies = rope_frequencies(rotated, 10_000.0)
    expected = expected_of(qkv, heads, kv_heads, frequencies, norms)
    layer = allocate_kv_layer(kv_format, 4, kv_heads, 8, head_dim, device)
    before = [part.clone() for part in (layer.keys, layer.values)]
    turns = turns_table(frequencies.to(device), 64)
    values_before = qkv[:, heads:].clone()
    out = run(qkv, layer, turns, heads, norms)
    assert relative_error(out[:, :heads], expected[:, :heads]) < 2e-6
    assert torch.equal(out[:, heads:], values_before)  # what is stored elsewhere stays as it was
    keys, values = dequantize_kv(layer)
    for row, slot in enumerate(SLOTS):
        if 0 <= slot < 32:
            for stored, first in ((keys, heads), (values, heads + kv_heads)):
                wanted = expected[row, first : first + kv_heads]
                assert relative_error(stored[slot // 8, :, slot % 8], wanted) < NEAR[kv_format]
    touched = torch.zeros(4, 8, dtype=torch.bool, device=device)
    for slot in SLOTS:
        if 0 <= slot < 32:
            touched[slot // 8, slot % 8] = True
    for part, old in zip((layer.keys, layer.values), before, strict=True):
        kept = ~touched[:, None].expand(4, kv_heads, 8)
        assert torch.equal(part.view(torch.uint8)[kept], old.view(torch.uint8)[kept])


def test_the_activations_types(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    for dtype in dtypes:
        qkv = case(device, 4, 2, 64, dtype)
        frequencies = rope_frequencies(64, 500_000.0)
        expected = expected_of(qkv, 4, 2, frequencies, {})
        layer = allocate_kv_layer("float32", 4, 2, 8, 64, device)
        out = run(qkv, layer, turns_table(frequencies.to(device), 64), 4, {})
        assert relative_error(out[:, :4], expected[:, :4]) < tolerance(dtype)


@pytest.mark.parametrize("scaling", ["llama3", "yarn"])
def test_scaled_frequencies_and_factors_are_in_the_table(device: torch.device, scaling: str) -> None:
    plain = rope_frequencies(64, 10_000.0)
    factor = 1.0 if scaling == "llama3" else 1.25
    scaled = (
        scale_llama3(plain, 8.0, 1.0, 4.0, 64)
        if scaling == "llama3"
        else scale_yarn(plain, 10_000.0, 4.0, 1.0, 32.0, 64)
    )
    assert not torch.equal(plain, scaled)
    qkv = case(device, 2, 1, 64, torch.float32)
    expected = expected_of(qkv, 2, 1, scaled, {}, factor)
    layer = allocate_kv_layer("float32", 4, 1, 8, 64, device)
    out = run(qkv, layer, turns_table(scaled.to(device), 64, factor), 2, {})
    assert relative_error(out[:, :2], expected[:, :2]) < 2e-6


def test_far_positions_turn_as_exactly_as_near_ones(device: torch.device) -> None:
    frequencies = rope_frequencies(64, 10_000.0)
    table = turns_table(frequencies, 131_072)
    angle = (torch.tensor(131_071.0, dtype=torch.float64) * frequencies.double()).cos()
    torch.testing.assert_close(table[-1, 0].double(), angle, atol=1e-7, rtol=0)


@pytest.mark.parametrize("kv_format", ["int8", "int4"])
def test_a_head_of_zeros_is_stored_as_zeros(device: torch.device, kv_format: KvFormat) -> None:
    qkv = torch.zeros(len(POSITIONS), 4, 64, device=device)
    layer = allocate_kv_layer(kv_format, 4, 1, 8, 64, device)
    run(qkv, layer, turns_table(rope_frequencies(64, 1e4).to(device), 64), 2, {})
    for stored in dequantize_kv(layer):
        assert stored[1, :, 0].eq(0).all()


def test_fp8_beyond_its_range_is_its_largest(device: torch.device) -> None:
    qkv = torch.full((len(POSITIONS), 3, 64), 1e4, device=device)
    layer = allocate_kv_layer("fp8", 4, 1, 8, 64, device)
    run(qkv, layer, turns_table(rope_frequencies(64, 1e4).to(device), 64), 1, {})
    _, values = dequantize_kv(layer)
    assert values[1, :, 0].eq(448).all()


@pytest.mark.parametrize("argument", ["qkv", "positions", "slots", "turns", "layer", "heads", "query_norm"])
def test_what_it_cannot_work_with_is_named(device: torch.device, argument: str) -> None:
    given: dict[str, Any] = {
        "qkv": torch.zeros(2, 4, 64, device=device),
        "positions": torch.zeros(2, dtype=torch.int32, device=device),
        "slots": torch.zeros(2, dtype=torch.int32, device=device),
        "turns": torch.zeros(8, 2, 32, device=device),
        "layer": allocate_kv_layer("float32", 2, 1, 4, 64, device),
        "heads": 2,
    }
    bad: dict[str, Any] = {
        "qkv": torch.zeros(2, 5, 64, device=device),
        "positions": torch.zeros(2, dtype=torch.int64, device=device),
        "slots": torch.zeros(3, dtype=torch.int32, device=device),
        "turns": torch.zeros(8, 2, 33, device=device),
        "layer": KvLayer("float32", *(torch.zeros(2, 1, 64, 4, device=device).transpose(2, 3) for _ in range(2))),
        "heads": 0,
        "query_norm": torch.ones(32, device=device),
    }
    if argument == "heads":
        given["qkv"] = torch.zeros(2, 2, 64, device=device)
    with pytest.raises(ArgumentError) as caught:
        rope_store(**(given | {argument: bad[argument]}))
    assert caught.value.argument == ("layer.keys" if argument == "layer" else argument)


@pytest.mark.parametrize("kv_format", ["int8", "int4"])
def test_what_is_too_large_for_a_scale_in_float16_is_stored_as_its_largest(
    device: torch.device, kv_format: KvFormat
) -> None:
    qkv = torch.full((len(POSITIONS), 3, 64), -1e9, device=device)
    layer = allocate_kv_layer(kv_format, 4, 1, 8, 64, device)
    run(qkv, layer, turns_table(rope_frequencies(64, 1e4).to(device), 64), 1, {})
    _, values = dequantize_kv(layer)
    assert values[1, :, 0].eq(-65504.0 * (127 if kv_format == "int8" else 7)).all()

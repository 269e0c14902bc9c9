"""Mixtures of experts: each row meets the experts that it chose and no other, in every format and size of block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.kernels.gpu.checks import ArgumentError
from meshlm.kernels.gpu.matrix import Matrix, WeightFormat, pack, unpack
from meshlm.kernels.gpu.moe import combine, grouped_matmul, mixture, route, stack_experts
from meshlm.kernels.gpu.moe_align import align, most_blocks
from meshlm.kernels.moe import reference_mixture, reference_route

FORMATS: dict[str, tuple[WeightFormat, Mapping[str, Any]]] = {
    "int4": ("int4", {}),
    "int4 with minimums": ("int4", {"group": 128, "minimum": True}),
    "int8": ("int8", {}),
    "int8 in 32": ("int8", {"group": 32}),
    "fp8": ("fp8", {}),
}


def values_of(matrix: Matrix) -> torch.Tensor:
    return matrix.clone() if isinstance(matrix, torch.Tensor) else unpack(matrix)


def made(name: str, rows: int, cols: int, device: torch.device) -> Matrix:
    weight = torch.randn(rows, cols, device=device) / cols**0.5
    if name == "dense":
        return weight
    format_, options = FORMATS[name]
    return pack(weight, format_, **options)


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["dense", *FORMATS])
@pytest.mark.parametrize(("rows", "experts", "active"), [(1, 4, 2), (7, 4, 2), (50, 2, 1)])
def test_a_mixture_is_the_weighted_sum_of_its_experts(
    name: str, rows: int, experts: int, active: int, device: torch.device
) -> None:
    router = torch.randn(experts, 64, device=device)
    parts = [(made(name, 48, 64, device), made(name, 64, 24, device)) for _ in range(experts)]
    values = [(values_of(gate_up), values_of(down)) for gate_up, down in parts]
    x = torch.randn(rows, 64, device=device)
    found = mixture(x, stack_experts(router, parts, active), "silu")
    most = 0.08 if name == "fp8" else 2e-6  # activations in fp8 have four digits
    assert error_of(found, reference_mixture(x, router, values, active, "silu")) < most


@settings(max_examples=15, deadline=None, derandomize=True)
@given(rows=st.integers(1, 90), experts=st.integers(1, 12), active=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_pair_has_a_place_in_a_block_of_its_expert(rows: int, experts: int, active: int, seed: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    random = torch.Generator().manual_seed(seed)
    chosen = torch.randint(-1, experts, (rows, active), generator=random, dtype=torch.int32)
    routed = align(chosen.to(device), experts)
    owners, order = routed.experts.tolist(), routed.order.view(-1, routed.block).tolist()
    assert len(owners) == most_blocks(rows * active, experts, routed.block)
    found: dict[int, int] = {}
    for owner, places in zip(owners, order, strict=True):
        if owner >= 0:
            found |= {pair: owner for pair in places if pair != routed.pairs}
    expected = {pair: expert for pair, expert in enumerate(chosen.flatten().tolist()) if expert >= 0}
    assert found == expected
    filled = [owner for owner in owners if owner >= 0]
    assert owners == sorted(filled) + [-1] * (len(owners) - len(filled))


def test_the_bound_of_blocks_is_reached(device: torch.device) -> None:
    chosen = torch.tensor([[0], [1], [2]] + [[3]] * 17, dtype=torch.int32, device=device)
    routed = align(chosen, 4)
    assert (routed.block, most_blocks(20, 4, 16)) == (16, 5)
    assert routed.experts.tolist() == [0, 1, 2, 3, 3]


@pytest.mark.parametrize(("experts", "active"), [(8, 2), (5, 3), (128, 8), (1, 1)])
def test_routes_are_those_of_the_largest_logits(experts: int, active: int, device: torch.device) -> None:
    logits = torch.randn(7, experts, device=device)
    logits[3] = 1.0  # all alike: the first experts, in equal shares
    shares, chosen = route(logits, active)
    expected_shares, expected = reference_route(logits, active)
    assert torch.equal(chosen.long(), expected)
    torch.testing.assert_close(shares.double(), expected_shares, rtol=1e-5, atol=1e-6)


def test_the_reference_chooses_as_topk_does() -> None:
    logits = torch.randn(20, 8)
    top, chosen = torch.topk(logits, 2)
    shares, expected = reference_route(logits, 2)
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(torch.softmax(top, -1).double(), shares, rtol=1e-6, atol=1e-7)


def test_rows_without_an_expert_are_0(device: torch.device) -> None:
    stack = torch.randn(2 * 32, 64, device=device)
    chosen = torch.tensor([[0, 1], [-1, -1], [1, -1]], dtype=torch.int32, device=device)
    shares, x = torch.full((3, 2), 0.5, device=device), torch.randn(3, 64, device=device)
    parts = grouped_matmul(x, stack, align(chosen, 2), 2)
    found = combine(parts, shares, chosen)
    first, second = stack[:32].double().t(), stack[32:].double().t()
    expected = torch.stack([x[0].double() @ (first + second), torch.zeros_like(found[0]), x[2].double() @ second]) / 2
    assert error_of(found, expected) < 2e-6


def test_stacked_experts_are_held_once(device: torch.device) -> None:
    parts = [(made("int4 with minimums", 8, 64, device), made("dense", 64, 8, device)) for _ in range(3)]
    before = [values_of(gate_up) for gate_up, _ in parts]
    stacked = stack_experts(torch.randn(3, 64, device=device), parts, 1)
    codes = [gate_up.codes for gate_up, _ in parts if not isinstance(gate_up, torch.Tensor)]
    assert len({one.untyped_storage().data_ptr() for one in codes}) == 1
    torch.testing.assert_close(values_of(stacked.gate_up), torch.cat(before))
    assert stacked.nbytes == 3 * (64 * 4 + 8 * (32 + 2 * 2) + 64 * 8 * 4)


def test_what_cannot_be_mixed_is_named(device: torch.device) -> None:
    stack, x = torch.randn(6, 64, device=device), torch.randn(3, 64, device=device)
    chosen = torch.zeros(3, 2, dtype=torch.int32, device=device)
    routed, logits = align(chosen, 2), torch.randn(3, 2, device=device)
    shares = torch.zeros(3, 2, device=device)
    cases = {
        "logits": lambda: route(logits.double(), 1),
        "active": lambda: route(logits, 3),
        "x": lambda: grouped_matmul(x[:2], stack, routed, 2),
        "stack": lambda: grouped_matmul(x, stack[:5], routed, 2),
        "activation": lambda: grouped_matmul(x, stack, routed, 2, activation="silu"),
        "out": lambda: grouped_matmul(x, stack, routed, 2, out=x),
        "parts": lambda: combine(x, shares, chosen),
        "shares": lambda: combine(x.repeat(2, 1), shares[:2], chosen),
        "experts": lambda: stack_experts(logits[:2], [(stack, stack), (made("int8", 6, 64, device), stack)], 1),
    }
    for argument, call in cases.items():
        with pytest.raises(ArgumentError) as raised:
            call()
        assert raised.value.argument == argument

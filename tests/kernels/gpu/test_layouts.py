"""Weights of AWQ and GPTQ, packed here word by word as their formats say, keep their values."""

from __future__ import annotations

import pytest
import torch

from meshlm.kernels.gpu.checks import ArgumentError
from meshlm.kernels.gpu.layouts import from_awq, from_gptq
from meshlm.kernels.gpu.matrix import unpack

ROWS, COLS = 16, 128


def signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def awq_words(values: torch.Tensor) -> torch.Tensor:
    """(n, rows) to (n, rows / 8): AutoAWQ's loop over order_map."""
    words = [
        [signed(sum(int(line[8 * word + column]) << 4 * i for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7))))
         for word in range(len(line) // 8)]
        for line in values
    ]  # fmt: skip
    return torch.tensor(words, dtype=torch.int32)


def gptq_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """(n, m) to (n, m * bits / 32)."""
    each = 32 // bits
    words = [
        [signed(sum(int(line[each * word + i]) << bits * i for i in range(each))) for word in range(len(line) // each)]
        for line in values
    ]
    return torch.tensor(words, dtype=torch.int32)


def quantized(bits: int, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes (rows, cols), zeros and scales (groups, rows), the weight (rows, cols)."""
    codes = torch.randint(0, 1 << bits, (ROWS, COLS))
    zeros = torch.randint(1, 1 << bits, (groups, ROWS))
    scales = (torch.rand(groups, ROWS) * 0.01).half()
    columns = torch.arange(COLS) // (COLS // groups)
    weight = (codes - zeros[columns].t()) * scales[columns].t().float()
    return codes, zeros, scales, weight


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_awq_keeps_its_values(groups: int, device: torch.device) -> None:
    codes, zeros, scales, weight = quantized(4, groups)
    matrix = from_awq(awq_words(codes.t()), awq_words(zeros), scales, device=device)
    assert matrix.group == COLS // groups
    torch.testing.assert_close(unpack(matrix).cpu(), weight, rtol=0, atol=1e-4)  # minimums are float16: 2^-12 of 0.15


@pytest.mark.parametrize("groups", [1, 4])
def test_gptq_keeps_its_values(groups: int, device: torch.device) -> None:
    codes, zeros, scales, weight = quantized(4, groups)
    g_idx = torch.arange(COLS, dtype=torch.int32) // (COLS // groups)
    matrix = from_gptq(gptq_words(codes, 4).t(), gptq_words(zeros - 1, 4), scales, g_idx, device=device)
    torch.testing.assert_close(unpack(matrix).cpu(), weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_in_the_middle_need_no_minimums(bits: int, device: torch.device) -> None:
    codes, zeros, scales, _ = quantized(bits, 1)
    zeros = torch.full_like(zeros, 1 << bits - 1)
    matrix = from_gptq(gptq_words(codes, bits).t(), gptq_words(zeros - 1, bits), scales, bits=bits, device=device)
    assert matrix.minimums is None
    expected = (codes - zeros.t()) * scales.t().float()
    torch.testing.assert_close(unpack(matrix).cpu(), expected, rtol=1e-6, atol=0)


def test_a_scale_of_many_columns_is_that_of_each_of_their_groups(device: torch.device) -> None:
    codes, zeros, scales = torch.randint(0, 16, (8, 512)), torch.full((2, 8), 8), torch.rand(2, 8).half()
    matrix = from_gptq(gptq_words(codes, 4).t(), gptq_words(zeros - 1, 4), scales, device=device)
    assert (matrix.group, matrix.scales.shape) == (128, (4, 8))
    expected = (codes - 8) * scales.t().float().repeat_interleave(256, 1)
    torch.testing.assert_close(unpack(matrix).cpu(), expected)


def test_what_cannot_be_repacked_is_named() -> None:
    codes, zeros, scales, _ = quantized(4, 4)
    qweight, qzeros = gptq_words(codes, 4).t(), gptq_words(zeros - 1, 4)
    scattered = torch.arange(COLS) % 4
    eight = gptq_words(torch.randint(0, 256, (ROWS, COLS)), 8).t()
    cases = {
        "g_idx": lambda: from_gptq(qweight, qzeros, scales, scattered),
        "qweight": lambda: from_awq(qweight.long(), qzeros, scales),
        "qzeros": lambda: from_gptq(eight, gptq_words(torch.full((4, ROWS), 9), 8), scales, bits=8),
        "scales": lambda: from_gptq(qweight[:12], qzeros, scales),
        "bits": lambda: from_gptq(qweight, qzeros, scales, bits=3),
    }
    for argument, call in cases.items():
        with pytest.raises(ArgumentError) as raised:
            call()
        assert raised.value.argument == argument

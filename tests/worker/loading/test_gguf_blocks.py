"""Blocks taken over as codes are the weights that the `gguf` package dequantizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize as their_dequantize

from meshlm.kernels.quantize import dequantize
from meshlm.worker.loading.gguf_blocks import group_quantized
from tests.worker.loading.test_gguf_file import SHAPE, raw_tensor

EXACT = {Kind.Q4_0: 4, Kind.Q4_1: 4, Kind.Q5_0: 8, Kind.Q8_0: 8}


@pytest.mark.oracle
@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
def test_blocks_of_32_are_taken_over_exactly(kind: Kind) -> None:
    raw = raw_tensor(kind)
    taken = group_quantized(raw, kind)
    assert taken is not None
    assert taken.bits == EXACT[kind]
    assert taken.shape == SHAPE
    expected = np.array(their_dequantize(raw, kind).reshape(SHAPE))
    assert torch.equal(dequantize(taken), torch.from_numpy(expected))


@pytest.mark.oracle
def test_q4_k_is_taken_over_but_for_the_rounding_of_its_scales() -> None:
    random = np.random.default_rng(0)
    raw = random.integers(0, 256, (SHAPE[0], SHAPE[1] // 256, 144), dtype=np.uint8)
    raw[..., 0:4] = random.uniform(0.005, 0.02, (*raw.shape[:2], 2)).astype(np.float16).view(np.uint8)
    flat = raw.reshape(SHAPE[0], -1)
    taken = group_quantized(flat, Kind.Q4_K)
    assert taken is not None
    assert taken.minimums is not None
    expected = torch.from_numpy(np.array(their_dequantize(flat, Kind.Q4_K)))
    # fp16 has 11 significant bits: half a step of scale * 15 and of the minimum.
    error = (dequantize(taken) - expected).abs()
    bound = (taken.scales.float() * 15 + taken.minimums.float().abs()) * 2**-11
    assert bool((error <= bound.repeat_interleave(32, 1)).all())
    assert float(expected.std()) > 1


@pytest.mark.parametrize("kind", [Kind.Q5_1, Kind.Q5_K, Kind.Q6_K, Kind.F32, Kind.BF16], ids=lambda kind: kind.name)
def test_types_without_such_a_form_are_left_to_be_read(kind: Kind) -> None:
    assert group_quantized(raw_tensor(kind), kind) is None

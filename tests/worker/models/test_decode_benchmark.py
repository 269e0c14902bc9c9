"""The benchmark of a whole decode step, at a tiny shape: what it will measure on a GPU runs here."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("weights", ["bf16", "int4"])
def test_a_step_of_random_weights_draws_a_token_for_each_sequence(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import decode_step

    tiny = replace(
        decode_step.LLAMA_8B, vocab_size=96, hidden_size=128, intermediate_size=192, layers=2, heads=4, kv_heads=2,
        head_dim=32, max_context=128,
    )  # fmt: skip
    dtype = torch.float32
    model = decode_step.GpuDecoder(decode_step.random_decoder(tiny, weights, DEVICE, dtype), dtype, DEVICE)
    step = decode_step.Step(model, 3, 40, "float32")
    step.capture()
    step()
    tokens, logprobs = (part.tolist() for part in step.drawn)
    assert all(0 <= token < 96 for token in tokens)
    assert all(-30 < logprob < 0 for logprob in logprobs)

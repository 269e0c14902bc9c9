"""Our Llama against transformers' on the same weights, read back from files."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from meshlm.worker.loading.opening import open_checkpoint
from tests.worker.models.decoding import chunk, decoder_for, empty_cache, our_logits, their_logits

pytestmark = pytest.mark.oracle

SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries, tied head": {},
    "one key head, untied head": {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "no grouping, head_dim of its own": {"num_key_value_heads": 6, "head_dim": 16},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3 scaling": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(tiny_llama: Callable[..., tuple[Path, Any]], shape: str) -> None:
    folder, model = tiny_llama(**SHAPES[shape])
    tokens = torch.randint(3, 160, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = their_logits(model, tokens)
    assert expected.std() > 0.1  # the model says something
    torch.testing.assert_close(our_logits(decoder_for(folder), tokens, 130), expected, atol=1e-4, rtol=1e-4)


def test_parameters_are_counted_as_transformers_counts_them(tiny_llama: Callable[..., tuple[Path, Any]]) -> None:
    folder, model = tiny_llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    assert open_checkpoint(folder).config.parameters == model.num_parameters()


def test_a_bfloat16_model_runs_close_to_float32(tiny_llama: Callable[..., tuple[Path, Any]]) -> None:
    folder, model = tiny_llama(attention_bias=True, mlp_bias=True)
    tokens = list(range(3, 60))
    expected = their_logits(model, tokens)
    ours = our_logits(decoder_for(folder, torch.bfloat16), tokens, 50, torch.bfloat16)
    assert float((ours - expected).norm() / expected.norm()) < 0.03


def test_a_chunk_gives_the_same_logits_however_the_prompt_was_cut(
    tiny_llama: Callable[..., tuple[Path, Any]],
) -> None:
    """Chunked prefill, and reuse of a prefix that is in the cache already, change nothing."""
    folder, _ = tiny_llama()
    decoder = decoder_for(folder)
    cache = empty_cache(decoder)
    tokens = torch.randint(3, 160, (180,), generator=torch.Generator().manual_seed(3)).tolist()
    whole = decoder.forward(chunk(decoder, tokens, 0, 180, decode=False), cache)[-1]
    for cuts in ([0, 64, 180], [0, 16, 17, 100, 179, 180], [96, 180]):  # the last one finds [0, 96) stored
        for start, end in itertools.pairwise(cuts):
            last = decoder.forward(chunk(decoder, tokens, start, end, decode=False), cache)[-1]
        # Not the same bits: the matrix library sums in an order that depends on the number of rows.
        torch.testing.assert_close(last, whole, atol=1e-5, rtol=1e-5)

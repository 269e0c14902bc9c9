"""Our Llama against transformers' on the same weights, read back from files."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from meshlm.worker.engine.load import RunnerSettings, load_runner
from meshlm.worker.engine.runner import TorchRunner
from meshlm.worker.engine.sequence import Chunk, Sequence
from meshlm.worker.messages import Limits, Sampling, Submit

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


def quiet(stage: str, done: int, total: int) -> None:
    pass


def runner_for(path: Path, **changes: Any) -> TorchRunner:
    return load_runner(
        RunnerSettings(model=path, threads=1, kv_blocks=64, **({"quantization": "none"} | changes)), quiet
    )


def sequence(tokens: list[int], prompt: int, blocks: list[int]) -> Sequence:
    request = Submit(id="s", prompt=tokens[:prompt], sampling=Sampling(), limits=Limits(max_tokens=1))
    return Sequence(request, list(tokens), blocks=blocks)


def chunked_logits(runner: TorchRunner, tokens: list[int], cuts: list[int], prompt: int) -> torch.Tensor:
    """The last logits of each chunk [cuts[i], cuts[i + 1]): (chunks, vocab)."""
    one = sequence(tokens, prompt, [9, 3, 30, 1, 7, 22, 5, 40, 41, 42, 43, 44])
    chunks = [Chunk(one, start, end - start, True) for start, end in itertools.pairwise(cuts)]
    return torch.cat([runner.logits([chunk]) for chunk in chunks])


def their_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(tiny_llama: Callable[..., tuple[Path, Any]], shape: str) -> None:
    folder, model = tiny_llama(**SHAPES[shape])
    tokens = torch.randint(3, 160, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = their_logits(model, tokens)
    runner = runner_for(folder)
    cuts = [0, 1, 63, 100, 140]
    ours = chunked_logits(runner, tokens, [*cuts, *range(141, 151)], prompt=140)  # the last ten go the decode way
    ends = [end - 1 for end in [*cuts[1:], *range(141, 151)]]
    assert expected.std() > 0.1  # the model says something
    torch.testing.assert_close(ours, expected[ends], atol=1e-4, rtol=1e-4)


def test_parameters_are_counted_as_transformers_counts_them(tiny_llama: Callable[..., tuple[Path, Any]]) -> None:
    folder, model = tiny_llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    assert runner_for(folder).facts.parameters == model.num_parameters()


def test_a_sharded_folder_equals_the_model(tiny_llama: Callable[..., tuple[Path, Any]]) -> None:
    folder, model = tiny_llama(save={"max_shard_size": "60KB"})
    assert len(list(folder.glob("*.safetensors"))) > 1
    tokens = list(range(3, 40))
    ours = chunked_logits(runner_for(folder), tokens, [0, 37], prompt=37)
    torch.testing.assert_close(ours[0], their_logits(model, tokens)[-1], atol=1e-4, rtol=1e-4)


def test_a_bfloat16_model_runs_close_to_float32(tiny_llama: Callable[..., tuple[Path, Any]]) -> None:
    folder, model = tiny_llama()
    tokens = list(range(3, 60))
    expected = their_logits(model, tokens)[-1]
    ours = chunked_logits(runner_for(folder, dtype="bfloat16"), tokens, [0, 50, 57], prompt=57)[-1]
    assert float((ours - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("shape", ["grouped queries, tied head", "one key head, untied head", "biases"])
def test_int8_stays_close_to_float32(tiny_llama: Callable[..., tuple[Path, Any]], shape: str) -> None:
    folder, model = tiny_llama(**SHAPES[shape])
    tokens = torch.randint(3, 160, (90,), generator=torch.Generator().manual_seed(2)).tolist()
    expected = their_logits(model, tokens)[[49, 89]]
    ours = chunked_logits(runner_for(folder, quantization="int8"), tokens, [0, 50, 90], prompt=90)
    assert float((ours - expected).norm() / expected.norm()) < 0.06


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_chunk_gives_the_same_logits_however_the_prompt_was_cut(
    tiny_llama: Callable[..., tuple[Path, Any]], quantization: str
) -> None:
    """Chunked prefill, and reuse of a prefix that is in the cache already, change nothing."""
    folder, _ = tiny_llama()
    runner = runner_for(folder, quantization=quantization)
    tokens = torch.randint(3, 160, (180,), generator=torch.Generator().manual_seed(3)).tolist()
    whole = chunked_logits(runner, tokens, [0, 180], prompt=180)[-1]
    for cuts in ([0, 64, 180], [0, 16, 17, 100, 179, 180], [96, 180]):  # the last one finds [0, 96) stored
        cut = chunked_logits(runner, tokens, cuts, prompt=180)[-1]
        if quantization == "int8":
            assert torch.equal(cut, whole)
        else:  # the matrix library sums in an order that depends on the number of rows
            torch.testing.assert_close(cut, whole, atol=1e-5, rtol=1e-5)

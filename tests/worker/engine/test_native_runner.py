"""The native runner: the same bits however the work is cut, scores and vectors, careful draws, KV budgets."""

from __future__ import annotations

import itertools
import random
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from meshlm.worker.engine.load import load_runner
from meshlm.worker.engine.native_runner import NativeRunner
from meshlm.worker.engine.sequence import Chunk, ChunkPool, ChunkScores, Sampled, Sequence, StepOutOfMemory
from meshlm.worker.engine.settings import RunnerSettings
from meshlm.worker.messages import KvBudget, Limits, Sampling, Submit

transformers = pytest.importorskip("transformers")

BLOCK = 16
VOCABULARY = 96
numbers = itertools.count()


def runner_for(path: Path, engine: Any = "native", **changes: Any) -> Any:
    settings: dict[str, Any] = {"quantization": "auto", "kv_dtype": "float32", "kv_blocks": 64, "threads": 2} | changes
    if engine == "torch":
        settings |= {"quantization": "none", "kv_dtype": "auto"}
    return load_runner(RunnerSettings(model=path, engine=engine, **settings), lambda stage, done, total: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "two", layers=2)


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "one", layers=1)


def save(path: Path, layers: int) -> Path:
    """A tiny random Llama."""
    torch.manual_seed(layers)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(path)
    return path


def sequence(tokens: list[int], first_block: int = 0, blocks: int = 16, **request: Any) -> Sequence:
    defaults: dict[str, Any] = {"sampling": Sampling(temperature=0.0), "limits": Limits(max_tokens=99)}
    submit = Submit(id=str(next(numbers)), prompt=list(tokens), **(defaults | request))
    return Sequence(submit, list(tokens), blocks=list(range(first_block, first_block + blocks)))


def random_tokens(count: int, seed: int = 0) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(VOCABULARY) for _ in range(count)]


def chunks_of(one: Sequence, cuts: list[int]) -> list[Chunk]:
    edges = [0, *cuts, len(one.tokens)]
    return [Chunk(one, a, b - a, b == len(one.tokens)) for a, b in itertools.pairwise(edges)]


def logits_of(runner: Any, chunks: list[Chunk]) -> torch.Tensor:
    return torch.as_tensor(runner.logits(chunks))


def last_logits(
    runner: NativeRunner, one: Sequence, cuts: list[int], others: list[Chunk] | None = None
) -> torch.Tensor:
    for chunk in chunks_of(one, cuts):
        out = logits_of(runner, [*(others or []), chunk])
    return out[-1]


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_a_position_gets_the_same_bits_however_the_work_is_cut(folder: Path, kv_dtype: str, quantization: str) -> None:
    runner = runner_for(folder, kv_dtype=kv_dtype, quantization=quantization)
    tokens = random_tokens(150)
    whole = last_logits(runner, sequence(tokens), [])
    assert torch.isfinite(whole).all()
    assert torch.equal(whole, last_logits(runner, sequence(tokens), [1, 2, 17, 64, 65, 149]))
    assert torch.equal(whole, last_logits(runner, sequence(tokens), list(range(1, 150))))
    crowd = [Chunk(sequence(random_tokens(n, n), 16 + 3 * n % 40, 3), 0, n, n % 2 == 0) for n in (1, 5, 33, 2)]
    assert torch.equal(whole, last_logits(runner, sequence(tokens), [75], crowd))


def test_a_few_large_channels_of_keys_leave_the_others_their_4_bits(tmp_path: Path) -> None:
    """Keys of every head get a channel 40 times as large, whose queries are as much smaller: the same products."""
    model = transformers.LlamaForCausalLM.from_pretrained(save(tmp_path / "plain", layers=2))
    with torch.no_grad():
        for layer in model.model.layers:
            # Channels 1 and 9 of 16 turn together: both, or rotation would mix large and small.
            layer.self_attn.k_proj.weight.view(2, 16, 64)[:, [1, 9]] *= 40
            layer.self_attn.q_proj.weight.view(4, 16, 64)[:, [1, 9]] /= 40
    model.save_pretrained(tmp_path / "large")
    tokens = random_tokens(200)

    exact, rounded = (
        last_logits(runner_for(tmp_path / "large", kv_dtype=kv, quantization="none"), sequence(tokens), [])
        for kv in ("float32", "int4")
    )
    # 1.3 with one scale a token and head, 0.6 with factors a channel; of the plain model 0.66 and 0.29.
    assert (exact - rounded).norm() < 0.8 * exact.norm()


def test_unquantized_logits_equal_torchs(folder: Path) -> None:
    tokens = random_tokens(90)
    ours = last_logits(runner_for(folder, quantization="none"), sequence(tokens), [40])
    theirs = last_logits(runner_for(folder, "torch"), sequence(tokens), [])
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def scores(runner: Any, tokens: list[int], start: int, cuts: list[int]) -> tuple[list[float], list[float]]:
    logprobs: list[float] = []
    entropies: list[float] = []
    for chunk in chunks_of(sequence(tokens, score_from=start), cuts):
        [part] = runner.run([Chunk(chunk.sequence, chunk.start, chunk.count, False)])
        assert isinstance(part, ChunkScores)
        logprobs += part.logprobs
        entropies += part.entropies
    return logprobs, entropies


def test_scores_equal_torchs_and_do_not_depend_on_the_cuts(folder: Path) -> None:
    tokens, native = random_tokens(100), runner_for(folder, quantization="none")
    logprobs, entropies = scores(native, tokens, 37, [])
    assert len(logprobs) == len(entropies) == 63
    assert (logprobs, entropies) == scores(native, tokens, 37, [1, 36, 37, 38, 70])
    theirs = scores(runner_for(folder, "torch"), tokens, 37, [50])
    torch.testing.assert_close(torch.tensor([logprobs, entropies]), torch.tensor(theirs), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_pooled_states_equal_torchs(folder: Path, pool: Any) -> None:
    tokens, vectors = random_tokens(40), []
    for runner in (runner_for(folder, quantization="none"), runner_for(folder, "torch")):
        parts = []
        for chunk in chunks_of(sequence(tokens, pool=pool), [25]):
            [part] = runner.run([Chunk(chunk.sequence, chunk.start, chunk.count, False)])
            assert isinstance(part, ChunkPool)
            parts.append(torch.tensor(part.vector))
        vectors.append(sum(parts) / 40 if pool == "mean" else parts[-1])
    torch.testing.assert_close(vectors[0], vectors[1], atol=1e-3, rtol=1e-4)


def test_a_neighbour_that_wants_log_probabilities_changes_nobodys_token(folder: Path) -> None:
    runner = runner_for(folder)
    sampling = Sampling(temperature=0.9, top_p=0.9, seed=5)

    def draw(companion: Sampling) -> list[Any]:
        batch = [
            sequence(random_tokens(20), 0, 2, sampling=sampling),
            sequence(random_tokens(9), 2, 2, sampling=companion),
        ]
        return runner.run([Chunk(one, 0, len(one.tokens), True) for one in batch])

    plain, careful = draw(sampling), draw(Sampling(temperature=0.9, top_p=0.9, seed=5, logprobs=3))
    assert plain[0] == careful[0]
    assert isinstance(careful[1], Sampled)
    assert plain[1].token == careful[1].token
    assert len(careful[1].top) == 3
    assert careful[1].logprob is not None


@pytest.mark.skipif(sys.platform != "linux", reason="a thread's page faults are told by Linux")
def test_the_caches_memory_is_there_before_the_first_request_and_no_step_waits_for_it(folder: Path) -> None:
    data = runner_for(folder, kv_blocks=400).decoder.cache.data  # 3 MB: in small pages
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    assert data[::4096].shape[0] > 700
    data[::4096].max()
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < 100


def test_a_step_without_memory_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_for(folder)
    with monkeypatch.context() as patched:
        patched.setattr(runner.decoder, "_step", lambda handle, step: 1)
        with pytest.raises(StepOutOfMemory):
            runner.run([Chunk(sequence(random_tokens(4)), 0, 4, True)])
    assert isinstance(runner.run([Chunk(sequence(random_tokens(4)), 0, 4, True)])[0], Sampled)


def test_a_window_gives_what_the_kept_tokens_alone_give(one_layer: Path) -> None:
    """In one layer keys depend on token and position alone: a re-based cache equals the shorter text."""
    runner = runner_for(one_layer, quantization="none")
    tokens = random_tokens(120)
    budgeted = sequence(tokens, kv=KvBudget(policy="window", tokens=64, sinks=16))
    for chunk in chunks_of(budgeted, [96])[:1]:
        logits_of(runner, [chunk])
    budgeted.computed = 96
    del budgeted.blocks[1:4]  # what the scheduler does: three blocks behind the sinks go
    budgeted.evicted = 48
    kept = tokens[:16] + tokens[64:]
    ours = logits_of(runner, [Chunk(budgeted, 96, 24, True)])[0]
    torch.testing.assert_close(ours, last_logits(runner, sequence(kept, 20), []), atol=1e-4, rtol=1e-4)


def test_compaction_keeps_the_token_that_matters_and_the_latest(one_layer: Path) -> None:
    """Of nearly everything kept, the next logits hardly change; of half, they change more, and stay finite."""
    runner = runner_for(one_layer, quantization="none")
    tokens, budget = random_tokens(97), KvBudget(policy="importance", tokens=64)

    def next_logits(keep: int | None) -> torch.Tensor:
        one = sequence(tokens[:96], kv=budget)
        one.tokens.append(tokens[96])
        logits_of(runner, [Chunk(one, 0, 96, False)])
        one.computed = 96
        if keep is not None:
            runner.compact(one, keep)
            one.evicted = 96 - keep
        return torch.log_softmax(logits_of(runner, [Chunk(one, 96, 1, True)])[0], -1)

    full, most, half = next_logits(None), next_logits(92), next_logits(48)
    assert torch.equal(full, next_logits(96))

    def divergence(other: torch.Tensor) -> float:
        return float((full.exp() * (full - other)).sum())

    assert divergence(most) < divergence(half)
    assert torch.isfinite(half).all()


def test_what_a_prompt_keeps_by_importance_does_not_depend_on_its_cuts_nor_on_who_had_the_blocks(folder: Path) -> None:
    runner = runner_for(folder)
    tokens, budget = random_tokens(100), KvBudget(policy="importance", tokens=48)

    def next_logits(cuts: list[int]) -> torch.Tensor:
        """Of a text that lets go twice: 64 of 100 tokens of its prompt, and then a block behind 13 tokens more."""
        one = sequence(tokens, kv=budget)
        one.tokens += random_tokens(14, seed=1)
        edges = [0, *cuts, *range(100, 114)]
        for start, end in itertools.pairwise(edges):
            logits_of(runner, [Chunk(one, start, end - start, False)])
            one.computed = end
            if end >= 100 and end - one.evicted > 48:
                evicted = 64 if end == 100 else 80
                runner.compact(one, end - evicted)
                one.evicted = evicted
        assert one.evicted == 80
        return logits_of(runner, [Chunk(one, 113, 1, True)])[0]

    whole = next_logits([])
    assert torch.isfinite(whole).all()
    for cuts in ([68], [1, 16, 17, 50], list(range(1, 69))):
        assert torch.equal(whole, next_logits(cuts))
    assert not torch.equal(whole, next_logits([90]))  # ten queries say something else than 32


def test_a_prompt_is_scored_by_its_last_queries_alone(folder: Path) -> None:
    """Chunks before the last leave no trace in the scores, whatever the blocks held before."""
    runner = runner_for(folder)
    one = sequence(random_tokens(100), kv=KvBudget(policy="importance", tokens=48))
    runner.decoder.importance[:, one.blocks] = 7.0
    for chunk in chunks_of(one, [60]):
        logits_of(runner, [chunk])
    scores = torch.from_numpy(runner.decoder.importance[:, one.blocks]).transpose(1, 2).flatten(2)[..., :100]
    # Each of the 32 queries of the 2 heads that share a kv head spreads a probability of 1.
    torch.testing.assert_close(scores.sum(-1), torch.full(scores.shape[:2], 64.0), atol=1e-2, rtol=0)

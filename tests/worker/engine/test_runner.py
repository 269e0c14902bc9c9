"""The runner on the real model: transformers' logits and tokens, batch invariance, and memory that runs out."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from meshlm.worker.engine.engine import Engine
from meshlm.worker.engine.load import load_runner
from meshlm.worker.engine.scheduler import SchedulerSettings
from meshlm.worker.engine.sequence import Chunk, Sequence, StepOutOfMemory
from meshlm.worker.engine.settings import RunnerSettings, SettingsError
from meshlm.worker.loading.opening import open_checkpoint
from meshlm.worker.messages import Limits, Sampling, Submit
from meshlm.worker.text.chat_template import ChatTemplate
from meshlm.worker.text.tokenizer import Tokenizer

pytestmark = pytest.mark.model

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain why the sky is blue in two sentences.",
    "List three uses of a paper clip.",
    "def add(a, b):",
]
BLOCKS_EACH = 10


SETTINGS: dict[str, dict[str, Any]] = {
    "torch": {"engine": "torch"},
    "native float32": {"engine": "native", "quantization": "none", "kv_dtype": "float32"},
    "native": {"engine": "native"},
    "native int8": {"engine": "native", "quantization": "int8", "kv_dtype": "int8"},
}
native = pytest.mark.parametrize("runner", ["native"], indirect=True)
exact = pytest.mark.parametrize("runner", ["torch", "native float32"], indirect=True)


@pytest.fixture(scope="module", params=SETTINGS)
def runner(request: pytest.FixtureRequest, smollm2_path: Path) -> Any:
    settings = RunnerSettings(model=smollm2_path, threads=2, kv_blocks=200, step_tokens=1024, **SETTINGS[request.param])
    return load_runner(settings, lambda stage, done, total: None)


@pytest.fixture(scope="module")
def prompts(smollm2_path: Path) -> list[list[int]]:
    tokenizer = Tokenizer.load(smollm2_path)
    assert tokenizer.facts.chat_template is not None
    template = ChatTemplate(tokenizer.facts.chat_template, tokenizer)
    return [template.encode([{"role": "user", "content": question}]) for question in QUESTIONS]


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> Any:
    """transformers' Llama with the weights that the file holds."""
    transformers = pytest.importorskip("transformers")
    checkpoint = open_checkpoint(smollm2_path)
    config = checkpoint.config
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.max_context,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    )
    weights = {name: checkpoint.read(name) for name in checkpoint.names}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (set(missing), unexpected) == ({"lm_head.weight"}, [])
    return model.eval()


def sequences(prompts: list[list[int]], **sampling: Any) -> list[Sequence]:
    """One sequence a prompt, seeded by its place, each with blocks of its own."""
    return [
        Sequence(
            Submit(
                id=str(index), prompt=prompt, sampling=Sampling(seed=index, **sampling), limits=Limits(max_tokens=99)
            ),
            list(prompt),
            blocks=list(range(index * BLOCKS_EACH, (index + 1) * BLOCKS_EACH)),
        )
        for index, prompt in enumerate(prompts)
    ]


def generate(runner: Any, batch: list[Sequence], count: int) -> list[list[int]]:
    for step in range(count):
        chunks = [Chunk(one, len(one.tokens) - 1 if step else 0, 1 if step else len(one.tokens), True) for one in batch]
        for one, entry in zip(batch, runner.run(chunks), strict=True):
            assert entry is not None
            one.tokens.append(entry.token)
    for one in batch:
        runner.forget(one)
    return [one.tokens[one.prompt_length :] for one in batch]


@pytest.mark.oracle
@exact
def test_greedy_tokens_and_logits_equal_transformers(runner: Any, reference: Any, prompts: list[list[int]]) -> None:
    ours = generate(runner, sequences(prompts, temperature=0.0), 64)
    for prompt, tokens in zip(prompts, ours, strict=True):
        with torch.no_grad():
            expected = reference(torch.tensor([prompt + tokens])).logits[0]
        # Teacher forcing on our own tokens: their choice at each place, without 64 steps of generate.
        assert expected[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
        [one] = sequences([prompt + tokens], temperature=0.0)
        last = torch.as_tensor(runner.logits([Chunk(one, 0, len(one.tokens), True)])[0])
        torch.testing.assert_close(last, expected[-1], atol=1e-3, rtol=0)


@pytest.mark.oracle
@pytest.mark.parametrize("runner", ["native", "native int8"], indirect=True)
def test_quantized_activations_and_keys_keep_the_models_distribution(
    runner: Any, reference: Any, prompts: list[list[int]]
) -> None:
    """Mean KL divergence from float32 over the answers' first tokens, in nats; one scale a row gave about 0.2."""
    divergence = []
    for prompt in prompts:
        [one] = sequences([prompt])
        ours = torch.log_softmax(torch.as_tensor(runner.logits([Chunk(one, 0, len(prompt), True)])[0]), -1)
        with torch.no_grad():
            theirs = torch.log_softmax(reference(torch.tensor([prompt])).logits[0, -1], -1)
        divergence.append(float((theirs.exp() * (theirs - ours)).sum()))
    assert sum(divergence) / len(divergence) < 0.02


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_request_gives_the_same_tokens_alone_and_among_fifteen_others(
    runner: Any, prompts: list[list[int]], temperature: float
) -> None:
    source = random.Random(0)
    crowd = [[source.randrange(20, 40_000) for _ in range(source.randint(1, 90))] for _ in range(11)]
    every = prompts + crowd
    together = generate(runner, sequences(every, temperature=temperature, top_p=0.95), 16)
    for index in (0, 1, 3, 9):
        alone = sequences(every, temperature=temperature, top_p=0.95)[index]
        assert generate(runner, [alone], 16)[0] == together[index]


@pytest.mark.parametrize("runner", ["torch"], indirect=True)
def test_a_step_without_memory_says_so_and_the_next_one_gives_the_right_token(
    runner: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    [expected] = generate(runner, sequences(prompts[:1], temperature=0.0, repetition_penalty=1.1), 3)
    batch = sequences(prompts[:1], temperature=0.0, repetition_penalty=1.1)
    for failure in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ):

        def fail(*_: Any, error: Exception = failure) -> torch.Tensor:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(runner._model, "residual", fail)
            with pytest.raises(StepOutOfMemory):
                runner.run([Chunk(batch[0], 0, len(batch[0].tokens), True)])
    assert generate(runner, batch, 3) == [expected]


@native
def test_a_chunk_that_does_not_sample_gives_none_and_results_keep_their_order(
    runner: Any, prompts: list[list[int]]
) -> None:
    first, second, third = sequences(prompts[:3], temperature=0.0)
    expected = generate(runner, sequences(prompts[:3], temperature=0.0), 2)
    third.tokens.append(runner.run([Chunk(third, 0, third.prompt_length, True)])[0].token)  # type: ignore[union-attr]
    results = runner.run(
        [
            Chunk(first, 0, 5, False),
            Chunk(second, 0, second.prompt_length, True),
            Chunk(third, third.prompt_length, 1, True),
        ]
    )
    assert results[0] is None
    assert [entry.token for entry in results[1:] if entry] == [expected[1][0], expected[2][1]]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"block_size": 12}, "block_size 12 is not a power of two"),
        ({"kv_memory": 1000}, "kv_memory is 1000 bytes; one block of this model takes"),
        ({"block_size": 8}, "block_size 8: the native engine wants multiples of 16"),
        ({"quantization": "int4", "engine": "torch"}, "quantization int4 needs the native engine"),
        ({"kv_dtype": "int8", "engine": "torch"}, "kv_dtype int8: torch's KV cache is of `dtype`"),
        ({"quantization": "fp8"}, "fp8 needs a GPU"),
        ({"engine": "native", "device": "meta"}, "runs on CPUs only"),
    ],
)
def test_settings_that_cannot_be_met_are_named(smollm2_path: Path, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        load_runner(RunnerSettings(model=smollm2_path, **settings), lambda stage, done, total: None)


def test_the_budget_decides_the_blocks_and_progress_is_told(smollm2_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    settings = RunnerSettings(model=smollm2_path, kv_dtype="float32", kv_memory=40_000_000, block_size=32, threads=2)
    facts = load_runner(settings, lambda *entry: told.append(entry)).facts
    block = 2 * 30 * 3 * 64 * 4 * 32  # keys and values, layers, heads, head_dim, float32, tokens
    assert (facts.total_blocks, facts.kv_bytes) == (40_000_000 // block, 40_000_000 // block * block)
    assert facts.parameters == 134_515_008
    assert told[29] == ("load", 30, 30)
    assert told[-1] == ("warm_up", 3, 3)


class FewBlocks:
    """The runner, owning up to only some of its blocks."""

    def __init__(self, runner: Any, blocks: int) -> None:
        self.facts = msgspec.structs.replace(runner.facts, total_blocks=blocks)
        self.run = runner.run
        self.forget = runner.forget


def served(runner: Any, requests: list[Submit], blocks: int) -> tuple[dict[str, list[int]], int]:
    """The tokens of each request by the whole engine, and how often one was preempted."""
    engine = Engine(FewBlocks(runner, blocks), SchedulerSettings())
    for request in requests:
        engine.submit(request)
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    while engine.busy:
        for drawn in engine.step().tokens:
            tokens[drawn.id].append(drawn.token)
    assert engine.blocks_in_use == 0
    return tokens, engine.scheduler.totals.preemptions


@native
def test_a_preempted_request_gives_the_tokens_it_gives_alone(runner: Any, prompts: list[list[int]]) -> None:
    sampling = {"temperature": 0.9, "frequency_penalty": 0.5}
    requests = [
        Submit(id=str(i), prompt=prompt, sampling=Sampling(seed=i, **sampling), limits=Limits(max_tokens=48), arrival=i)
        for i, prompt in enumerate(prompts)
    ]
    together, preemptions = served(runner, requests, blocks=18)  # each needs 5 to 6 at its end
    assert preemptions > 0
    for request in requests:
        alone, _ = served(runner, [request], blocks=18)
        assert alone[request.id] == together[request.id]

"""The GPU's whole path on a tiny model, interpreted where there is no GPU: the same tokens as torch's."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from meshlm.kernels.sample import OUTPUT, SEEN_IN_PROMPT
from meshlm.worker.engine.engine import Engine
from meshlm.worker.engine.flight import Row
from meshlm.worker.engine.gpu_graphs import DecodeGraphs, ladder
from meshlm.worker.engine.gpu_inputs import StepShape, device_inputs
from meshlm.worker.engine.gpu_memory import MemoryNeeds
from meshlm.worker.engine.gpu_runner import GpuRunner
from meshlm.worker.engine.load import load_runner
from meshlm.worker.engine.scheduler import SchedulerSettings
from meshlm.worker.engine.sequence import Chunk, ChunkPool, ChunkScores, Sequence
from meshlm.worker.engine.settings import RunnerSettings, SettingsError
from meshlm.worker.messages import Finish, Limits, NewToken, Sampling, Submit

pytest.importorskip("triton")
transformers = pytest.importorskip("transformers")

VOCABULARY = 96
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCHEDULING = SchedulerSettings(max_running=4, max_waiting=16, chunk_tokens=24, step_tokens=48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama: two layers, four heads of 32 over two of keys."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.25)
    model.save_pretrained(path)
    return path


def runner_for(path: Path, engine: str, **changes: Any) -> Any:
    defaults: dict[str, Any] = {
        "quantization": "none",
        "kv_blocks": 24,
        "dtype": "float32",
        "device": DEVICE if engine == "triton" else "cpu",
        "threads": 2,
        "max_running": SCHEDULING.max_running,
        "step_tokens": SCHEDULING.step_tokens,
    }
    settings = RunnerSettings(model=path, engine=engine, **(defaults | changes))  # type: ignore[arg-type]
    return load_runner(settings, lambda stage, done, total: None)


@pytest.fixture(scope="module")
def ours(folder: Path) -> GpuRunner:
    runner = runner_for(folder, "triton")
    assert isinstance(runner, GpuRunner)
    return runner


@pytest.fixture(scope="module")
def torchs(folder: Path) -> Any:
    return runner_for(folder, "torch")


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def requests() -> list[tuple[int, Submit]]:
    """When each comes, in steps, and what it asks for: all kinds of draws, prompts that arrive among decodes."""

    def asked(name: str, length: int, max_tokens: int, *, stop: tuple[int, ...] = (), **sampling: Any) -> Submit:
        sampled = Sampling(**({"temperature": 0.0} | sampling))
        limits = Limits(max_tokens=max_tokens, min_tokens=2 if stop else 0, stop_token_ids=frozenset(stop))
        return Submit(id=name, prompt=prompt(length, len(name) + length), sampling=sampled, limits=limits)

    return [
        (0, asked("greedy", 30, 7)),
        (0, asked("warm", 5, 8, temperature=0.9, seed=11)),
        (2, asked("filtered", 17, 6, temperature=1.2, top_k=20, top_p=0.9, min_p=0.02, seed=5)),
        (3, asked("penalized", 9, 5, temperature=0.8, repetition_penalty=1.4, presence_penalty=0.5, seed=2)),
        (5, asked("biased", 3, 4, logit_bias={7: 30.0, 8: -30.0})),
        (6, asked("stopped", 4, 12, stop=tuple(range(0, VOCABULARY, 4)), temperature=1.0, seed=9)),
        (7, asked("told", 6, 3, logprobs=3)),
    ]


def answers(runner: Any, blocks: int | None = None) -> tuple[dict[str, list[NewToken]], dict[str, Any]]:
    engine = Engine(runner, SCHEDULING)
    waiting, tokens, finished = requests(), {}, {}
    for step in itertools.count():
        for _, request in [entry for entry in waiting if entry[0] == step]:
            engine.submit(request)
        waiting = [entry for entry in waiting if entry[0] > step]
        if not (engine.busy or waiting):
            break
        report = engine.step()
        for token in report.tokens:
            tokens.setdefault(token.id, []).append(token)
        finished |= {end.id: end for end in report.finished}
        assert step < 200
    assert engine.close() is not None
    assert engine.blocks_in_use == 0
    return tokens, finished


def test_the_same_tokens_as_torchs_whatever_is_asked_for_and_whoever_comes_meanwhile(
    ours: GpuRunner, torchs: Any
) -> None:
    got, ended = answers(ours)
    wanted, wanted_ended = answers(torchs)
    assert {name: [token.token for token in said] for name, said in got.items()} == {
        name: [token.token for token in said] for name, said in wanted.items()
    }
    assert {name: end.reason for name, end in ended.items()} == {name: end.reason for name, end in wanted_ended.items()}
    assert ended["stopped"].reason is Finish.STOP_TOKEN
    for told, expected in zip(got["told"], wanted["told"], strict=True):
        assert told.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert [top.token for top in told.top] == [top.token for top in expected.top]


def test_preempted_sequences_go_on_with_the_same_tokens(folder: Path, torchs: Any) -> None:
    small = runner_for(folder, "triton", kv_blocks=5)
    got, ended = answers(small)
    assert sum(end.preemptions for end in ended.values()) > 0
    wanted, _ = answers(torchs)
    for name, said in got.items():
        assert [token.token for token in said] == [token.token for token in wanted[name]][: len(said)]


def chunks_of(tokens: list[int], cuts: list[int], **request: Any) -> list[Chunk]:
    submit = Submit(id="it", prompt=tokens, sampling=Sampling(), limits=Limits(max_tokens=1), **request)
    sequence = Sequence(submit, list(tokens), blocks=list(range(20)))
    sample = not request
    return [
        Chunk(sequence, a, b - a, sample and b == len(tokens)) for a, b in itertools.pairwise([0, *cuts, len(tokens)])
    ]


def test_scores_and_vectors_are_torchs(ours: GpuRunner, torchs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshlm.worker.engine.gpu_runner.SCORED_AT_ONCE", 7)
    tokens = prompt(60, 1)
    parts: dict[str, list[float]] = {}
    for name, runner in (("ours", ours), ("torch", torchs)):
        scored = [runner.run([chunk])[0] for chunk in chunks_of(tokens, [25, 26], score_from=10)]
        assert all(isinstance(part, ChunkScores) for part in scored)
        parts[name] = [value for part in scored for value in (*part.logprobs, *part.entropies)]
        for pool in ("mean", "last"):
            pooled = [runner.run([chunk])[0] for chunk in chunks_of(tokens, [40], pool=pool)]
            assert all(isinstance(part, ChunkPool) for part in pooled)
            parts[name] += [value for part in pooled for value in part.vector]
    torch.testing.assert_close(torch.tensor(parts["ours"]), torch.tensor(parts["torch"]), atol=2e-3, rtol=2e-3)


def last_logits(runner: Any, tokens: list[int]) -> torch.Tensor:
    first, second = chunks_of(tokens, [33])
    runner.run([first])
    return torch.as_tensor(runner.logits([second])[0]).cpu()  # the native engine, which holds no torch, gives numpy's


@pytest.mark.parametrize(
    ("changes", "closest"),
    [
        ({"quantization": "fp8"}, 0.95),
        ({"kv_dtype": "fp8"}, 0.99),
        ({"kv_dtype": "int8"}, 0.999),
        ({"kv_dtype": "int4"}, 0.9),
    ],
    ids=str,
)
def test_few_bits_stay_close_to_floats(folder: Path, ours: GpuRunner, changes: dict[str, str], closest: float) -> None:
    exact, near = (last_logits(runner, prompt(50, 4)) for runner in (ours, runner_for(folder, "triton", **changes)))
    assert torch.isfinite(near).all()
    assert torch.cosine_similarity(exact, near, dim=0) > closest
    assert not torch.equal(exact, near)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_weights_are_those_of_the_cpu(folder: Path, quantization: str) -> None:
    """The same codes: what differs is that the native engine rounds activations to 8 bits as well."""
    engines = [
        runner_for(folder, engine, quantization=quantization, dtype="float32") for engine in ("triton", "native")
    ]
    ours, natives = (last_logits(runner, prompt(50, 4)) for runner in engines)
    assert torch.cosine_similarity(ours, natives, dim=0) > 0.99


def test_quantized_weights_take_less_and_say_what_they_are(folder: Path, ours: GpuRunner) -> None:
    int4 = runner_for(folder, "triton", quantization="int4").facts
    assert int4.quantization == "int4"
    assert int4.weight_bytes < 0.2 * ours.facts.weight_bytes
    assert ours.facts.engine.startswith("triton")
    assert ours.facts.looks_ahead


def test_a_step_is_padded_to_the_next_size_of_the_ladder() -> None:
    assert ladder(1) == (1,)
    assert ladder(20) == (1, 2, 4, 8, 16, 20)
    assert ladder(32) == (1, 2, 4, 8, 16, 24, 32)
    ran: list[int] = []
    graphs = DecodeGraphs(ran.append, 20, torch.device("cpu"))
    for rows in (1, 3, 8, 9, 17, 20):
        graphs.run(graphs.size_for(rows))
    assert ran == [1, 4, 8, 16, 20, 20]


def test_a_top_k_that_no_int32_holds_keeps_all(ours: GpuRunner) -> None:
    tokens = prompt(9, 2)
    sampling = Sampling(temperature=0.7, seed=3, top_k=2**32 - 1)
    drawn = []
    for asked in (sampling, Sampling(temperature=0.7, seed=3)):
        submit = Submit(id="it", prompt=tokens, sampling=asked, limits=Limits(max_tokens=1))
        drawn += ours.run([Chunk(Sequence(submit, list(tokens), blocks=[0]), 0, len(tokens), True)])
    assert drawn[0] == drawn[1]


def test_every_number_of_rows_up_to_the_most_is_warmed_up_for() -> None:
    from meshlm.worker.engine.gpu_warm_up import row_counts, spread

    assert row_counts(48) == [2, 3, 4, 7, 8, 15, 16, 31, 32, 48]
    assert row_counts(200) == [2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 128, 192, 200]
    assert spread(10, 3, 4) == [4, 4, 2]  # no more than the context takes
    assert spread(10, 3, 100) == [8, 1, 1]
    assert spread(48, 4, 5) == [5] * 4


def test_every_input_of_a_step_lies_where_16_divides() -> None:
    shape = StepShape(rows=7, sequences=3, prefills=2, draws=1, most_blocks=5)
    memory = torch.zeros(shape.nbytes, dtype=torch.uint8)
    inputs = device_inputs(shape, memory)
    places = {name: getattr(inputs, name).data_ptr() - memory.data_ptr() for name in shape.fields()}
    assert all(place % 16 == 0 for place in places.values())
    assert len(set(places.values())) == len(places)


def test_memory_that_gives_out_in_a_draw_loses_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is run again, and the penalties are those of a sequence that said what it said."""
    import meshlm.worker.engine.gpu_sampler as gpu_sampler

    device = torch.device(DEVICE)
    sampler, count = gpu_sampler.GpuSampler(2, VOCABULARY, device), gpu_sampler.count_tokens
    request = Submit(id="it", prompt=[3], sampling=Sampling(presence_penalty=1.0), limits=Limits(max_tokens=4))
    rows = [Row(Sequence(request, [3, 5, 5]), 2)]

    def full(*arguments: Any, prompt: bool) -> None:
        if not prompt:
            raise torch.OutOfMemoryError
        count(*arguments, prompt=prompt)

    monkeypatch.setattr(gpu_sampler, "count_tokens", full)
    with pytest.raises(torch.OutOfMemoryError):
        sampler._catch_up(rows)
    monkeypatch.setattr(gpu_sampler, "count_tokens", count)
    for _ in range(2):  # and no token is counted twice
        [slot] = sampler._catch_up(rows).tolist()
        assert sampler._counts[slot, [3, 5]].tolist() == [SEEN_IN_PROMPT, 2 * OUTPUT]
        assert sampler._counts.count_nonzero() == 2


def test_memory_that_gives_out_at_the_start_is_said_and_not_retried_blindly(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import meshlm.worker.engine.gpu_load as gpu_load

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu_load.GpuSteps, "capture", full)
    with pytest.raises(SettingsError, match="gave out while the model was loaded"):
        runner_for(folder, "triton")


def test_what_is_left_for_the_cache() -> None:
    needs = MemoryNeeds(total=1000, taken=300, activations=150, graphs=50)
    assert needs.left(0.9) == 400
    assert needs.left(0.4) < 0


def test_on_a_cpu_triton_runs_only_when_it_is_told_to_interpret(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import meshlm.worker.engine.gpu_load as gpu_load

    monkeypatch.setattr(gpu_load, "INTERPRETED", type("Constexpr", (), {"value": False}))
    with pytest.raises(SettingsError, match="TRITON_INTERPRET=1"):
        load_runner(RunnerSettings(model=folder, engine="triton"), lambda stage, done, total: None)


@pytest.mark.parametrize(("asked", "index"), [("cuda", 2), ("cuda:1", 1)])
def test_a_gpu_is_known_by_its_number_whether_the_config_says_it_or_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch, asked: str, index: int
) -> None:
    import meshlm.worker.engine.gpu_load as gpu_load

    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    assert gpu_load._device(RunnerSettings(model=folder, device=asked)) == torch.device("cuda", index)
    assert chosen == [index]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("quantization", ["none", "int4"])
def test_nothing_is_compiled_while_it_serves(folder: Path, quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    runner = runner_for(folder, "triton", dtype="bfloat16", quantization=quantization)
    compiled: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **about: compiled.append(about["repr"]))
    answers(runner)
    for chunk in chunks_of(prompt(60, 1), [25, 26], score_from=10):
        runner.run([chunk])
    assert compiled == []


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_what_the_weights_leave_becomes_cache(folder: Path) -> None:
    facts = runner_for(folder, "triton", kv_blocks=None, dtype="bfloat16").facts
    assert facts.total_blocks == 2 * SCHEDULING.max_running * 16  # all that such a small model can use

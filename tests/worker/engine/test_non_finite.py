"""Weights that give what is no number: a sequence ends with an error that says so, on every engine, and others go on.

The embedding of one token is broken here: what has this token in it is computed to no numbers, and nothing else is.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from meshlm.worker.engine.engine import Engine
from meshlm.worker.engine.load import load_runner
from meshlm.worker.engine.scheduler import SchedulerSettings
from meshlm.worker.engine.settings import RunnerSettings
from meshlm.worker.messages import Embedded, Finish, Limits, NewToken, Sampling, Scored, Submit

pytest.importorskip("triton")
transformers = pytest.importorskip("transformers")

BROKEN = 5  # the token
VOCABULARY = 64
ENGINES = ("native", "torch", "triton")
SCHEDULING = SchedulerSettings(max_running=8, max_waiting=16, chunk_tokens=24, step_tokens=48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "broken"
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[BROKEN] = math.nan
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=ENGINES)
def runner(folder: Path, request: pytest.FixtureRequest) -> Any:
    device = "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"
    settings = RunnerSettings(
        model=folder, engine=request.param, quantization="none", dtype="float32", device=device, kv_blocks=8,
        block_size=16, threads=1, max_running=SCHEDULING.max_running, step_tokens=SCHEDULING.step_tokens,
    )  # fmt: skip
    return load_runner(settings, lambda stage, done, total: None)


class Told:
    """What an engine reports of some sequences."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, Finish] = {}
        self.answers: list[NewToken | Scored | Embedded] = []

    def run(self, *requests: Submit) -> Told:
        for request in requests:
            self.engine.submit(request)
        for _ in range(100):
            if not self.engine.busy:
                break
            report = self.engine.step()
            for token in report.tokens:
                self.tokens.setdefault(token.id, []).append(token.token)
            self.answers += [*report.scored, *report.embedded]
            self.ended |= {end.id: end.reason for end in report.finished}
        assert not self.engine.busy
        assert self.engine.blocks_in_use == 0
        return self


def asked(name: str, prompt: list[int], count: int = 4, read: dict[str, Any] | None = None, **sampling: Any) -> Submit:
    sampled = Sampling(**({"temperature": 0.0, "seed": 3} | sampling))
    return Submit(id=name, prompt=prompt, sampling=sampled, limits=Limits(max_tokens=count), **(read or {}))


SOUND = [7, 8, 9, 10, 11]
HURT = [7, BROKEN, 8, 9, 10, 11]
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.8, "top_p": 0.9, "top_k": 7},
    "reported": {"logprobs": 3},
    "penalized": {"temperature": 1.0, "presence_penalty": 0.5},
}


def test_a_sequence_of_no_numbers_ends_with_its_reason_and_the_others_go_on(runner: Any) -> None:
    sound = [asked(f"sound {name}", SOUND, 3, **sampling) for name, sampling in SAMPLINGS.items()]
    hurt = [asked(f"hurt {name}", HURT, 3, **sampling) for name, sampling in SAMPLINGS.items()]
    alone = Told(Engine(runner, SCHEDULING)).run(*sound)
    with capture_logs() as logs:
        both = Told(Engine(runner, SCHEDULING)).run(*hurt, *sound)
    assert both.ended == {one.id: Finish.LENGTH for one in sound} | {one.id: Finish.NON_FINITE for one in hurt}
    assert both.tokens == alone.tokens  # nothing of the broken ones, and the same as without them
    assert both.engine.scheduler.load().non_finite_total == len(hurt)
    told = [log for log in logs if log["event"] == "what the model computed is no number"]
    assert {log["log_level"] for log in told} == {"error"}
    assert sum(log["sequences"] for log in told) == len(hurt)


def test_a_token_that_breaks_the_answer_in_the_middle_ends_it_there(runner: Any) -> None:
    """The bias draws the broken token: it is told, and the one behind it cannot be drawn."""
    told = Told(Engine(runner, SCHEDULING)).run(asked("it", SOUND, logit_bias={BROKEN: 100.0}))
    assert told.ended == {"it": Finish.NON_FINITE}
    assert told.tokens == {"it": [BROKEN]}


def test_what_is_broken_is_neither_scored_nor_embedded(runner: Any) -> None:
    reads: list[dict[str, Any]] = [{"score_from": 1}, {"pool": "mean"}, {"pool": "last"}]
    requests = [asked(str(number), HURT, read=read) for number, read in enumerate(reads)]
    told = Told(Engine(runner, SCHEDULING)).run(*requests)
    assert set(told.ended.values()) == {Finish.NON_FINITE}
    assert told.answers == []
    assert Told(Engine(runner, SCHEDULING)).run(asked("sound", SOUND, read=reads[0])).ended == {"sound": Finish.DONE}


def test_broken_blocks_are_neither_found_again_nor_felt_by_who_gets_them_next(runner: Any) -> None:
    """The next one lies in the blocks that the broken one gave up last, where it left no numbers."""
    prompt = [*range(8, 8 + 17)]
    wanted = Told(Engine(runner, SCHEDULING)).run(asked("clean", prompt)).tokens["clean"]
    engine = Engine(runner, SCHEDULING)
    assert Told(engine).run(asked("hurt", [BROKEN] * 40)).ended == {"hurt": Finish.NON_FINITE}
    assert engine.scheduler.load().cached_blocks == 0
    assert Told(engine).run(asked("clean", prompt)).tokens["clean"] == wanted

"""A mesh whose guard asks a model that one of its workers serves: who asks whom, and what callers see."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from meshlm.chassis.config import ConfigError, Source
from meshlm.chassis.errors import MeshError, Reason
from meshlm.chassis.spans import read_trace
from meshlm.mesh.client import End, Start, Text
from meshlm.mesh.config import MeshConfig, WorkerEntry
from meshlm.mesh.plan import MeshPlan, Planner, ProcessPlan
from meshlm.mesh.state import StateFolder
from tests.mesh.rig import ONE, Rig, running
from tests.waiting import until

JUDGE = '[[mesh.workers]]\nname = "judge"\noverrides = { model = "llama-guard-3-8b" }\n'
GUARD = '[guard]\nmodel = "llama-guard-3-8b"\n'


@pytest.fixture
def root() -> Iterator[Path]:
    with TemporaryDirectory(prefix="meshlm-") as folder:
        yield Path(folder)


def planned(root: Path, *workers: WorkerEntry, **environ: str) -> MeshPlan:
    variables = {f"MESHLM__{key}".upper(): value for key, value in ({"worker__engine": "fake"} | environ).items()}
    config = MeshConfig(workers=workers)
    return Planner(Source.read(None, variables), config, StateFolder(root), environ=variables).plan("k")


def one(plan: MeshPlan, name: str) -> ProcessPlan:
    return next(process for process in plan.processes if process.name == name)


def asked(plan: MeshPlan) -> tuple[str, str | None]:
    """The workers that the router is given, and the guard."""
    router, guard = one(plan, "router"), one(plan, "guard")
    return router.environment["MESHLM__ROUTER__WORKERS"], guard.environment.get("MESHLM__GUARD__LLAMA_GUARD__WORKERS")


class TestPlan:
    CHAT = WorkerEntry("chat")
    JUDGE = WorkerEntry("judge", {"model": "g"})

    def test_the_worker_of_the_guards_model_is_the_guards_alone(self, root: Path) -> None:
        plan = planned(root, self.CHAT, self.JUDGE, guard__model="g")
        assert asked(plan) == (f'["{one(plan, "chat").address}"]', f'["{one(plan, "judge").address}"]')

    def test_a_guard_that_names_no_model_asks_no_worker(self, root: Path) -> None:
        plan = planned(root, self.CHAT, self.JUDGE)
        both = f'["{one(plan, "chat").address}", "{one(plan, "judge").address}"]'
        assert asked(plan) == (both, None)

    def test_the_only_worker_serves_both(self, root: Path) -> None:
        plan = planned(root, guard__model="g", worker__model="g")
        only = f'["{one(plan, "worker").address}"]'
        assert asked(plan) == (only, only)

    def test_an_entry_may_say_who_asks_it(self, root: Path) -> None:
        shared = WorkerEntry("judge", {"model": "g"}, ("router", "guard"))
        plan = planned(root, self.CHAT, shared, guard__model="g")
        both = f'["{one(plan, "chat").address}", "{one(plan, "judge").address}"]'
        assert asked(plan) == (both, f'["{one(plan, "judge").address}"]')

    def test_verifiers_find_their_workers_too(self, root: Path) -> None:
        second = WorkerEntry("second", {"model_path": "/models/q.gguf", "model": ""})
        plan = planned(root, self.CHAT, second, guard__panel__second__model="q")
        assert asked(plan)[1] == f'["{one(plan, "second").address}"]'

    def test_a_model_that_no_worker_serves_is_an_error(self, root: Path) -> None:
        with pytest.raises(ConfigError, match=r"guard\.llama_guard\.workers: empty, and no entry .* serves g"):
            planned(root, self.CHAT, guard__model="g")

    def test_workers_elsewhere_are_kept(self, root: Path) -> None:
        plan = planned(root, self.CHAT, guard__model="g", guard__llama_guard__workers='["there:1"]')
        assert asked(plan)[1] is None  # the guard reads it itself


@pytest.mark.mesh
async def test_the_guard_judges_by_a_model_that_a_worker_of_the_mesh_serves() -> None:
    async with running(ONE + JUDGE, extra=GUARD, step=0.001) as rig:
        events = [event async for event in rig.stream("a cake", max_tokens=20)]
        (start,) = (event for event in events if isinstance(event, Start))
        (end,) = (event for event in events if isinstance(event, End))
        assert start.routing.model == "fake"
        (detector,) = (d for d in start.input_verdict.detectors if "llama-guard" in d)
        assert detector.startswith("llama-guard-3:llama-guard-3-8b/")
        assert detector in end.output_verdicts[0].detectors
        with pytest.raises(MeshError) as caught:
            await rig.text("a !harm")
        assert (caught.value.reason, caught.value.metadata["categories"]) == (Reason.PROMPT_UNSAFE, "S1")
        await until(lambda: {"guard", "worker"} <= _who_scored(rig, start.trace_id))
        models = await rig.client.list_models()
        assert [model.name for model in models] == ["fake"]  # callers cannot ask the judge

        rig.kill("judge")
        await until(lambda: _judged_again(rig))


@pytest.mark.mesh
async def test_a_harmful_answer_is_stopped_by_the_models_that_judge_it() -> None:
    policy = '[guard.policies.default]\ninput_detectors = ["signatures"]\n'
    other = JUDGE.replace("judge", "other").replace("llama-guard-3-8b", "other-model")
    panel = '[guard.panel]\nsample_share = 1.0\n[guard.panel.second]\nmodel = "other-model"\n'
    async with running(ONE + JUDGE + other, extra=GUARD + panel + policy, step=0.001) as rig:
        events = [event async for event in rig.stream("a !harm", max_tokens=200)]
        (end,) = (event for event in events if isinstance(event, End))
        assert dict(end.finish_reasons) == {0: "content_filter"}
        assert "".join(event.text for event in events if isinstance(event, Text)) == ""
        assert list(end.output_verdicts[0].categories) == ["S1"]
        (votes,) = (d for d in end.output_verdicts[0].detectors if d.startswith("panel:"))
        assert re.fullmatch(r"panel:agreed\(llama-guard-3:llama-guard-3-8b/.*=1\.00,chat:other-model/.*=1\.00\)", votes)


def _who_scored(rig: Rig, trace_id: str) -> set[str]:
    """Services with a span of a Score in the trace."""
    spans = [span for span in read_trace(str(rig.folder.spans), trace_id) if span.name.endswith("/Score")]
    assert not any("a cake" in str(span.attributes) for span in spans)
    return {span.service.removeprefix("meshlm-") for span in spans}


async def _judged_again(rig: Rig) -> bool:
    """Whether a request is answered: only after a verdict of the model, however long it is away."""
    try:
        events = [event async for event in rig.stream("another cake", max_tokens=1)]
    except MeshError as error:
        assert error.reason is Reason.GUARD_UNAVAILABLE
        return False
    (start,) = (event for event in events if isinstance(event, Start))
    assert any("llama-guard" in detector for detector in start.input_verdict.detectors)
    return True

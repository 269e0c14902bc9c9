"""Proof of execution, on real processes: fakes of which one tells other log-probabilities than it should."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from meshlm.chassis.errors import MeshError
from meshlm.mesh import cli
from meshlm.mesh.client import End, Start, Text
from tests.mesh.rig import Rig, running
from tests.waiting import until

pytestmark = pytest.mark.mesh

HONEST = ['[[mesh.workers]]\nname = "one"\n', '[[mesh.workers]]\nname = "two"\n']
LIAR = '[[mesh.workers]]\nname = "liar"\noverrides = { "fake.logprob_error" = "0.5" }\n'
ALL = "[router.proof]\nshare = 1.0\n"


@pytest.fixture(autouse=True)
def no_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHLM__GUARD__MODEL", "rules")


async def ready(rig: Rig) -> int:
    (model,) = await rig.client.list_models()
    return int(model.ready_replicas)


async def asked(rig: Rig, count: int, **more: Any) -> list[list[Any]]:
    streams = [rig.stream(f"n {n}", cache="bypass", max_tokens=20, **more) for n in range(count)]

    async def events(stream: Any) -> list[Any]:
        return [event async for event in stream]

    return list(await asyncio.gather(*(events(stream) for stream in streams)))


async def found(rig: Rig) -> bool:
    await asked(rig, 6)
    return await ready(rig) == 2


def log_of(rig: Rig) -> str:
    return rig.folder.log("router").read_text()


async def test_a_worker_whose_answers_others_cannot_reproduce_gets_no_requests_until_it_is_released(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running("".join(HONEST) + LIAR, extra=ALL, step=0.001) as rig:
        assert await ready(rig) == 3
        await until(lambda: found(rig))
        for events in await asked(rig, 12):
            assert isinstance(start := events[0], Start)
            assert start.routing.replica != "liar"
            assert all(not event.logprobs and not event.token_ids for event in events if isinstance(event, Text))
        await until(lambda: "quarantine begins" in log_of(rig))
        monkeypatch.setenv("MESHLM__MESH__STATE_DIR", str(rig.folder.root))
        assert await asyncio.to_thread(cli.run, ["quarantine"]) == 0
        assert "liar" in capsys.readouterr().out
        assert await asyncio.to_thread(cli.run, ["quarantine", "--release", "one"]) == 1
        assert await asyncio.to_thread(cli.run, ["quarantine", "--release", "liar"]) == 0

        async def back() -> bool:
            return await ready(rig) == 3

        await until(back)


async def test_a_quarantine_is_known_to_a_router_that_starts_later() -> None:
    async with running("".join(HONEST) + LIAR, extra=ALL, step=0.001) as rig:
        await until(lambda: found(rig))
        rig.kill("router")

        async def again() -> bool:
            try:
                two = await ready(rig) == 2
            except MeshError:
                return False
            return two and "quarantine begins" in log_of(rig).rpartition('"event": "bound"')[2]

        await until(again)


async def test_of_two_that_differ_nobody_is_judged() -> None:
    async with running(HONEST[0] + LIAR, extra=ALL, step=0.001) as rig:
        await until(lambda: _told(rig))
        assert await ready(rig) == 2
        await until(lambda: '"outcome": "undecided"' in log_of(rig))


async def _told(rig: Rig) -> bool:
    await asked(rig, 4)
    return "a proof of execution failed" in log_of(rig)


async def test_honest_workers_stay_and_answers_are_as_without_proofs() -> None:
    async with running("".join(HONEST), extra=ALL, step=0.001) as rig:
        for sampling in ({}, {"temperature": 1.0, "seed": 3}, {"logprobs": 2}):
            for events in await asked(rig, 4, **sampling):
                assert isinstance(events[-1], End)
                wanted = 20 if "logprobs" in sampling else 0
                assert sum(len(event.logprobs) for event in events if isinstance(event, Text)) == wanted

        async def both() -> bool:
            return min([(await rig.load(name)).counters.steps for name in ("one", "two")]) > 0

        await until(both)
        assert "a proof of execution failed" not in log_of(rig)
        assert await ready(rig) == 2

"""Streams that outlive what computes them: real processes with the fake engine, killed and stopped in mid-stream."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from typing import Any, ClassVar

import grpc
import pytest

from meshlm.chassis.errors import MeshError, Reason, from_rpc_error
from meshlm.chassis.spans import read_trace
from meshlm.mesh.client import End, Start, Text
from tests.mesh.fakes import said_by_the_fake
from tests.mesh.rig import ONE, TWO, Rig, running
from tests.router.test_mesh_limits import LIMIT, limited, spent, told
from tests.waiting import until

pytestmark = pytest.mark.mesh

THREE = TWO + '[[mesh.workers]]\nname = "three"\n'
SAMPLED = {"temperature": 1.0, "top_p": 0.9}


@pytest.fixture(autouse=True)
def no_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that judges holds the fake's letters back until they are words: nothing is left to disturb then."""
    monkeypatch.setenv("MESHLM__GUARD__MODEL", "rules")


async def disturbed(rig: Rig, every: int, most: int, stream: Any, number: int = signal.SIGKILL) -> list[Any]:
    """All events of a stream whose worker gets a signal after each `every` tokens, at most so many times."""
    events: list[Any] = []
    replica, struck, done = "", 0, 0
    async for event in stream:
        events.append(event)
        if isinstance(event, Start):
            replica = event.routing.replica
        if isinstance(event, Text):
            done += event.token_count
            while struck < most and done >= every * (struck + 1):
                struck += 1
                for name in {replica} if struck == 1 else await busy(rig):
                    os.kill(rig.mesh.pid(name), number)
    assert struck == most
    return events


async def busy(rig: Rig) -> list[str]:
    """Workers that compute something now."""
    names = []
    for process in rig.mesh.plan.processes:
        if process.part == "worker" and rig.mesh._child(process.name).ready.is_set():
            try:
                load = await asyncio.wait_for(rig.load(process.name), 2)
            except (TimeoutError, OSError, grpc.RpcError):
                continue
            if load.running:
                names.append(process.name)
    return names


def text_of(events: list[Any], choice: int = 0) -> str:
    return "".join(event.text for event in events if isinstance(event, Text) and event.choice == choice)


def gapless(events: list[Any]) -> bool:
    offsets: Counter[int] = Counter()
    for event in events:
        if isinstance(event, Text):
            if event.token_offset != offsets[event.choice]:
                return False
            offsets[event.choice] += event.token_count
    return True


@pytest.mark.parametrize("asked", [{}, {**SAMPLED, "seed": 7}], ids=["greedy", "seeded"])
async def test_a_stream_whose_workers_are_killed_one_after_the_other_has_neither_gap_nor_repeat(asked: Any) -> None:
    async with running(THREE) as rig:
        for n in range(3):
            question = f"hello {n}"
            stream = rig.stream(question, cache="bypass", max_tokens=200, **asked)
            events = await disturbed(rig, 40, 2, stream)
            assert text_of(events) == said_by_the_fake(question, 200, **asked)
            assert gapless(events)
            end = events[-1]
            assert isinstance(end, End)
            assert end.usage.completion_tokens == 200
            assert end.finish_reasons == {0: "length"}
            assert len(end.replicas) >= 2  # the second may have made it all before it was struck
            assert all(not event.token_ids for event in events if isinstance(event, Text))  # nobody asked for them


async def test_a_draw_without_a_seed_goes_on_with_the_seed_that_its_start_told() -> None:
    async with running(TWO) as rig:
        events = await disturbed(rig, 20, 1, rig.stream("hello", cache="bypass", **SAMPLED))
        start = events[0]
        assert isinstance(start, Start)
        assert start.seed is not None
        assert text_of(events) == said_by_the_fake("hello", 60, seed=start.seed, **SAMPLED)
        assert text_of(events) != said_by_the_fake("hello", 60, seed=start.seed + 1, **SAMPLED)


async def test_a_stop_string_across_the_seam_is_found_and_not_sent() -> None:
    async with running(TWO) as rig:
        whole = said_by_the_fake("hello", 100)
        for at in range(30, 54, 6):  # a worker that died five times in a minute is given up
            stop = whole[at : at + 8]
            events = await disturbed(rig, at - 10, 1, rig.stream("hello", cache="bypass", max_tokens=100, stop=[stop]))
            assert text_of(events) == whole[: whole.index(stop)]
            await rig.mesh.wait_ready("one")
            await rig.mesh.wait_ready("two")


async def test_a_lone_worker_that_is_killed_goes_on_when_it_is_back() -> None:
    async with running(ONE, extra="[router.streams]\nresume_wait_seconds = 60.0\n") as rig:
        events = await disturbed(rig, 20, 1, rig.stream("hello", cache="bypass", max_tokens=150))
        assert text_of(events) == said_by_the_fake("hello", 150)


async def test_a_killed_engine_costs_nothing_either() -> None:
    async with running(TWO) as rig:
        text, killed = "", False
        async for event in rig.stream("hello", cache="bypass", max_tokens=200):
            if isinstance(event, Start):
                replica, trace_id = event.routing.replica, event.trace_id
            if isinstance(event, Text):
                text += event.text
                if not killed:
                    killed = True
                    rig.engine(replica).kill()
        assert text == said_by_the_fake("hello", 200)

        def resumes() -> Any:
            spans = read_trace(str(rig.folder.spans), trace_id)
            return [s.attributes["meshlm.stream.resumes"] for s in spans if "meshlm.stream.resumes" in s.attributes]

        await until(resumes)
        assert resumes() == [1]


async def test_a_stopped_worker_that_keeps_its_connection_is_taken_as_lost() -> None:
    async with running(TWO, extra="[router.streams]\nidle_seconds = 3.0\n") as rig:
        stream = rig.stream("hello", cache="bypass", max_tokens=200)
        events = await disturbed(rig, 10, 1, stream, signal.SIGSTOP)
        for name in ("one", "two"):
            os.kill(rig.mesh.pid(name), signal.SIGCONT)
        assert text_of(events) == said_by_the_fake("hello", 200)
        assert events[-1].replicas[0] != events[-1].replicas[1]


async def test_a_request_that_ends_every_engine_does_not_take_them_all() -> None:
    """The fake's engine is killed by this prompt at its fourth token, wherever it is computed."""
    workers = "".join(f'[[mesh.workers]]\nname = "w{n}"\n' for n in range(4))
    async with running(workers) as rig:
        with pytest.raises(MeshError) as caught:
            await rig.text("!kill", cache="bypass", max_tokens=200)
        assert caught.value.reason == Reason.ENGINE_LOST
        starts = [(await rig.load(f"w{n}")).counters.engine_starts for n in range(4)]
        assert min(starts) == 1


async def test_what_a_lost_worker_made_is_billed_once() -> None:
    async with limited(f"micros_per_day = {LIMIT}", step=0.01, workers=TWO) as rig:
        events = await disturbed(rig, 20, 1, rig.stream("hello", max_tokens=100, cache="bypass"))
        end = events[-1]
        assert end.usage.completion_tokens == 100
        assert end.cost_micros == told(events)

        async def settled() -> bool:
            return await spent(rig) == told(events)

        await until(settled)


async def test_each_of_several_choices_goes_on_from_its_own_tokens_and_all_are_billed_once() -> None:
    async with limited(f"micros_per_day = {LIMIT}", step=0.05, workers=THREE) as rig:
        asked = {"cache": "bypass", "n": 3, "seed": 7, "max_tokens": 60, **SAMPLED}
        whole = [event async for event in rig.stream("hello", **asked)]
        events = await disturbed(rig, 40, 2, rig.stream("hello", **asked))
        texts = [text_of(events, choice) for choice in range(3)]
        assert texts == [text_of(whole, choice) for choice in range(3)]
        assert len(set(texts)) == 3
        assert gapless(events)
        assert not any(event.token_ids for event in events if isinstance(event, Text))  # nobody asked for them
        end = events[-1]
        assert isinstance(end, End)
        assert end.finish_reasons == dict.fromkeys(range(3), "length")
        assert end.usage == whole[-1].usage
        assert end.usage.completion_tokens == 180
        assert len(end.replicas) >= 2

        async def settled() -> bool:
            return await spent(rig) == 2 * told(events)

        await until(settled)


async def test_a_choice_that_had_ended_is_not_made_again_for_those_that_go_on() -> None:
    """A stop string that only one of them has ends that one long before the worker is lost."""
    async with running(TWO) as rig:
        asked = {"cache": "bypass", "n": 2, "seed": 7, "max_tokens": 100, **SAMPLED}
        whole = [event async for event in rig.stream("hello", **asked)]
        first, second = (text_of(whole, choice) for choice in range(2))
        stop = next(first[at : at + 2] for at in range(8, 40) if first[at : at + 2] not in second[:80])
        events = await disturbed(rig, 100, 1, rig.stream("hello", **asked, stop=[stop]))
        assert text_of(events, 0) == first[: first.index(stop)]
        assert text_of(events, 1) == (second[: second.index(stop)] if stop in second else second)
        assert gapless(events)
        assert events[-1].finish_reasons[0] == "stop"


async def first_part(rig: Rig, count: int, asked: dict[str, Any], **more: Any) -> list[Any]:
    """The messages of a stream up to so many tokens; then its caller is gone."""
    call = rig.call(asked, **more)
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
        if message.chunk.token_offset + message.chunk.token_count >= count:
            break
    call.cancel()
    return messages


async def rest(rig: Rig, asked: dict[str, Any], **more: Any) -> list[Any]:
    messages = []
    async for message in rig.call(asked, **more):
        messages.append(message)  # noqa: PERF401
    return messages


class TestACallerWhoComesBack:
    DRAWN: ClassVar[dict[str, Any]] = {"temperature": 1.0, "max_tokens": 200}

    async def test_finds_the_rest_of_a_draw_and_pays_for_each_token_once(self) -> None:
        async with limited(f"micros_per_day = {LIMIT}", step=0.02) as rig:
            before = await first_part(rig, 20, self.DRAWN, resumable=True)
            start, last = before[0].start, before[-1]
            offset = last.chunk.token_offset + last.chunk.token_count
            after = await rest(rig, self.DRAWN, resume_from=offset, resume_of=start.request_id)
            text = "".join(m.chunk.text for m in before + after)
            assert text == said_by_the_fake("hello", 200, temperature=1.0, seed=start.seed)
            assert after[1].chunk.token_offset == offset
            assert after[-1].usage.prompt_tokens == 0
            total = last.usage.prompt_tokens + 200
            assert offset + after[-1].usage.completion_tokens <= 200  # what was on its way when the caller left is paid

            async def settled() -> bool:
                return await spent(rig) == total

            await until(settled)

    async def test_finds_the_rest_of_each_of_several_choices_and_pays_for_each_token_once(self) -> None:
        drawn = {**self.DRAWN, "n": 2}
        async with limited(f"micros_per_day = {LIMIT}", step=0.02) as rig:
            before = await first_part(rig, 20, drawn, resumable=True)
            start, last = before[0].start, before[-1]
            has = [0, 0]
            for message in before[1:]:
                has[message.chunk.choice] = message.chunk.token_offset + message.chunk.token_count
            after = await rest(rig, drawn, resume_from_choices=has, resume_of=start.request_id)
            for choice in range(2):
                made = "".join(m.chunk.text for m in before + after if m.chunk.choice == choice)
                assert made == said_by_the_fake("hello", 200, temperature=1.0, seed=start.seed + choice)
            assert after[-1].usage.prompt_tokens == 0
            total = last.usage.prompt_tokens + 400
            assert sum(has) + after[-1].usage.completion_tokens <= 400

            async def settled() -> bool:
                return await spent(rig) == total

            await until(settled)

    async def test_is_known_by_its_request_and_its_key_alone(self) -> None:
        async with running() as rig:
            before = await first_part(rig, 20, self.DRAWN, resumable=True)
            own = before[0].start.request_id
            for asked, name in (({**self.DRAWN, "max_tokens": 201}, own), (self.DRAWN, "other")):
                with pytest.raises(grpc.RpcError) as caught:
                    await rest(rig, asked, resume_from=20, resume_of=name)
                assert from_rpc_error(caught.value).metadata["field"] == "resume_of"

    async def test_is_not_waited_for_unless_it_said_that_it_may_come(self) -> None:
        async with running() as rig:
            before = await first_part(rig, 20, self.DRAWN)
            with pytest.raises(grpc.RpcError) as caught:
                await rest(rig, self.DRAWN, resume_from=20, resume_of=before[0].start.request_id)
            assert from_rpc_error(caught.value).reason == Reason.REQUEST_INVALID

    async def test_leaves_no_block_in_use_while_it_is_away(self) -> None:
        async with running() as rig:
            await first_part(rig, 20, self.DRAWN, resumable=True)
            await until(rig.idle)

    @pytest.mark.parametrize("choices", [1, 3])
    async def test_by_the_client_library_gets_a_draw_whole_though_the_router_was_killed(self, choices: int) -> None:
        async with running(TWO) as rig:
            events, killed, seed = [], False, 0
            stream = rig.stream("hello", cache="bypass", resumes=1000, n=choices, max_tokens=100, **SAMPLED)
            async for event in stream:
                events.append(event)
                if isinstance(event, Start):
                    seed = event.seed or 0
                if isinstance(event, Text) and event.token_offset >= 20 and not killed:
                    killed = True
                    rig.kill("router")
            assert gapless(events)
            whole = [said_by_the_fake("hello", 100, seed=seed + n, **SAMPLED) for n in range(choices)]
            assert [text_of(events, n) for n in range(choices)] == whole


async def test_a_hedged_prefill_is_won_by_the_quicker_worker_and_frees_the_blocks_of_the_slower() -> None:
    slow = '[[mesh.workers]]\nname = "slow"\noverrides = { "fake.step_seconds" = "1.0" }\n'
    extra = "[router.streams]\nhedge_percentile = 50.0\nretries_per_second = 1000.0\n"
    async with running(ONE + slow, extra=extra, step=0.002) as rig:

        async def hedged() -> bool:
            answers = [rig.stream(f"n {n}", cache="bypass", max_tokens=2) for n in range(8)]
            await asyncio.gather(*(events_of(answer) for answer in answers))
            return (await rig.load("slow")).counters.blocks_freed_after_cancel > 0

        await until(hedged)  # a loser that still waited had no blocks: one that was computed is cancelled too

        await until(lambda: rig.idle("slow"))


async def events_of(stream: Any) -> list[Any]:
    return [event async for event in stream]

"""The engine as a real process behind real sockets: what the front sees when it lives, dies, hangs and ends."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from meshlm.worker.engine.scheduler import SchedulerSettings
from meshlm.worker.fake import CRASH, HANG, KILL, OUT_OF_MEMORY, FakeSettings, expected_tokens
from meshlm.worker.front.engine_client import EngineClient
from meshlm.worker.front.engine_process import EngineSettings
from meshlm.worker.front.engine_stream import EngineLost, EngineStream
from meshlm.worker.messages import Finish, Finished, Limits, NewToken, Sampling, Started, Submit
from tests.waiting import until

pytestmark = pytest.mark.mesh

GREEDY = Sampling(temperature=0)


def engine_settings(**fake: float) -> EngineSettings:
    return EngineSettings(
        kind="fake",
        runner=msgspec.to_builtins(FakeSettings(**fake)),  # type: ignore[arg-type]
        scheduler=SchedulerSettings(max_running=32, max_waiting=256),
        log_level="error",
    )


def request(name: str, prompt: bytes = b"hello", max_tokens: int = 6) -> Submit:
    return Submit(
        id=name, prompt=list(prompt), sampling=GREEDY, limits=Limits(max_tokens=max_tokens), arrival=time.monotonic()
    )


@asynccontextmanager
async def running(
    able: list[bool] | None = None, hang_seconds: float = 20.0, **fake: float
) -> AsyncIterator[EngineClient]:
    async def on_able(now: bool, why: str) -> None:
        if able is not None:
            able.append(now)

    client = EngineClient(engine_settings(**fake), on_able=on_able, hang_seconds=hang_seconds, backoff_seconds=0.05)
    await client.start()
    try:
        yield client
    finally:
        await client.stop()
        assert client.blocks_left in (0, None)


async def collect(stream: EngineStream) -> tuple[list[int], Finished]:
    tokens: list[int] = []
    end = None
    with stream:
        async for events in stream:
            for event in events:
                if isinstance(event, NewToken):
                    tokens.append(event.token)
                elif isinstance(event, Finished):
                    end = event
                else:
                    assert isinstance(event, Started)
    assert end is not None
    return tokens, end


async def test_tokens_come_in_order_and_the_engine_says_goodbye_with_no_block_in_use() -> None:
    async with running() as client:
        results = await asyncio.gather(*(collect(client.submit(request(f"r{i}", b"x" * (i + 1)))) for i in range(20)))
    for i, (tokens, end) in enumerate(results):
        assert tokens == expected_tokens(list(b"x" * (i + 1)), GREEDY, 6)
        assert end.reason is Finish.LENGTH
        assert end.arrival <= end.first_scheduled <= end.first_token <= end.ended
    assert client.blocks_left == 0
    assert not client.able


@pytest.mark.parametrize("fault", [KILL, CRASH])
async def test_a_dead_engine_ends_every_stream_with_a_reason_and_a_new_one_serves(fault: bytes) -> None:
    able: list[bool] = []
    async with running(able, step_seconds=0.01) as client:
        bystander = client.submit(request("bystander", max_tokens=1000))
        with pytest.raises(EngineLost, match="ended with code"):
            await collect(client.submit(request("it", fault)))
        with pytest.raises(EngineLost):
            await collect(bystander)
        with pytest.raises(EngineLost, match="not ready"):
            client.submit(request("early"))
        await until(lambda: client.able)
        assert able == [True, False, True]
        assert client.starts == 2
        tokens, _ = await collect(client.submit(request("after")))
        assert tokens == expected_tokens(list(b"hello"), GREEDY, 6)


async def test_kill_minus_nine_from_outside_is_noticed_while_idle() -> None:
    able: list[bool] = []
    async with running(able) as client:
        os.kill(client.pid, signal.SIGKILL)
        await until(lambda: able == [True, False, True])


async def test_tokens_sent_before_the_death_are_delivered_before_the_loss() -> None:
    async with running(step_seconds=0.3) as client:
        tokens: list[int] = []
        with pytest.raises(EngineLost), client.submit(request("it", KILL)) as stream:
            async for events in stream:
                tokens += [event.token for event in events if isinstance(event, NewToken)]
        assert tokens == expected_tokens(list(KILL), GREEDY, 3)


async def test_a_hanging_engine_is_killed_and_replaced() -> None:
    able: list[bool] = []
    async with running(able, hang_seconds=2.0) as client:
        first = client.pid
        with pytest.raises(EngineLost, match=r"silent|no step"):
            await collect(client.submit(request("it", HANG)))
        await until(lambda: client.able)
        assert able == [True, False, True]
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)


async def test_a_front_that_was_kept_waiting_does_not_take_its_engine_for_a_hanging_one() -> None:
    async with running(hang_seconds=3.0, step_seconds=0.05) as client:
        task = asyncio.create_task(collect(client.submit(request("it", max_tokens=60))))
        await until(lambda: client.load is not None and client.load.steps_total > 0)
        time.sleep(3.5)  # noqa: ASYNC251 - longer than a hang may take, and nothing is heard meanwhile
        tokens, _ = await task
        assert tokens == expected_tokens(list(b"hello"), GREEDY, 60)
        assert client.starts == 1


async def test_an_idle_engine_is_not_taken_for_a_hanging_one() -> None:
    async with running(hang_seconds=4.0) as client:  # it reports every second, and may be kept waiting
        reports: list[int] = []
        began = time.monotonic()
        async for _ in client.watch():  # heartbeats for longer than a hang may take
            reports.append(client.starts)
            if time.monotonic() - began > 5.0 and len(reports) >= 3:
                break
        assert set(reports) == {1}


async def test_a_folder_that_cannot_be_made_puts_the_next_engine_off_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []
    make = tempfile.mkdtemp

    def full_disk_once(**kinds: str) -> str:
        made.append(kinds["prefix"])
        if len(made) == 1:
            raise OSError(errno.ENOSPC, "no space left on device")
        return make(**kinds)

    async with running() as client:
        monkeypatch.setattr(tempfile, "mkdtemp", full_disk_once)
        os.kill(client.pid, signal.SIGKILL)
        await until(lambda: len(made) == 2 and client.able)


@pytest.mark.parametrize("said", [{}, {"GOMP_SPINCOUNT": "1"}, {"OMP_WAIT_POLICY": "active"}])
async def test_the_engines_threads_spin_shortly_unless_the_operator_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str]
) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    async with running() as client:
        lines = Path(f"/proc/{client.pid}/environ").read_text().split("\0")  # noqa: ASYNC240 - not a disk
    seen = dict(line.split("=", 1) for line in lines if line.startswith(names))
    assert seen == (said or {"GOMP_SPINCOUNT": "5000"})


async def test_out_of_memory_ends_one_stream_and_not_the_engine() -> None:
    async with running(step_seconds=0.005) as client:
        older = asyncio.create_task(collect(client.submit(request("older", max_tokens=50))))
        await asyncio.sleep(0)
        _, end = await collect(client.submit(request("newest", OUT_OF_MEMORY)))
        assert end.reason is Finish.OUT_OF_MEMORY
        tokens, _ = await older
        assert len(tokens) == 50
        assert client.starts == 1


async def test_two_hundred_cancelled_streams_leave_no_block_in_use() -> None:
    async with running(step_seconds=0.002, total_blocks=512) as client:

        async def leave_after_first_batch(i: int) -> None:
            with client.submit(request(f"r{i}", b"prompt %d" % i, max_tokens=2000)) as stream:
                async for _ in stream:
                    return

        await asyncio.gather(*(leave_after_first_batch(i) for i in range(200)))
        await until(lambda: client.load is not None and client.load.cancelled_total == 200)
        assert client.load is not None
        assert (client.load.running, client.load.waiting) == (0, 0)
        assert client.load.free_blocks == client.load.total_blocks
        assert client.load.freed_after_cancel_total >= 200


async def test_watchers_see_load_and_no_more_than_twenty_changes_a_second() -> None:
    async with running(step_seconds=0.001) as client:
        task = asyncio.create_task(collect(client.submit(request("it", max_tokens=2000))))
        seen = 0
        began = time.monotonic()
        async for _ in client.watch():
            seen += 1
            if task.done():
                break
        assert seen >= 3
        assert seen <= 20 * (time.monotonic() - began) + 2


async def test_an_engine_that_cannot_load_is_told_to_who_started_it() -> None:
    async def on_able(able: bool, why: str) -> None: ...

    broken = EngineSettings(kind="fake", runner={"total_blocks": "many"}, log_level="error")
    client = EngineClient(broken, on_able=on_able)
    with pytest.raises(EngineLost, match="ended with code 1"):
        await client.start()
    await client.stop()


PARENT = """
import asyncio, sys
sys.path.insert(0, "tests/worker")
from test_engine_client import engine_settings
from meshlm.worker.front.engine_client import EngineClient
async def on_able(able, why): pass
async def main():
    client = EngineClient(engine_settings(), on_able=on_able)
    await client.start()
    print("pid", client.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_engine_does_not_outlive_its_parent(number: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    engine = next(int(line.split()[1]) for line in parent.stdout if line.startswith("pid "))
    assert _alive(engine)
    parent.send_signal(number)
    parent.wait(60)
    parent.stdout.close()
    bound = time.monotonic() + 60
    while _alive(engine):
        assert time.monotonic() < bound
        time.sleep(0.01)


async def test_an_interrupt_meant_for_the_group_does_not_end_the_engine() -> None:
    async with running(step_seconds=0.005) as client:
        task = asyncio.create_task(collect(client.submit(request("it", max_tokens=200))))
        await until(lambda: client.load is not None and client.load.steps_total > 0)
        os.kill(client.pid, signal.SIGINT)
        os.kill(client.pid, signal.SIGTERM)
        tokens, _ = await task
        assert len(tokens) == 200
        assert client.starts == 1


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False

"""A store that forgets its scripts, answers late, or hangs: what was used is charged once, and few requests wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from meshlm.chassis.config import StateConfig
from meshlm.chassis.state import connect
from meshlm.router.accounts import ledger
from meshlm.router.accounts.limits import Usage
from meshlm.router.config import KeyConfig
from meshlm.router.replicas.ejections import Ballot
from meshlm.router.replicas.quarantine import Register
from meshlm.router.risk.breaker import State
from meshlm.router.risk.config import BreakerConfig, RiskConfig
from meshlm.router.risk.standing import Caller, Standings
from tests.router.book import PRICE, Book
from tests.router.calls import collect, text_of
from tests.router.fleets import Clock
from tests.router.mesh import Mesh, key
from tests.waiting import until

CALLER = Caller("t", "k", "m")
DAY = "meshlm:{t}:key:k:micros_per_day"
TIMEOUT = 0.1  # where the store is not to answer in time; where it is, tests are PATIENT
PATIENT = pytest.mark.parametrize("seconds", [30.0])
PRICES = {"m": PRICE}


class Wire:
    """Between clients and the store: late by so much, or hung. Tells what was sent, and by how many connections."""

    def __init__(self, folder: Path, store: str) -> None:
        self.url = f"unix://{folder}/wire"
        self.delay = 0.0
        self.hung = False
        self.seen: list[bytes] = []
        self.opened = 0  # a command that was not answered in time costs its connection
        self._folder, self._store = folder, store.removeprefix("unix://")
        self._pumps: set[asyncio.Task[None]] = set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        back, forth = await asyncio.open_unix_connection(self._store)
        for task in (self._pump(reader, forth, sending=True), self._pump(back, writer, sending=False)):
            self._pumps.add(asyncio.ensure_future(task))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, sending: bool) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if sending:
                    self.seen.append(data)
                elif self.hung:
                    await until(lambda: not self.hung, 60)
                else:
                    await asyncio.sleep(self.delay)
                writer.write(data)
        writer.close()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Wire]:
        server = await asyncio.start_unix_server(self._serve, f"{self._folder}/wire")
        try:
            yield self
        finally:
            self.hung = False
            server.close()
            for task in self._pumps:
                task.cancel()
            await asyncio.gather(*self._pumps, return_exceptions=True)


@pytest.fixture
async def wire(tmp_path: Path, valkey: str, state: Redis) -> AsyncIterator[Wire]:
    async with Wire(tmp_path, valkey).open() as made:
        yield made


@pytest.fixture
def seconds() -> float:
    return TIMEOUT


@pytest.fixture
async def client(wire: Wire, seconds: float) -> AsyncIterator[Redis]:
    made = connect(StateConfig(wire.url, timeout_seconds=seconds))
    yield made
    await made.aclose()


async def test_scripts_that_were_flushed_are_told_again_and_nobody_notices(state: Redis) -> None:
    book = Book(state, key(micros_per_day=10_000, requests_per_minute=10, concurrent_streams=2))
    standings = Standings(state, RiskConfig(), BreakerConfig())
    ballot, register = Ballot(state, "one", 1), Register(state)
    await state.script_flush()
    reservation = await book.reserve(100, 600)
    await state.script_flush()
    assert await book.ledger.extend(reservation, Usage(100, completion=256), 512) is None
    await state.script_flush()
    assert await book.ledger.settle(reservation, Usage(100, completion=300))
    assert reservation.mode == "shared"
    assert int(await state.get(DAY)) == 400
    for number in range(5):
        await state.script_flush()
        await standings.note(CALLER, f"r{number}", risk=1.0, flagged=True)
        await state.script_flush()
    assert (await standings.look(CALLER, "next", "{t}:none")).key is State.OPEN
    await state.script_flush()
    assert (await standings.look(CALLER, "next", "{t}:none")).shared
    await state.script_flush()
    assert await ballot.vote("m", "w", 60.0, 4, 0.5)
    await state.script_flush()
    assert await register.add("w", 60.0, "wrong")


@PATIENT
async def test_a_store_that_is_slow_within_its_time_is_still_one_account(client: Redis, wire: Wire) -> None:
    wire.delay = 0.05
    book = Book(client, key(micros_per_day=10_000))
    reservation = await book.reserve(100, 600)
    assert await book.ledger.settle(reservation, Usage(100, completion=30))
    assert reservation.mode == "shared"
    assert (await Standings(client, RiskConfig(), BreakerConfig()).look(CALLER, "r", "{t}:none")).shared


async def test_what_came_too_late_is_charged_once_when_the_store_is_quick_again(
    client: Redis, wire: Wire, state: Redis
) -> None:
    """Each operation is run by the store, after its sender has given it up."""
    clock = Clock()
    book = Book(client, key(micros_per_day=100_000, concurrent_streams=8))
    book.ledger._clock = book.ledger._breaker._clock = clock
    wire.delay = 3 * TIMEOUT
    used = 0
    for number in range(4):
        reservation = await book.reserve(100, 1000)
        assert reservation.mode == "emergency"
        clock.now += 2
        await book.ledger.extend(reservation, Usage(100, completion=200), 600)
        clock.now += 2
        assert not await book.ledger.settle(reservation, Usage(100, completion=number))
        used += 100 + number
        clock.now += 2
    wire.delay = 0.0

    async def shared() -> bool:
        clock.now += 2
        last = await book.reserve(0)
        await book.ledger.settle(last, Usage())
        return last.mode == "shared"

    await until(shared)
    await until(lambda: not book.ledger._owed)
    await book.ledger.stop()
    assert int(await state.get(DAY)) == used
    assert await state.zcard("meshlm:{t}:key:k:concurrent_streams") == 0


async def test_a_router_that_ends_settles_once_its_store_answers(
    client: Redis, wire: Wire, state: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "_LAST_TRIES", 60.0)
    book = Book(client, key(micros_per_day=100_000))
    held = [await book.reserve(100, 300) for _ in range(3)]
    wire.hung = True
    for reservation in held:
        assert not await book.ledger.settle(reservation, Usage(100, completion=5))
    ending = asyncio.create_task(book.ledger.stop())
    await until(lambda: book.ledger._paying is not None)
    wire.hung = False
    await ending
    assert int(await state.get(DAY)) == 3 * 105


async def test_a_router_ends_though_its_store_does_not_answer_and_says_what_is_lost(
    client: Redis, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "_LAST_TRIES", 0.0)
    book = Book(client, key(micros_per_day=100_000))
    held = [await book.reserve(100, 300) for _ in range(3)]
    wire.hung = True
    for reservation in held:
        assert not await book.ledger.settle(reservation, Usage(100, completion=5))
    with capture_logs() as lines:
        await book.ledger.stop()
    assert [line["count"] for line in lines if line["log_level"] == "error"] == [3]


async def test_of_many_at_once_one_asks_a_store_that_hung_and_the_others_go_on(client: Redis, wire: Wire) -> None:
    clock = Clock()
    book = Book(client, key(micros_per_day=100_000))
    book.ledger._clock = book.ledger._breaker._clock = clock
    standings = Standings(client, RiskConfig(), BreakerConfig(), clock=clock)
    wire.hung = True
    assert (await book.reserve(1)).mode == "emergency"
    assert not (await standings.look(CALLER, "r", "{t}:none")).shared
    for _ in range(3):
        clock.now += 1.5  # its pause is over
        before = wire.opened
        await asyncio.gather(*(book.reserve(1) for _ in range(20)))
        await until(lambda before=before: wire.opened > before)
        assert wire.opened == before + 1
        await asyncio.gather(*(standings.look(CALLER, f"r{n}", "{t}:none") for n in range(20)))
        await until(lambda before=before: wire.opened > before + 1)
        assert wire.opened == before + 2
    wire.hung = False


async def test_a_cancelled_question_does_not_keep_the_others_from_asking(client: Redis, wire: Wire) -> None:
    clock = Clock()
    book = Book(client, key(micros_per_day=100_000))
    book.ledger._clock = book.ledger._breaker._clock = clock
    wire.hung = True
    await book.reserve(1)
    clock.now += 1.5
    asking = asyncio.ensure_future(book.reserve(1))
    await until(lambda: book.ledger._breaker._trying)
    asking.cancel()
    with suppress(asyncio.CancelledError):
        await asking
    wire.hung = False

    async def shared() -> bool:
        clock.now += 1.5
        return (await book.reserve(1)).mode == "shared"

    await until(shared)


class TestAWholeRouter:
    @pytest.fixture
    def holder(self) -> KeyConfig:
        return key(micros_per_day=100_000, concurrent_streams=100, risk="enforce")

    @pytest.fixture
    async def mesh(self, tmp_path: Path, client: Redis, holder: KeyConfig) -> AsyncIterator[Mesh]:
        made = Mesh(tmp_path, client, {"emergency_share": 1.0, "prices": PRICES}, holder)
        await made.start()
        yield made
        await made.stop()

    async def test_a_store_that_hangs_is_waited_for_by_one_request_a_second(self, mesh: Mesh, wire: Wire) -> None:
        assert text_of(await collect(mesh.stream("before"))) == "Hello big world"
        await until(lambda: not mesh.pipeline._settling)
        wire.hung = True
        before, begun = wire.opened, time.monotonic()
        for number in range(20):
            assert text_of(await collect(mesh.stream(f"n {number}"))) == "Hello big world"
        seconds = time.monotonic() - begun
        # Limits, standing and quarantine: one question of each at first, and then one a second.
        assert wire.opened - before <= 3 * (1 + seconds)
        wire.hung = False

    @PATIENT
    async def test_a_store_that_forgets_its_scripts_between_requests_is_one_account(
        self, mesh: Mesh, state: Redis
    ) -> None:
        for number in range(3):
            await state.script_flush()
            responses = await collect(mesh.stream(f"n {number}"))
            assert responses[0].start.limits.streams_remaining == 99
        await until(lambda: not mesh.pipeline._settling)
        assert not mesh.ledger._breaker.open


@PATIENT
async def test_the_commands_of_a_request_to_the_store_are_two_before_its_first_token(
    tmp_path: Path, client: Redis, wire: Wire
) -> None:
    """So a store that is slow costs a request twice its answer, and at most twice the time-out."""
    mesh = Mesh(
        tmp_path, client, {"prices": PRICES}, key(micros_per_day=100_000, concurrent_streams=10, risk="enforce")
    )
    await mesh.start()
    await collect(mesh.stream("first"))  # which tells the scripts
    for worker in mesh.workers:
        worker.late = asyncio.Event()
    await until(lambda: not mesh.pipeline._settling)
    wire.seen.clear()
    call: Any = mesh.stream("second")
    assert (await call.read()).HasField("start")
    sent = [data for data in wire.seen if b"quarantine" not in data and b"ejections" not in data]
    assert len(sent) == 2
    for worker in mesh.workers:
        assert worker.late is not None
        worker.late.set()
    await collect(call)
    await mesh.stop()

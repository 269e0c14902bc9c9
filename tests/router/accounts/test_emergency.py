"""Limits while the ledger does not answer."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.chassis.config import StateConfig
from meshlm.chassis.errors import MeshError
from meshlm.chassis.state import connect
from meshlm.router.accounts.ledger import Ledger
from meshlm.router.accounts.limits import Kind, Usage
from tests.router.book import Book, key
from tests.router.valkey import run_valkey
from tests.waiting import until


async def test_only_the_emergency_share_passes(tmp_path: Path) -> None:
    holder = key(requests_per_minute=100, tokens_per_minute=1000)  # a tenth of them: 10, and 100
    book = Book(connect(StateConfig(f"unix://{tmp_path}/none")), holder)
    assert [(await book.reserve(0)).mode for _ in range(10)] == ["emergency"] * 10
    retry_after = (await book.refused(0)).retry_after
    assert retry_after is not None
    assert 6 - book.back(60) <= retry_after <= 6  # 10 a minute


async def test_streams_and_money_have_their_share_too() -> None:
    book = Book(None, key(concurrent_streams=20, micros_per_day=100_000))
    running = [await book.reserve(0) for _ in range(2)]
    assert (await book.refused(0)).metadata["limit"] == "concurrent_streams"
    for reservation in running:
        await book.ledger.settle(reservation, Usage())
    first = await book.reserve(9_000, 10_000)
    short = await book.ledger.extend(first, Usage(9_000, completion=256), 5_000)
    assert short is not None
    assert short[0].kind is Kind.DAY
    assert first.granted == pytest.approx(1_000, abs=5)
    await book.ledger.stop()


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60), st.floats(0, 20)), min_size=1, max_size=30))
@settings(deadline=None)
def test_no_more_than_the_share_of_rate_and_burst_passes(orders: list[tuple[int, int, float]]) -> None:
    """A tenth of 1,000 a minute, by a clock of the test's own."""

    async def run() -> tuple[int, float]:
        now, used = 0.0, 0
        book = Book(None, key(tokens_per_minute=1000))
        book.ledger = Ledger(None, book.config, clock=lambda: now)
        for prompt, answer, seconds in orders:
            with contextlib.suppress(MeshError):
                reservation = await book.reserve(prompt, answer)
                await book.ledger.extend(reservation, Usage(prompt), answer + 30)
                sent = min(answer + 30, reservation.granted)
                await book.ledger.settle(reservation, Usage(prompt, completion=sent))
                used += prompt + sent
            now += seconds
        return used, now

    used, seconds = asyncio.run(run())
    assert used <= 100 + 100 * seconds / 60 + 1e-6


async def test_what_was_not_used_is_given_back() -> None:
    book = Book(None, key(tokens_per_minute=1000))
    first = await book.reserve(50, 40)
    await book.refused(50, 40)
    await book.ledger.settle(first, Usage(prompt=5))
    await book.reserve(50, 40)


async def test_it_is_asked_again_and_told_what_was_settled_meanwhile(tmp_path: Path) -> None:
    """Killed with a stream open; a new one comes on the same socket, without any memory."""
    holder = key(micros_per_day=100_000)
    with run_valkey(tmp_path) as (url, process):
        client = connect(StateConfig(url, timeout_seconds=30))
        book = Book(client, holder)
        before = await book.reserve(100, 1000)
        assert before.mode == "shared"
        process.kill()
        process.wait()
        await book.ledger.extend(before, Usage(100, completion=200), 512)
        assert (before.mode, before.granted) == ("emergency", 512)
        meanwhile = await book.reserve(50, 100)
        assert not await book.ledger.settle(meanwhile, Usage(50, completion=10))
    (tmp_path / "s").unlink(missing_ok=True)
    with run_valkey(tmp_path):
        attempts = 0

        async def shared() -> bool:
            nonlocal attempts
            attempts += 1
            return (await book.reserve(0)).mode == "shared"

        await until(shared)
        assert await book.ledger.extend(before, Usage(100, completion=512), 768) is None
        assert before.mode == "shared"
        await book.ledger.settle(before, Usage(100, completion=600))

        async def told() -> bool:
            spent = int(await client.get("meshlm:{t}:key:k:micros_per_day"))
            return 700 + 60 <= spent <= 700 + 60 + attempts  # a token for each of them, at most

        await until(told)
        await book.ledger.stop()
        await client.aclose()


async def test_operations_whose_answers_were_lost_are_charged_once_when_the_ledger_wakes(tmp_path: Path) -> None:
    """Stopped, not dead: what was sent to it is still run, after its sender has given it up."""
    with run_valkey(tmp_path) as (url, process):
        client = connect(StateConfig(url, timeout_seconds=1.5))
        book = Book(client, key(micros_per_day=100_000))
        known = await book.reserve(100, 1000)
        process.send_signal(signal.SIGSTOP)
        lost = await book.reserve(100, 1000)
        assert lost.mode == "emergency"
        book.ledger._breaker._until = 0.0
        await book.refused(20_000)  # by the share, after it was asked for in vain: nobody will settle it
        await book.ledger.extend(lost, Usage(100, completion=256), 512)
        assert not await book.ledger.settle(known, Usage(100, completion=50))
        process.send_signal(signal.SIGCONT)

        async def asked() -> bool:
            await book.ledger.extend(lost, Usage(100, completion=256), 512)
            return lost.mode == "shared"

        await until(asked)
        assert await book.ledger.settle(lost, Usage(100, completion=300))

        async def charged() -> bool:
            return int(await client.get("meshlm:{t}:key:k:micros_per_day")) == 150 + 400

        await until(charged)
        await book.ledger.stop()
        assert await charged()
        await client.aclose()

"""Limits over a real Valkey. Expected numbers are counted by hand from the configured rates."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from meshlm.chassis.errors import MeshError, Reason
from meshlm.router.config import KeyConfig
from meshlm.router.ledger import Ledger

LIMITED = KeyConfig(
    id="k", secret_hash=hashlib.sha256(b"k").hexdigest(), tenant="t", requests_per_minute=5, tokens_per_minute=1000
)


def make(state: Redis | None) -> Ledger:
    return Ledger(state, reservation_seconds=60, emergency_share=0.1)


async def refused(ledger: Ledger, tokens: int, key: KeyConfig = LIMITED) -> MeshError:
    with pytest.raises(MeshError) as caught:
        await ledger.reserve("refused", key, tokens)
    assert caught.value.reason == Reason.RATE_LIMITED
    return caught.value


async def test_a_minutes_worth_may_come_at_once_and_then_no_more(state: Redis) -> None:
    ledger = make(state)
    left = [(await ledger.reserve(str(n), LIMITED, 10)).requests_left for n in range(5)]
    assert left == [4, 3, 2, 1, 0]
    error = await refused(ledger, 10)
    assert error.retry_after == pytest.approx(12, abs=1)  # 5 a minute: the next in 12 s


async def test_what_was_not_used_is_given_back(state: Redis) -> None:
    ledger = make(state)
    first = await ledger.reserve("a", LIMITED, 900)
    assert first.tokens_left == 100
    await refused(ledger, 200)
    assert await ledger.settle(first, 300)
    second = await ledger.reserve("b", LIMITED, 600)
    assert second.tokens_left == pytest.approx(100, abs=2)  # 1000 - 300 - 600, and a little time


async def test_more_than_was_reserved_is_charged_as_a_debt(state: Redis) -> None:
    ledger = make(state)
    first = await ledger.reserve("a", LIMITED, 100)
    await ledger.settle(first, 1500)
    error = await refused(ledger, 500)
    assert error.retry_after == pytest.approx(60, abs=2)  # 1500 + 500 - 1000 = 1000 tokens = a minute


async def test_a_second_settlement_changes_nothing(state: Redis) -> None:
    ledger = make(state)
    first = await ledger.reserve("a", LIMITED, 900)
    assert await ledger.settle(first, 0)
    assert not await ledger.settle(first, 0)
    assert (await ledger.reserve("b", LIMITED, 900)).tokens_left == pytest.approx(100, abs=2)


async def test_a_repeated_reservation_is_charged_once(state: Redis) -> None:
    ledger = make(state)
    await ledger.reserve("a", LIMITED, 600)
    await ledger.reserve("a", LIMITED, 600)
    assert (await ledger.reserve("b", LIMITED, 300)).tokens_left == pytest.approx(100, abs=2)


async def test_what_can_never_pass_is_refused_without_a_time_to_wait(state: Redis) -> None:
    error = await refused(make(state), 1001)
    assert error.retry_after is None
    assert error.metadata["permanent"] == "true"


async def test_a_refusal_by_one_limit_takes_nothing_from_the_other(state: Redis) -> None:
    ledger = make(state)
    await ledger.reserve("a", LIMITED, 900)
    for _ in range(20):
        await refused(ledger, 200)
    assert (await ledger.reserve("b", LIMITED, 50)).requests_left == 3


async def test_keys_and_tenants_do_not_share_a_limit(state: Redis) -> None:
    ledger = make(state)
    await ledger.reserve("a", LIMITED, 1000)
    for other in (dataclasses.replace(LIMITED, id="k2"), dataclasses.replace(LIMITED, tenant="t2")):
        assert (await ledger.reserve("b", other, 1000)).tokens_left == 0


async def test_a_key_without_limits_asks_nobody() -> None:
    free = dataclasses.replace(LIMITED, requests_per_minute=0, tokens_per_minute=0)
    assert (await make(None).reserve("a", free, 10**9)).mode == "unlimited"


async def test_without_a_ledger_only_the_emergency_share_passes(tmp_path: object) -> None:
    ledger = make(Redis(unix_socket_path=f"{tmp_path}/none", socket_timeout=0.2))
    wide = dataclasses.replace(LIMITED, requests_per_minute=100)  # a tenth of it: 10
    modes = [(await ledger.reserve(str(n), wide, 1)).mode for n in range(10)]
    assert modes == ["emergency"] * 10
    error = await refused(ledger, 1, wide)
    assert error.retry_after == pytest.approx(6, abs=0.5)  # 10 a minute


async def test_many_at_once_never_get_more_than_the_limit(state: Redis) -> None:
    ledger = make(state)
    key = dataclasses.replace(LIMITED, requests_per_minute=0)
    results = await asyncio.gather(*(ledger.reserve(str(n), key, 30) for n in range(100)), return_exceptions=True)
    granted = sum(not isinstance(result, BaseException) for result in results)
    assert granted in (33, 34)  # 1000 / 30, and what trickles in meanwhile


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 400), st.floats(0, 2)), min_size=1, max_size=30))
def test_settled_tokens_never_exceed_the_burst_and_the_rate(valkey: str, orders: list[tuple[int, float]]) -> None:
    """Whatever is reserved and settled in whatever order; overruns are debts that later requests wait for."""

    async def run() -> tuple[int, int]:
        client: Redis = Redis.from_url(valkey)
        await client.flushall()
        ledger = make(client)
        key = dataclasses.replace(LIMITED, requests_per_minute=0)
        settled = overrun = 0
        for number, (tokens, share) in enumerate(orders):
            try:
                reservation = await ledger.reserve(str(number), key, tokens)
            except MeshError:
                continue
            used = round(tokens * share)
            await ledger.settle(reservation, used)
            settled += used
            overrun = max(overrun, used - tokens)
        await client.aclose()
        return settled, overrun

    settled, overrun = asyncio.run(run())
    # 1000 at once, at most 17 a second while this runs (bounded by 5 s), and one last overrun.
    assert settled <= 1000 + 5 * 17 + max(overrun, 0)

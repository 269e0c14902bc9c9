"""Limits over a real Valkey. Expected numbers are counted by hand from the configured rates."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from redis.crc import key_slot

from meshlm.chassis.errors import MeshError, Reason
from meshlm.router.accounts.ledger import SLICE
from meshlm.router.accounts.limits import CONFIGURED, Kind, Usage
from meshlm.router.accounts.reservation import Reservation
from meshlm.router.config import LimitConfig, TenantConfig
from tests.router.book import PRICE, Book, key
from tests.router.valkey import run_valkey
from tests.waiting import until

LIMITED = key(requests_per_minute=5, tokens_per_minute=1000)


async def test_a_minutes_worth_may_come_at_once_and_then_no_more(state: Redis) -> None:
    book = Book(state, LIMITED)
    left = [(await book.reserve(10)).left[Kind.REQUESTS] for _ in range(5)]
    assert left == [4, 3, 2, 1, 0]
    error = await book.refused(10)
    assert (error.reason, error.metadata["limit"]) == (Reason.RATE_LIMITED, "requests_per_minute")
    assert error.retry_after is not None
    assert 12 - book.back(60) <= error.retry_after <= 12  # 5 a minute: the next in 12 s
    assert float(error.metadata["wait_seconds"]) == pytest.approx(error.retry_after, abs=0.001)


async def test_what_was_not_used_is_given_back(state: Redis) -> None:
    book = Book(state, LIMITED)
    first = await book.reserve(650, 10_000)
    assert (first.granted, first.left[Kind.TOKENS]) == (SLICE, 1000 - 650 - 256)
    await book.refused(200)
    assert await book.ledger.settle(first, Usage(prompt=200, completion=100))
    second = await book.reserve(590, 10)
    assert 100 <= second.left[Kind.TOKENS] <= 100 + book.back()  # 1000 - 300 - 600, and a little time


async def test_more_than_was_reserved_is_charged_as_a_debt(state: Redis) -> None:
    book = Book(state, LIMITED)
    first = await book.reserve(99)
    await book.ledger.settle(first, Usage(prompt=1500))
    error = await book.refused(499)
    assert error.retry_after is not None
    assert 60 - book.back(60) <= error.retry_after <= 60  # 1500 + 500 - 1000 = 1000 tokens = a minute


async def test_a_second_settlement_changes_nothing(state: Redis) -> None:
    book = Book(state, LIMITED)
    first = await book.reserve(899, name="a")
    again = Reservation(first.id, first.terms, first.usage, "shared", first.granted, number=9)  # another call's view
    assert await book.ledger.settle(first, Usage())
    assert not await book.ledger.settle(first, Usage())
    assert not await book.ledger.settle(again, Usage())
    assert 100 <= (await book.reserve(899)).left[Kind.TOKENS] <= 100 + book.back()


async def test_a_repeated_reservation_is_charged_once(state: Redis) -> None:
    book = Book(state, LIMITED)
    await book.reserve(599, name="a")
    await book.reserve(599, name="a")
    assert 100 <= (await book.reserve(299)).left[Kind.TOKENS] <= 100 + book.back()


async def test_an_extension_that_comes_after_the_settlement_takes_nothing(state: Redis) -> None:
    book = Book(state, LIMITED)
    first = await book.reserve(99, name="a")
    late = Reservation(first.id, first.terms, first.usage, "shared", first.granted, number=1)
    await book.ledger.settle(first, Usage())
    await book.ledger.extend(late, Usage(prompt=99), 500)
    assert 100 <= (await book.reserve(899)).left[Kind.TOKENS] <= 100 + book.back()


async def test_an_extension_that_was_overtaken_takes_nothing_back(state: Redis) -> None:
    book = Book(state, LIMITED)
    first = await book.reserve(99, name="a")
    overtaken = Reservation(first.id, first.terms, first.usage, "shared", first.granted, number=1)
    await book.ledger.extend(first, Usage(prompt=99), 300)
    await book.ledger.extend(first, Usage(prompt=99), 801)
    await book.ledger.extend(overtaken, Usage(prompt=99), 1)  # number 2, after 3 was done
    assert (await book.refused(199)).metadata["limit"] == "tokens_per_minute"


@pytest.mark.parametrize(("kind", "prompt"), [("tokens_per_minute", 1000), ("prompt_tokens_per_minute", 1001)])
async def test_what_can_never_pass_is_refused_without_a_time_to_wait(state: Redis, kind: str, prompt: int) -> None:
    error = await Book(state, key(**{kind: 1000})).refused(prompt)
    assert error.reason == Reason.RATE_LIMITED
    assert error.retry_after is None
    assert (error.metadata["limit"], error.metadata["permanent"]) == (kind, "true")


async def test_a_prompt_that_a_whole_budget_does_not_pay_for_can_never_pass(state: Redis) -> None:
    error = await Book(state, key(micros_per_day=1000)).refused(1000)
    assert (error.reason, error.metadata["permanent"]) == (Reason.BUDGET_SPENT, "true")


async def test_a_limit_below_a_slice_still_lets_a_request_pass(state: Redis) -> None:
    assert (await Book(state, key(tokens_per_minute=100)).reserve(40, 512)).granted == 60


async def test_a_refusal_by_one_limit_takes_nothing_from_the_others(state: Redis) -> None:
    book = Book(state, key(requests_per_minute=5, tokens_per_minute=1000, concurrent_streams=3, micros_per_day=5000))
    first = await book.reserve(899)
    for _ in range(20):
        await book.refused(199)
    second = await book.reserve(49)
    assert second.left[Kind.REQUESTS] == 3
    assert second.left[Kind.STREAMS] == 1
    assert second.left[Kind.DAY] == 5000 - 900 - 50
    assert first.left[Kind.STREAMS] == 2


async def test_each_limit_refuses_by_its_own_name_and_the_longest_wait_is_told(state: Redis) -> None:
    for kind in CONFIGURED:
        await state.flushall()
        amount = 2 if kind in (Kind.REQUESTS, Kind.STREAMS) else 250
        book = Book(state, key(**{kind: amount}))
        await book.reserve(60, 60)
        await book.reserve(60, 60)
        if kind in (Kind.PROMPT, Kind.COMPLETION):
            await book.reserve(60, 60)
            await book.reserve(60, 60)
        error = await book.refused(60, 60)
        await book.ledger.stop()
        assert error.metadata["limit"] == str(kind)
        assert error.metadata["holder"] == "key"
        assert error.reason == (Reason.BUDGET_SPENT if kind.money else Reason.RATE_LIMITED)
    await state.flushall()
    book = Book(state, key(requests_per_minute=60, tokens_per_minute=1000))
    for _ in range(60):
        await book.reserve(15)
    assert (await book.refused(500)).metadata["limit"] == "tokens_per_minute"  # half a minute, not a second


async def test_keys_and_tenants_do_not_share_a_keys_limit(state: Redis) -> None:
    keys = [key(tokens_per_minute=1000), key("k2", tokens_per_minute=1000), key("k3", "u", tokens_per_minute=1000)]
    book = Book(state, *keys)
    for holder in keys:
        assert (await book.reserve(999, holder=holder)).left[Kind.TOKENS] == 0


async def test_a_tenants_limit_is_of_all_its_keys_and_of_no_others(state: Redis) -> None:
    keys = [key("a"), key("b", tokens_per_minute=5000), key("c", "u")]
    book = Book(state, *keys, tenants={"t": TenantConfig(tokens_per_minute=1000)})
    await book.reserve(599, holder=keys[0])
    error = await book.refused(599, holder=keys[1])
    assert (error.metadata["holder"], error.metadata["holder_id"]) == ("tenant", "t")
    assert (await book.reserve(399, holder=keys[1])).left[Kind.TOKENS] <= book.back()  # the tenant's, not the key's
    assert (await book.reserve(10**6, holder=keys[2])).mode == "unlimited"


async def test_a_models_limit_is_of_that_model_beside_that_of_all(state: Redis) -> None:
    small = LimitConfig(tokens_per_minute=100)
    holder = key(tokens_per_minute=1000, model_limits={"large": small})
    book = Book(state, holder, tenants={"t": TenantConfig(model_limits={"large": LimitConfig(requests_per_minute=2)})})
    await book.reserve(59, model="large")
    error = await book.refused(59, model="large")
    assert (error.metadata["model"], error.metadata["holder"]) == ("large", "key")
    await book.reserve(10, model="large")
    error = await book.refused(10, model="large")
    assert (error.metadata["model"], error.metadata["limit"]) == ("large", "requests_per_minute")
    left = (await book.reserve(899, model="m")).left[Kind.TOKENS]
    assert 1000 - 60 - 11 - 900 <= left <= 1000 - 60 - 11 - 900 + book.back()


async def test_a_stream_is_granted_what_is_left_and_not_a_token_more(state: Redis) -> None:
    book = Book(state, key(micros_per_day=1000))
    other = await book.reserve(99)
    first = await book.reserve(100, 10_000)
    assert first.granted == 256
    assert await book.ledger.extend(first, Usage(prompt=100, completion=200), 512) is None
    short = await book.ledger.extend(first, Usage(prompt=100, completion=512), 1024)
    assert short is not None
    assert short[0].kind is Kind.DAY
    assert first.granted == 1000 - 100 - 100
    await book.ledger.settle(other, Usage())
    await book.ledger.extend(first, Usage(prompt=100, completion=800), 1024)
    assert first.granted == 900


async def test_a_prompt_above_its_estimate_leaves_less_for_the_answer(state: Redis) -> None:
    book = Book(state, key(micros_per_month=1000))
    first = await book.reserve(100, 10_000)
    await book.ledger.extend(first, Usage(prompt=900), 256)
    assert first.granted == 100


class TestStreams:
    async def test_no_more_run_at_a_time_and_an_ended_one_makes_room(self, state: Redis) -> None:
        book = Book(state, key(concurrent_streams=2))
        first, second = await book.reserve(1), await book.reserve(1)
        assert [first.left[Kind.STREAMS], second.left[Kind.STREAMS]] == [1, 0]
        error = await book.refused(1)
        assert error.retry_after is not None
        await book.ledger.settle(first, Usage())
        await book.reserve(1)
        await book.refused(1)
        await book.ledger.stop()

    async def test_the_places_of_a_dead_router_are_free_when_their_leases_end_and_no_others(self, state: Redis) -> None:
        alive, dead = (Book(state, key(concurrent_streams=2), lease_seconds=6.0) for _ in range(2))
        await alive.reserve(1, name="alive")
        await dead.reserve(1, name="dead")
        await dead.ledger.stop()  # as a process that was killed: nothing renews its lease
        await alive.refused(1)

        async def passes() -> bool:
            with contextlib.suppress(MeshError):
                await alive.reserve(1, name="next")
                return True
            return False

        await until(passes)
        assert (await alive.refused(1)).metadata["limit"] == "concurrent_streams"  # `alive` was renewed all the while
        assert set(await state.zrange("meshlm:{t}:key:k:concurrent_streams", 0, -1)) == {b"alive", b"next"}
        await alive.ledger.stop()

    async def test_a_weight_takes_more_places_and_gives_them_all_back(self, state: Redis) -> None:
        book = Book(state, key(concurrent_streams=4))
        heavy = await book.reserve(1, weight=2.5)
        assert heavy.left[Kind.STREAMS] == 1
        light = await book.reserve(1)
        await book.refused(1)
        await book.ledger.settle(heavy, Usage())
        await book.reserve(1, weight=3.0)
        await book.ledger.settle(light, Usage())
        assert await state.hlen("meshlm:{t}:key:k:concurrent_streams:weights") == 1
        await book.ledger.stop()


class TestWeights:
    async def test_tokens_are_charged_so_many_times_and_money_once(self, state: Redis) -> None:
        book = Book(state, key(tokens_per_minute=1000, micros_per_day=1000, requests_per_minute=10))
        first = await book.reserve(99, weight=4.0)
        assert first.left[Kind.TOKENS] == 1000 - 400
        assert first.left[Kind.DAY] == 1000 - 100
        assert first.left[Kind.REQUESTS] == 9
        await book.ledger.settle(first, Usage(prompt=49, completion=1))
        assert 1000 - 200 - 1 <= (await book.reserve(0)).left[Kind.TOKENS] <= 1000 - 200 - 1 + book.back()

    async def test_each_token_of_the_answer_is_charged_so_many_times_too(self, state: Redis) -> None:
        book = Book(state, key(completion_tokens_per_minute=1000, micros_per_day=10_000))
        first = await book.reserve(100, 1000, weight=2.5)
        assert first.granted == SLICE
        await book.ledger.extend(first, Usage(prompt=100, completion=256), 512)
        assert 400 <= first.granted <= 400 + book.back() / 2.5  # 1000 / 2.5, and a little time

    async def test_a_weight_never_makes_a_request_impossible(self, state: Redis) -> None:
        book = Book(state, key(tokens_per_minute=1000, concurrent_streams=2))
        first = await book.reserve(499, 100, weight=8.0)
        assert first.left[Kind.TOKENS] == 0
        assert first.left[Kind.STREAMS] == 0
        await book.ledger.stop()


async def test_a_limit_that_does_not_count_the_answer_is_not_asked_while_it_streams(state: Redis) -> None:
    limits = key(requests_per_minute=5, prompt_tokens_per_minute=1000, concurrent_streams=1)
    book = Book(state, limits, lease_seconds=1.0)
    reservation = await book.reserve(10, 5000)
    assert (reservation.mode, reservation.endless) == ("shared", True)
    record = await state.get(f"meshlm:{{t}}:reservation:{reservation.id}")

    async def renewed() -> bool:  # its place is, all the same
        return bool(await state.get(f"meshlm:{{t}}:reservation:{reservation.id}") != record)

    await until(renewed)
    assert await book.ledger.settle(reservation, Usage(20, completion=5000))
    assert 1000 - 20 - 10 <= (await book.reserve(10)).left[Kind.PROMPT] <= 1000 - 20 - 10 + book.back()
    await book.ledger.stop()


async def test_a_key_without_limits_asks_nobody() -> None:
    reservation = await Book(None, key()).reserve(10**9)
    assert reservation.mode == "unlimited"
    assert reservation.endless


@contextlib.asynccontextmanager
async def one_node_cluster(folder: Path) -> AsyncIterator[Redis]:
    with run_valkey(folder, "--cluster-enabled", "yes") as (url, _):
        client: Redis = Redis.from_url(url)
        await client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)

        async def serves() -> bool:
            return bool((await client.execute_command("CLUSTER INFO"))["cluster_state"] == "ok")

        await until(serves)
        yield client
        await client.aclose()


async def test_all_limits_of_a_request_are_in_one_slot_of_a_cluster(tmp_path: Path) -> None:
    every = {str(kind): 10_000 for kind in CONFIGURED}
    holder = key(model_limits={"m{x}": LimitConfig(**every)}, **every)
    tenant = TenantConfig(model_limits={"m{x}": LimitConfig(**every)}, **every)
    async with one_node_cluster(tmp_path) as client:
        book = Book(client, holder, tenants={"t": tenant}, prices={"m{x}": PRICE})
        reservation = await book.reserve(10, 300, model="m{x}")
        assert (reservation.mode, len(reservation.terms.limits)) == ("shared", 4 * len(CONFIGURED))
        await book.ledger.extend(reservation, Usage(10, completion=200), 300)
        assert await book.ledger.settle(reservation, Usage(10, completion=250))
        names = [name async for name in client.scan_iter()]
        assert len({key_slot(name) for name in names}) == 1
        assert await client.get("meshlm:{t}:tenant:t:micros_per_day:m{x}") is None  # a tenant's name stands once
        assert await client.get("meshlm:{t}:tenant:micros_per_day:m{x}") == b"260"
        await book.ledger.stop()


async def test_many_at_once_never_get_more_than_the_limit(state: Redis) -> None:
    book = Book(state, key(tokens_per_minute=1000))
    results = await asyncio.gather(*(book.reserve(29) for _ in range(100)), return_exceptions=True)
    granted = sum(not isinstance(result, BaseException) for result in results)
    assert 33 <= granted <= (1000 + book.back()) / 30


Order = tuple[int, int, float, bool]
ORDERS = st.lists(
    st.tuples(st.integers(0, 300), st.integers(1, 900), st.floats(0, 1), st.booleans()), min_size=1, max_size=30
)


@settings(max_examples=40, deadline=None)
@given(ORDERS)
def test_settled_tokens_never_exceed_the_burst_and_the_rate(valkey: str, orders: list[Order]) -> None:
    """Whatever is reserved, extended, settled or lost in whatever order. Money has no rate: its bound is exact."""

    async def run() -> tuple[int, float, int]:
        client: Redis = Redis.from_url(valkey)
        await client.flushall()
        book = Book(client, key(tokens_per_minute=1000, micros_per_day=2500))
        began, used, open_ones = await client.time(), 0, []
        for prompt, answer, share, lost in orders:
            with contextlib.suppress(MeshError):
                reservation = await book.reserve(prompt, answer)
                await book.ledger.extend(reservation, Usage(prompt), answer)
                sent = round(min(answer, reservation.granted) * share)
                used += prompt + sent
                open_ones.append((reservation, Usage(prompt, completion=sent), lost))
            if len(open_ones) > 2:
                reservation, usage, lost = open_ones.pop(0)
                if not lost:
                    await book.ledger.settle(reservation, usage)
                    await book.ledger.settle(reservation, usage)
        ended = await client.time()
        spent = int(await client.get("meshlm:{t}:key:k:micros_per_day") or 0)
        await client.aclose()
        assert used <= spent <= 2500
        return used, ended[0] - began[0] + (ended[1] - began[1]) / 1e6, spent

    used, seconds, _ = asyncio.run(run())
    assert used <= 1000 * (1 + seconds / 60)

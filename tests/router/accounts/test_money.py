"""Prices, and limits on money: whole micro-units, by the calendar."""

from __future__ import annotations

import asyncio
import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from meshlm.router.accounts.ledger_script import CALENDAR
from meshlm.router.accounts.limits import Terms, Usage
from meshlm.router.config import PriceConfig
from tests.router.book import DAY, Book, key


async def test_a_day_is_used_up_until_midnight_utc(state: Redis) -> None:
    book = Book(state, key(micros_per_day=1000))
    await book.reserve(899)
    error = await book.refused(199)
    seconds, _ = await state.time()
    assert error.retry_after == pytest.approx(DAY - seconds % DAY, abs=2)
    assert await state.get("meshlm:{t}:key:k:micros_per_day") == b"900"
    assert await state.expiretime("meshlm:{t}:key:k:micros_per_day") == (seconds // DAY + 1) * DAY


async def test_a_month_is_used_up_until_its_last_day_has_ended(state: Redis) -> None:
    book = Book(state, key(micros_per_month=1000))
    await book.reserve(899)
    seconds, _ = await state.time()
    now = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    ends = datetime.datetime(now.year + now.month // 12, now.month % 12 + 1, 1, tzinfo=datetime.UTC)
    assert await state.expiretime("meshlm:{t}:key:k:micros_per_month") == ends.timestamp()


async def test_what_was_reserved_before_midnight_is_not_given_back_to_the_new_day(state: Redis) -> None:
    book = Book(state, key(micros_per_day=1000))
    first = await book.reserve(499, name="a")
    name = "meshlm:{t}:reservation:a"
    record = (await state.get(name)).decode().split()
    record[2] = str(int(record[2]) - DAY * 1_000_000)  # as if it had been taken a day ago
    await state.set(name, " ".join(record))
    await state.set("meshlm:{t}:key:k:micros_per_day", 300, keepttl=True)  # spent by others since
    await book.ledger.settle(first, Usage())
    assert await state.get("meshlm:{t}:key:k:micros_per_day") == b"300"


@given(st.integers(0, 4_000_000_000))
@settings(max_examples=200, deadline=None)
def test_the_calendar_is_that_of_datetime(valkey: str, seconds: int) -> None:
    script = CALENDAR + "local a, b = period(KEYS[1], tonumber(ARGV[1])) return {a, b}"

    async def run() -> list[list[int]]:
        client: Redis = Redis.from_url(valkey)
        found = [await client.eval(script, 1, form, str(seconds)) for form in ("day", "month")]
        await client.aclose()
        return found

    day, month = asyncio.run(run())
    assert day == [seconds // DAY * DAY, seconds // DAY * DAY + DAY]
    now = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    ends = datetime.datetime(now.year + now.month // 12, now.month % 12 + 1, 1, tzinfo=datetime.UTC)
    assert month == [datetime.datetime(now.year, now.month, 1, tzinfo=datetime.UTC).timestamp(), ends.timestamp()]


def test_costs_are_whole_and_rounded_up_once() -> None:
    price = PriceConfig(prompt=150_000, cached_prompt=75_000, completion=600_000)
    terms = Terms("t", (), price)
    # 3 * 0.15 + 1 * 0.075 + 2 * 0.6 = 1.725 millionths
    assert terms.cost(Usage(prompt=4, cached=1, completion=2)) == 2
    assert terms.cost(Usage(prompt=4_000_000, cached=1_000_000, completion=2_000_000)) == 1_725_000
    assert terms.cost(Usage()) == 0
    assert Terms("t", ()).cost(Usage(prompt=1)) is None


async def test_the_ledger_charges_the_very_cost_that_is_told(state: Redis) -> None:
    price = PriceConfig(prompt=150_001, cached_prompt=75_003, completion=600_007)
    book = Book(state, key(micros_per_day=10**12), prices={"m": price})
    told = 0
    for prompt, cached, completion in ((4, 1, 2), (1, 0, 0), (999_983, 17, 31_337), (7, 7, 7)):
        reservation = await book.reserve(prompt, 100)
        usage = Usage(prompt, cached, completion)
        await book.ledger.settle(reservation, usage)
        told += reservation.terms.cost(usage) or 0
    assert await state.get("meshlm:{t}:key:k:micros_per_day") == str(told).encode()

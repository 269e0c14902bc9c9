"""One connection for all callers of a process, against a real Valkey."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen

import pytest
import redis
from redis.exceptions import NoScriptError, ResponseError

from meshlm.chassis.config import StateConfig
from meshlm.chassis.shared_redis import SharedRedis
from meshlm.chassis.state import connect
from tests.router.valkey import run_valkey

Server = tuple[str, Popen[bytes]]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with run_valkey(tmp_path) as found:
        yield found


def client_of(server: Server, seconds: float = 60.0) -> SharedRedis:
    client = connect(StateConfig(redis_url=server[0], timeout_seconds=seconds))
    assert isinstance(client, SharedRedis)
    return client


async def test_callers_share_a_connection_and_each_gets_the_answer_to_its_own_command(server: Server) -> None:
    client = client_of(server)
    before = (await client.info("stats"))["total_connections_received"]

    async def one(number: int) -> None:
        assert await client.set(f"k{number}", number) is True
        assert await client.get(f"k{number}") == str(number).encode()

    await asyncio.gather(*(one(number) for number in range(500)))
    assert (await client.info("stats"))["total_connections_received"] == before
    await client.aclose()


async def test_what_is_asked_in_one_turn_goes_out_in_fewer_reads_than_commands(server: Server) -> None:
    """The server counts what it reads: a read a command would mean that nothing was put together."""
    client = client_of(server)
    before = await client.info("stats")
    await asyncio.gather(*(client.get("k") for _ in range(200)))
    after = await client.info("stats")
    assert after["total_commands_processed"] - before["total_commands_processed"] >= 200
    assert after["total_reads_processed"] - before["total_reads_processed"] < 50
    await client.aclose()


async def test_a_caller_that_leaves_does_not_shift_the_answers_of_others(server: Server) -> None:
    client = client_of(server)
    await client.mset({f"k{number}": number for number in range(100)})
    asking = [asyncio.ensure_future(client.get(f"k{number}")) for number in range(100)]
    await asyncio.sleep(0)
    for task in asking[::3]:
        task.cancel()
    found = await asyncio.gather(*asking, return_exceptions=True)
    for number, answer in enumerate(found):
        assert isinstance(answer, asyncio.CancelledError) if number % 3 == 0 else answer == str(number).encode()
    await client.aclose()


async def test_an_error_is_of_its_own_command_alone(server: Server) -> None:
    client = client_of(server)
    await client.set("text", "x")
    answers = await asyncio.gather(
        client.get("text"), client.incr("text"), client.evalsha("0" * 40, 0), client.get("text"), return_exceptions=True
    )
    assert answers[0] == answers[3] == b"x"
    assert isinstance(answers[1], ResponseError)
    assert isinstance(answers[2], NoScriptError)
    assert await client.register_script("return ARGV[1]")(args=["y"]) == b"y"
    with pytest.raises(redis.DataError):
        await client.set("k", object())  # type: ignore[arg-type]
    assert await client.get("text") == b"x"
    await client.aclose()


async def test_a_server_that_hangs_costs_each_caller_its_time_and_no_more(server: Server) -> None:
    client = client_of(server, seconds=0.2)
    assert await _answered(client)
    server[1].send_signal(signal.SIGSTOP)
    answers = await asyncio.gather(*(client.get("k") for _ in range(20)), return_exceptions=True)
    assert all(isinstance(answer, TimeoutError) for answer in answers)
    server[1].send_signal(signal.SIGCONT)
    assert await _answered(client)
    await client.aclose()


async def test_a_connection_that_was_given_up_closes_with_the_last_who_waits_there_and_leaves(server: Server) -> None:
    client = client_of(server, seconds=1.0)
    assert await _answered(client)
    line = client._line
    assert line is not None
    server[1].send_signal(signal.SIGSTOP)
    try:
        early = asyncio.ensure_future(client.get("k"))
        await asyncio.sleep(0.5)
        late = asyncio.ensure_future(client.get("k"))
        with pytest.raises(TimeoutError):
            await early
        late.cancel()
        await asyncio.wait([line._running], timeout=60)
        assert line._running.done()
    finally:
        server[1].send_signal(signal.SIGCONT)
        await client.aclose()


async def test_a_server_that_is_killed_fails_those_who_wait_at_once_and_its_successor_serves(tmp_path: Path) -> None:
    with run_valkey(tmp_path) as first:
        client = client_of(first, seconds=60.0)
        assert await client.ping()
        first[1].send_signal(signal.SIGSTOP)
        asking = [asyncio.ensure_future(client.get("k")) for _ in range(5)]
        await asyncio.sleep(0)
        first[1].kill()
        answers = await asyncio.gather(*asking, return_exceptions=True)  # within the test's time, not the client's
        assert all(isinstance(answer, redis.RedisError | OSError) for answer in answers)
    with run_valkey(tmp_path):
        assert await _answered(client)
    await client.aclose()


async def test_closing_tells_those_who_wait(server: Server) -> None:
    client = client_of(server, seconds=60.0)
    assert await client.ping()
    server[1].send_signal(signal.SIGSTOP)
    asking = asyncio.ensure_future(client.get("k"))
    await asyncio.sleep(0)
    await client.aclose()
    with pytest.raises(redis.ConnectionError):
        await asking


async def _answered(client: SharedRedis) -> bool:
    """Whether it answers within a minute; a command of before may still be in the server's hands."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            return bool(await client.ping())
        except (redis.RedisError, OSError, TimeoutError):
            await asyncio.sleep(0.01)
    return False

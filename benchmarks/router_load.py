"""Who loads the router in `router.py`, and what is read off it: clients that cost little, crowds, rates, memory."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from peers.fixed_engine import MODEL, WORD

from meshlm.chassis.channels import open_channel
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import inference_pb2, worker_pb2

SECRET = "a-key"
LITELLM_KEY = f"sk-{os.urandom(16).hex()}"
WINDOW = 16 * 4  # bytes of an answer that a strict guard judges before it lets the first of them out
_numbers = itertools.count()
Ask = Callable[["Load"], Awaitable["Sample"]]
Sample = tuple[float, float, int]  # seconds to the first chunk, and to the last; chunks


class Load:
    """What one request asks for."""

    def __init__(self, prompt: int, tokens: int, each: int, ms: float) -> None:
        """`prompt`: its tokens, about; `tokens` come back, `each` in a message, a message every `ms`."""
        self.text = "river " * (prompt - 1)
        self.tokens, self.each, self.ms = tokens, each, ms

    @property
    def window(self) -> int:
        """Messages of its answer that fill the guard's first window, or all."""
        return min(-(-WINDOW // (len(WORD) * self.each)), -(-self.tokens // self.each))

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

    async def ask_window(self, load: Load) -> Sample:
        """As `ask`, to the message that fills the guard's first window."""
        return await self.ask(load, load.window)

    async def ask(self, load: Load, message: int = 1) -> Sample:
        """`message`: of the answer, which is waited for first."""
        kind = worker_pb2.RunGenerationRequest if self._worker else inference_pb2.StreamGenerateRequest
        request = kind(generation=load.generation()).SerializeToString()
        stub = next(self._turn).unary_stream(f"/{self._method}")
        begun, first, count = time.perf_counter(), 0.0, 0
        call = stub(request, metadata=[("authorization", f"Bearer {SECRET}")], timeout=120)
        while await call.read() is not grpc.aio.EOF:
            count += 1
            if count == 1 + message:  # behind the acceptance, or the start
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
        while self._idle and self._idle[-1][0].at_eof():  # it closes what was idle for some seconds
            self._idle.pop()[1].close()
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

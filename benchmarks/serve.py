"""Serving: time to first token, time per output token and throughput, straight at the worker and through the mesh.

Peer: `transformers` `generate` in fp32 on the same weights and the same lengths, in turn with ours. The mesh's own cost
is measured against the worker alone: the same requests, in turn, with guard and cache in the way.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
from harness import Peer, Row, against, median, options, report, spread

from meshlm.chassis.channels import open_channel
from meshlm.chassis.config import Source
from meshlm.mesh.config import MeshConfig
from meshlm.mesh.launcher import LocalMesh, plan_mesh
from meshlm.mesh.model import model_path
from meshlm.mesh.state import StateFolder
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc

THREADS = 2
WORDS = (
    "river", "stone", "cloud", "garden", "winter", "window", "letter", "music", "harbor", "silver", "forest", "candle",
    "bridge", "summer", "morning",
)  # fmt: skip
REQUIREMENTS = (("torch==2.13.0",), ("transformers==5.23.0", "accelerate>=1.0", "gguf>=0.17"))


@dataclass(frozen=True)
class Sample:
    """One request: seconds to the first token and to the last, and the number of tokens; those of its prompt too."""

    first: float
    last: float
    tokens: int
    prompt: int = 0

    @property
    def tpot(self) -> float:
        return (self.last - self.first) / (self.tokens - 1)


class Target:
    """Where requests go: a worker, or a router."""

    def __init__(self, address: str, key: str = "") -> None:
        self._channel = open_channel(address)
        self._worker: Any = worker_pb2_grpc.WorkerServiceStub(self._channel)
        self._router: Any = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._key = key

    async def run(self, generation: pb.Generation) -> Sample:
        begun, first, tokens, prompt = time.perf_counter(), 0.0, 0, 0
        call = self._call(generation)
        while (message := await call.read()) is not grpc.aio.EOF:
            if message.WhichOneof("event") == "chunk":
                first = first or time.perf_counter() - begun
                tokens, prompt = message.usage.completion_tokens, message.usage.prompt_tokens
        return Sample(first, time.perf_counter() - begun, tokens, prompt)

    def _call(self, generation: pb.Generation) -> Any:
        if not self._key:
            return self._worker.RunGeneration(worker_pb2.RunGenerationRequest(generation=generation))
        request = inference_pb2.StreamGenerateRequest(generation=generation)
        return self._router.StreamGenerate(request, metadata=[("authorization", f"Bearer {self._key}")])

    async def close(self) -> None:
        await self._channel.close()


def of_ids(prompt: int, new: int) -> pb.Generation:
    """Random tokens of an exact length: for the worker, beside the peer."""
    ids = [random.randrange(1000, 40_000) for _ in range(prompt)]
    return pb.Generation(input=pb.Input(token_ids=pb.TokenIds(ids=ids)), sampling=_fixed(new))


def of_text(new: int) -> pb.Generation:
    """A chat that nobody has asked before, so that neither cache nor prefix cache can answer."""
    text = " ".join(random.choice(WORDS) for _ in range(30))
    chat = pb.Chat(messages=[pb.Message(role="user", content=f"Write about {text}.")])
    return pb.Generation(input=pb.Input(chat=chat), sampling=_fixed(new))


def _fixed(new: int) -> pb.Sampling:
    return pb.Sampling(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True)


async def together(target: Target, make: Callable[[], pb.Generation], count: int) -> tuple[float, list[Sample]]:
    """Tokens a second of `count` requests at once, and their samples."""
    begun = time.perf_counter()
    samples = await asyncio.gather(*(target.run(make()) for _ in range(count)))
    return sum(sample.tokens for sample in samples) / (time.perf_counter() - begun), samples


async def beside_transformers(worker: Target, peer: Peer, runs: int) -> list[Row]:
    rows = []
    for count, prompt, goal in ((1, 32, "1.5x"), (16, 64, "2x")):
        ours: list[float] = []
        theirs: list[float] = []
        our_first: list[float] = []
        their_first: list[float] = []
        for _ in range(runs):
            rate, samples = await together(worker, lambda prompt=prompt: of_ids(prompt, 128), count)  # type: ignore[misc]
            ours.append(rate)
            our_first.append(median([sample.first for sample in samples]) * 1e3)
            answer = await asyncio.to_thread(peer.ask, batch=count, prompt=prompt, new=128)
            theirs.append(count * 128 / answer["seconds"])
            their_first.append(answer["ttft"] * 1e3)
        name = f"{count} at a time, prompt {prompt}, 128 new"
        rows.append(against(f"throughput, {name}", "tok/s", ours, "transformers fp32", theirs, goal=goal))
        rows.append(against(f"TTFT, {name}", "ms", our_first, "transformers fp32", their_first, less_is_better=True))
    return rows


async def cost_of_the_mesh(worker: Target, router: Target, runs: int) -> list[Row]:
    """The same kind of request in turn at the worker and through the mesh; medians of the two series."""
    direct, through = [], []
    for _ in range(runs):
        direct.append(await worker.run(of_text(48)))
        through.append(await router.run(of_text(48)))
    added = (median([s.first for s in through]) - median([s.first for s in direct])) * 1e3
    firsts = [s.first * 1e3 for s in through]
    rows = [
        Row("TTFT added by the mesh at the median", "ms", added, runs, spread(firsts), limit=10.0, goal="under 10 ms"),
        against("TTFT through the mesh", "ms", firsts, "the worker alone", [s.first * 1e3 for s in direct],
                less_is_better=True),
        against("TPOT through the mesh", "ms", [s.tpot * 1e3 for s in through], "the worker alone",
                [s.tpot * 1e3 for s in direct], less_is_better=True, goal="at least 0.95"),
    ]  # fmt: skip
    rates, direct_rates = [], []
    for _ in range(max(2, runs // 5)):
        direct_rates.append((await together(worker, lambda: of_text(64), 16))[0])
        rates.append((await together(router, lambda: of_text(64), 16))[0])
    rows.append(against("throughput of 16 through the mesh", "tok/s", rates, "the worker alone", direct_rates))
    return rows


async def answer_from_the_cache(router: Target, runs: int) -> Row:
    generated, cached = [], []
    for _ in range(runs):
        generation = of_text(48)
        generated.append((await router.run(generation)).last * 1e3)
        cached.append((await router.run(generation)).last * 1e3)
    return against(
        "whole answer of 48 tokens from the cache", "ms", cached, "generated", generated, less_is_better=True
    )


@asynccontextmanager
async def mesh() -> AsyncIterator[LocalMesh]:
    with TemporaryDirectory(prefix="meshlm-") as root:
        file = Path(root) / "mesh.toml"
        file.write_text(f'[worker]\nthreads = {THREADS}\n[router.server]\nlisten = "unix:{root}/router"\n')
        folder = StateFolder(Path(root) / "s")
        folder.acquire()
        config = MeshConfig()
        try:
            plan = plan_mesh(Source.read(file), folder, config, config_path=file)
            async with LocalMesh(plan, folder, config) as running:
                yield running
        finally:
            folder.release()


async def measure(quick: bool) -> list[Row]:
    random.seed(0)
    peer = Peer("transformers_generate.py", REQUIREMENTS, str(model_path()))
    async with mesh() as running:
        worker, router = Target(running.address("worker")), Target(running.target, running.key)
        for target in (worker, router):
            await target.run(of_text(16))
        rows = await beside_transformers(worker, peer, 1 if quick else 5)
        rows += await cost_of_the_mesh(worker, router, 7 if quick else 25)
        rows.append(await answer_from_the_cache(router, 3 if quick else 9))
        await worker.close()
        await router.close()
    peer.close()
    return rows


def main() -> None:
    chosen = options(__doc__ or "")
    report("serve", asyncio.run(measure(chosen.quick)), chosen.json)


if __name__ == "__main__":
    main()

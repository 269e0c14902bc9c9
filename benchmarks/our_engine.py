"""The worker's engine process, held as the front holds it: what the benchmarks of the engine measure."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from harness import peak_memory
from workload import Request, Trace

from meshlm.worker.config import WorkerConfig
from meshlm.worker.front.engine_client import EngineClient
from meshlm.worker.front.engine_process import EngineSettings
from meshlm.worker.messages import Limits, ModelFacts, NewToken, Sampling, Scored, Submit


class OurEngine:
    """Tokens are timed where the front would get them."""

    facts: ModelFacts

    def __init__(self, config: WorkerConfig) -> None:
        settings = EngineSettings(kind="model", runner=config.runner, scheduler=config.scheduler, log_level="warning")
        self._client = EngineClient(settings, on_able=_ignore)
        self._made = 0

    async def start(self) -> None:
        self.facts = await self._client.start()

    async def run(self, requests: Sequence[Request]) -> Trace:
        """Raises RuntimeError where a sequence ends early, and EngineLost."""
        clock = asyncio.get_running_loop().time
        begun = [0.0] * len(requests)
        times: list[list[float]] = [[] for _ in requests]
        first = [times[index] for index, asked in enumerate(requests) if not asked.after]
        came = asyncio.Condition()

        async def one(index: int, request: Request) -> None:
            async with came:
                await came.wait_for(lambda: min(map(len, first)) >= request.after)
            begun[index] = clock()
            with self._client.submit(self.request(request.prompt, request.new)) as stream:
                async for events in stream:
                    times[index] += [clock()] * sum(isinstance(event, NewToken) for event in events)
                    async with came:
                        came.notify_all()

        await asyncio.gather(*(one(index, request) for index, request in enumerate(requests)))
        if any(len(tokens) != request.new for tokens, request in zip(times, requests, strict=True)):
            raise RuntimeError("the engine ended a sequence early")
        return Trace(begun, times)

    async def tokens(self, request: Submit) -> list[int]:
        """What is generated for one request. Raises RuntimeError where the engine ends it early."""
        with self._client.submit(request) as stream:
            found = [event.token async for events in stream for event in events if isinstance(event, NewToken)]
        if len(found) != request.limits.max_tokens:
            raise RuntimeError("the engine ended a sequence early")
        return found

    async def logprobs(self, request: Submit) -> list[float]:
        """Of each scored token of one request; nats. Raises RuntimeError where some are missing."""
        with self._client.submit(request) as stream:
            scored = [event async for events in stream for event in events if isinstance(event, Scored)]
        found = [logprob for event in scored for logprob in event.logprobs]
        if request.score_from is None or len(found) != len(request.prompt + request.generated) - request.score_from:
            raise RuntimeError("the engine did not score the text")
        return found

    def request(self, prompt: list[int], new: int) -> Submit:
        """A greedy one of a fixed length: no stop tokens."""
        self._made += 1
        limits = Limits(max_tokens=new, min_tokens=new)
        return Submit(id=str(self._made), prompt=prompt, sampling=Sampling(temperature=0), limits=limits)

    @property
    def memory(self) -> int:
        """Bytes at the peak, of the engine process alone."""
        return peak_memory(self._client.pid)

    async def stop(self) -> None:
        await self._client.stop()


async def _ignore(_able: bool, _why: str) -> None:
    """A lost engine ends its streams, and so the benchmark, with an exception."""

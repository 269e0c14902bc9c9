"""A generation that outlives its worker: another goes on from the tokens already made, without a gap or a repeat."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import structlog
from opentelemetry import trace

from meshlm.chassis.errors import MeshError, Reason
from meshlm.chassis.telemetry import Name
from meshlm.router.replicas.fleet import Replica
from meshlm.router.streams.config import StreamsConfig
from meshlm.router.streams.dispatch import ELSEWHERE, Dispatcher, WorkerCall, request_of
from meshlm.router.streams.hedging import Hedges, race
from meshlm.router.work import Work
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2

log = structlog.get_logger()

# The worker is lost, not the request at fault.
_LOST = ELSEWHERE | {Reason.OUT_OF_MEMORY}
# Workers lost in a row without one new token: it may be this request that ends them.
_MOST_BARREN = 2
_ASK_AGAIN_SECONDS = 0.1


class LastingCall:
    """A generation at one worker after another. Before its first token it is a retry, which the router's budget must
    afford; behind it, it goes on from the tokens made, which cost no budget: what is on its way is not given up."""

    def __init__(
        self, work: Work, call: WorkerCall, dispatcher: Dispatcher, config: StreamsConfig, hedges: Hedges
    ) -> None:
        self._work = work
        self._call = call
        self._dispatcher = dispatcher
        self._config = config
        self._hedges = hedges
        self._accepted = time.monotonic()
        self._first = call.usage  # the prompt is billed as the first worker counted it
        self._begun = False  # whether a chunk came
        self._fresh = False  # whether the worker in use told a token
        self._barren = 0
        self._lost: list[Replica] = []
        self._resumes = 0

    async def messages(self) -> AsyncIterator[worker_pb2.RunGenerationResponse]:
        """Everything after the acceptance. Raises MeshError where no worker can go on."""
        ended = False
        while not ended:
            try:
                message = await (self._call.read() if self._begun else self._read_first())
                if message is None:
                    raise MeshError(Reason.ENGINE_LOST, "the worker ended its stream early", retry_after=1.0)
            except MeshError as error:
                if self._unfinished():
                    await self._go_on(error)
                    continue
                return  # the answer is whole; only its exact times are lost
            if message.HasField("chunk"):
                self._take(message)
            ended = message.HasField("end")
            if self._resumes:
                self._correct(message.usage)
            yield message

    async def close(self) -> None:
        """Cancel what still runs."""
        await self._call.close(self._work.usage)

    async def _read_first(self) -> worker_pb2.RunGenerationResponse | None:
        """The first message with tokens; from a second replica, where it is late and that one is quicker."""
        delay = self._hedges.delay(self._first.prompt_tokens)
        if delay is None or self._lost:
            message = await self._call.read()
        else:
            before = self._call
            self._call, message = await race(before, delay, self._hedge)
            if self._call is not before:
                self._work.replace_replica(self._call.replica)
        self._hedges.note(self._first.prompt_tokens, time.monotonic() - self._accepted)
        return message

    async def _hedge(self) -> WorkerCall | None:
        """The same request at another replica; None where there is none, or no budget for it."""
        others = [r for r in self._dispatcher.others(self._work, ()) if r is not self._call.replica]
        if not others or not self._dispatcher.retries.take("hedge"):
            return None
        with contextlib.suppress(MeshError):
            return await self._dispatcher.offer(self._work, others[:1], request_of(self._work))
        return None

    def _take(self, message: worker_pb2.RunGenerationResponse) -> None:
        """Keep what another worker would need, and take off what only that is for. Raises MeshError."""
        work, chunk = self._work, message.chunk
        if not self._begun:
            self._begun = True
            work.prefix = None  # its replica is found: whoever looks for another reads the prompt again
        self._call.idle_seconds = self._config.idle_seconds
        self._fresh = self._fresh or chunk.token_count > 0
        if chunk.choice >= work.choices:
            raise MeshError(Reason.INTERNAL, "a worker made a choice that nobody asked for")
        work.progress[chunk.choice].take(message)
        if work.proven or work.weighed:
            work.logprobs.extend(position.chosen.logprob for position in chunk.logprobs)
        if not work.generation.return_token_ids:
            chunk.ClearField("token_ids")
        if (work.proven or work.weighed) and not work.generation.sampling.HasField("logprobs"):
            chunk.ClearField("logprobs")

    def _unfinished(self) -> bool:
        """Whether some choice has more to come that somebody wants: not one that the guard stopped."""
        work = self._work
        return any(not choice.ended and index not in work.finishes for index, choice in enumerate(work.progress))

    def _correct(self, usage: pb.Usage) -> None:
        usage.prompt_tokens = self._first.prompt_tokens
        usage.cached_prompt_tokens = self._first.cached_prompt_tokens

    async def _go_on(self, error: MeshError) -> None:
        """Another call in place of one that failed. Raises the failure where there is to be none."""
        self._barren = 0 if self._fresh else self._barren + 1
        replica, self._fresh = self._call.replica, False
        if not self._may_go_on(error):
            raise error
        await self._call.close(self._work.usage)
        self._lost.append(replica)
        log.warning("a stream lost its worker", replica=replica.name, reason=error.reason, offsets=self._offsets())
        try:
            self._call = await self._elsewhere(error)
        except MeshError:
            self._dispatcher.resumes.add(1, {"outcome": "lost"})
            raise
        self._resumes += 1
        self._dispatcher.resumes.add(1, {"outcome": "resumed" if self._begun else "retried"})
        current = trace.get_current_span()
        current.set_attribute(Name.STREAM_RESUMES, self._resumes)
        current.set_attribute(Name.STREAM_REPLICAS, self._work.replicas)

    def _may_go_on(self, error: MeshError) -> bool:
        if error.reason not in _LOST or self._barren >= _MOST_BARREN:
            return False
        if not self._begun:
            return self._dispatcher.retries.take("lost")
        return self._resumes < self._config.resumes

    def _offsets(self) -> list[int]:
        return [choice.offset for choice in self._work.progress]

    async def _elsewhere(self, failure: MeshError) -> WorkerCall:
        """The call at the next worker that takes it; waits for one within the time that is configured for that."""
        work = self._work
        request = request_of(work)
        loop = asyncio.get_running_loop()
        until = loop.time() + self._config.resume_wait_seconds
        while True:
            try:
                replicas = self._dispatcher.others(work, self._lost)
                call = await self._dispatcher.offer(work, replicas, request, free=True)
            except MeshError as error:
                if error.reason not in ELSEWHERE:
                    raise
                if loop.time() >= until:
                    raise failure from None
            else:
                work.note_replica(call.replica)
                return call
            await asyncio.sleep(min(_ASK_AGAIN_SECONDS, work.seconds_left()))

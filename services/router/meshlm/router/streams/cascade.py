"""A small model begins an answer, and the large one takes over where that is in doubt of it, before anything went out.

What the small model made and nobody saw is counted, and billed to no caller: the threshold is the operator's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from meshlm.chassis.errors import MeshError
from meshlm.chassis.telemetry import Name, meter
from meshlm.router.routing.confidence import Trial
from meshlm.router.routing.routes import Routes
from meshlm.router.streams.survival import LastingCall
from meshlm.router.work import Work
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2

Message = worker_pb2.RunGenerationResponse


class BegunCall:
    """A call of which the first messages were read before anybody asked for them."""

    def __init__(self, call: LastingCall) -> None:
        self._call = call
        self._coming = call.messages()
        self._reading: asyncio.Task[Message | None] | None = None
        self.held: list[Message] = []

    async def read_on(self, seconds: float) -> Message | None:
        """One more message, held; None after the last. Raises TimeoutError where it takes longer (it is still being
        read then), and MeshError where no worker can go on."""
        reading = self._reading = self._reading or asyncio.ensure_future(anext(self._coming, None))
        if not reading.done():
            await asyncio.wait([reading], timeout=max(0.0, seconds))
        if not reading.done():
            raise TimeoutError
        self._reading = None
        if (message := reading.result()) is not None:
            self.held.append(message)
        return message

    async def messages(self) -> AsyncIterator[Message]:
        """Those that are held, then all that come. Raises MeshError where no worker can go on."""
        for message in self.held:
            yield message
        if self._reading is not None:
            reading, self._reading = self._reading, None
            if (last := await reading) is not None:
                yield last
        async for message in self._coming:
            yield message

    async def close(self) -> None:
        """Cancel what still runs."""
        try:
            if self._reading is not None:
                self._reading.cancel()
                await asyncio.wait([self._reading])
        finally:
            await self._call.close()


Call = LastingCall | BegunCall


class Cascade:
    """`begin` opens a call at the model that a request's route has come to; `move` puts it under that one's limits."""

    def __init__(
        self,
        routes: Routes,
        begin: Callable[[Work], Awaitable[LastingCall]],
        move: Callable[[Work], Awaitable[None]],
    ) -> None:
        self._routes = routes
        self._begin = begin
        self._move = move
        self._trials = meter().create_counter(
            Name.ROUTING_TRIALS, "{request}", "Answers that a small model began, by who went on and what decided it"
        )
        self._unseen = meter().create_counter(
            Name.ROUTING_UNSEEN, "{token}", "Tokens of a small model that a large one took over from; nobody pays them"
        )

    async def call(self, work: Work, anew: Callable[[], Awaitable[Call | None]]) -> Call | None:
        """A call to the model that answers; where the large one takes over, what `anew` begins there. Raises MeshError
        where it cannot, or its limits refuse the request."""
        assert work.route is not None  # noqa: S101
        trial = work.route.trial
        work.weighed = trial is not None
        call = await self._begin(work)
        if trial is None:
            return call
        begun = BegunCall(call)
        try:
            if not self._is_over(work, trial, await _first_logprobs(work, trial, begun)):
                return begun
        except BaseException:
            await self._drop(work, begun)
            raise
        self._count_unseen(work, trial, begun)
        await self._drop(work, begun)
        try:
            await self._move(work)
        except MeshError as error:
            self._routes.give_back(work.route, error)
            await self._move(work)
        return await anew()

    def _is_over(self, work: Work, trial: Trial, logprobs: Sequence[float] | None) -> bool:
        assert work.route is not None  # noqa: S101
        over = self._routes.takes_over(work.route, work.generation.input, logprobs)
        labels = {
            Name.REQUEST_MODEL: trial.large if over else trial.small,
            "decided_by": "prompt" if work.route.doubt is None else "confidence",
        }
        self._trials.add(1, labels)
        return over

    def _count_unseen(self, work: Work, trial: Trial, begun: BegunCall) -> None:
        usage = begun.held[-1].usage if begun.held else work.usage
        labels = {Name.REQUEST_MODEL: trial.small}
        self._unseen.add(usage.prompt_tokens, {**labels, "kind": "prompt_tokens"})
        self._unseen.add(usage.completion_tokens, {**labels, "kind": "completion_tokens"})

    async def _drop(self, work: Work, begun: BegunCall) -> None:
        await begun.close()
        work.forget_call()


async def _first_logprobs(work: Work, trial: Trial, begun: BegunCall) -> Sequence[float] | None:
    """Of the tokens that are to be judged; None where they do not come in time. Raises MeshError."""
    until = time.monotonic() + trial.config.first_seconds
    try:
        while work.progress[0].offset < trial.config.first_tokens:
            message = await begun.read_on(until - time.monotonic())
            if message is None or message.chunk.finish_reason != pb.FINISH_REASON_UNSPECIFIED:
                break
    except TimeoutError:
        return None
    return work.logprobs[: trial.config.first_tokens]

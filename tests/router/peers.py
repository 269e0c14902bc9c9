"""What a router meets in tests: a worker, a guard and a cache that answer as a test says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from meshlm.chassis.errors import MeshError
from meshlm.v1 import (
    cache_pb2,
    cache_pb2_grpc,
    guard_pb2,
    guard_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from meshlm.v1 import generation_pb2 as pb
from tests.router.names import fleet as fleet  # a fixture


class FakeWorker(worker_pb2_grpc.WorkerServiceServicer):
    """Says `pieces`, a token each; can be told to refuse, fail, stall or wait."""

    def __init__(self, name: str) -> None:
        self.load = worker_pb2.WatchLoadResponse(
            replica=name,
            ready=True,
            total_blocks=100,
            free_blocks=100,
            model=worker_pb2.WorkerModel(name="m", revision="r1", max_context=100, chat=True),
        )
        self.changed = asyncio.Event()
        self.mute = False  # new watchers hear nothing
        self.unheard = asyncio.Event()  # a watcher came that hears nothing
        self.pieces = ["Hello", " big", " world"]
        self.tokens_each = 1  # of a piece
        self.stalls_at: int | None = None  # this piece never comes
        self.prompt_tokens = 7
        self.skipped = ""  # told with the first chunk
        self.refusal: MeshError | None = None
        self.failure: MeshError | None = None  # after the first piece
        self.failures: list[MeshError] = []  # of the coming requests, after the first piece each
        self.shift = 0  # of its token offsets
        self.logprob: float | None = 0.0  # of each of its tokens; None: it tells none
        self.accepts: asyncio.Event | None = None  # before it accepts
        self.late: asyncio.Event | None = None  # before the first piece
        self.hold: asyncio.Event | None = None  # before each piece after the first
        self.open = 0  # generations under way
        self.requests: list[worker_pb2.RunGenerationRequest] = []
        self.counted: list[worker_pb2.CountInputTokensRequest] = []
        self.cancelled = asyncio.Event()
        self.scores: Callable[[Any], Awaitable[Any]] | None = None  # answers Score

    async def WatchLoad(self, request: Any, context: Any) -> AsyncIterator[Any]:
        while True:
            while self.mute:
                self.unheard.set()
                await asyncio.sleep(0.01)
            yield self.load
            with contextlib.suppress(TimeoutError):  # a word now and then, as workers do, however long a test takes
                await asyncio.wait_for(self.changed.wait(), 3)
                self.changed.clear()

    async def CountInputTokens(self, request: Any, context: Any) -> Any:
        self.counted.append(request)
        return worker_pb2.CountInputTokensResponse(prompt_tokens=7, token_text="decoded")

    async def Score(self, request: Any, context: Any) -> Any:
        assert self.scores is not None, "no test asked for scores"
        return await self.scores(request)

    async def RunGeneration(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.open += 1
        try:
            async for response in self._generation(request):
                yield response
        finally:
            self.open -= 1

    async def _generation(self, request: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        usage = pb.Usage(prompt_tokens=self.prompt_tokens)
        accepted = worker_pb2.GenerationAccepted(
            prompt_tokens=self.prompt_tokens, max_tokens=request.generation.sampling.max_tokens, model_revision="r1"
        )
        ended = False
        try:
            if self.accepts is not None:
                await self.accepts.wait()
            yield worker_pb2.RunGenerationResponse(accepted=accepted, usage=usage)
            before = self.shift + (request.resume_from if self.skipped else 0)  # tokens ahead of the pieces
            failure = self.failures.pop(0) if self.failures else self.failure
            begin = 0 if self.skipped else request.resume_from // self.tokens_each
            for number, piece in enumerate(self.pieces[begin:], begin):
                if not number and self.late is not None:
                    await self.late.wait()
                if number and failure is not None:
                    raise failure
                if number and self.hold is not None:
                    await self.hold.wait()
                if number == self.stalls_at:
                    await asyncio.Event().wait()
                usage.completion_tokens = (number + 1) * self.tokens_each
                last = number + 1 == len(self.pieces)
                chunk = pb.Chunk(
                    token_offset=before + number * self.tokens_each,
                    token_count=self.tokens_each,
                    text=piece,
                    token_ids=[number] * self.tokens_each if request.generation.return_token_ids else [],
                    finish_reason=int(last),
                )
                if request.generation.sampling.HasField("logprobs") and self.logprob is not None:
                    for _ in range(self.tokens_each):
                        chunk.logprobs.add(chosen=pb.TokenLogprob(logprob=self.logprob))
                skipped = self.skipped if number == 0 else ""
                yield worker_pb2.RunGenerationResponse(chunk=chunk, usage=usage, skipped_text=skipped)
            timing = pb.Timing(queue=0.5, prefill=1.5, decode=2.5)
            yield worker_pb2.RunGenerationResponse(end=worker_pb2.GenerationEnd(timing=timing), usage=usage)
            ended = True
        finally:
            if not ended:
                self.cancelled.set()


class FakeGuard(guard_pb2_grpc.GuardServiceServicer):
    """Blocks inputs with `attack` in them, and answers from `secret` on; releases all but the last word's letters."""

    def __init__(self) -> None:
        self.down = False
        self.hold: asyncio.Event | None = None
        self.policy = "p1"
        self.declines: MeshError | None = None
        self.stops = "secret"  # the word from which on answers are blocked
        self.inputs: list[Any] = []
        self.starts: list[Any] = []  # of output checks
        self.open = 0  # output checks under way
        self.redacts = False  # replaces `private` in prompts
        self.fast = False  # releases all, and blocks one text late
        self.ahead = False  # releases all, and judges it only where nothing follows

    async def CheckInput(self, request: Any, context: Any) -> Any:
        self.inputs.append(request)
        if self.hold is not None:
            await self.hold.wait()
        if self.down:
            raise RuntimeError
        if self.declines is not None:
            raise self.declines
        text = " ".join([m.content for m in request.input.chat.messages] + [request.input.prompt, request.token_text])
        verdict = pb.Verdict(action=pb.Verdict.ACTION_ALLOW, policy_version=self.policy)
        if "attack" in text:
            verdict.action = pb.Verdict.ACTION_BLOCK
            verdict.categories.append("injection.override")
        response = guard_pb2.CheckInputResponse(verdict=verdict, redacts=self.redacts)
        if self.redacts and "private" in text:
            response.redacted_input.CopyFrom(request.input)
            for message in response.redacted_input.chat.messages:
                message.content = message.content.replace("private", "[pii]")
            response.verdict.action = pb.Verdict.ACTION_REDACT
        return response

    async def CheckOutput(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        self.open += 1
        try:
            async for response in self._check(requests):
                yield response
        finally:
            self.open -= 1

    async def _check(self, requests: Any) -> AsyncIterator[Any]:
        whole = judged = ""
        async for request in requests:
            if request.WhichOneof("event") == "start":
                self.starts.append(request.start)
                continue
            if self.down:
                raise RuntimeError
            whole += request.text.text
            verdict = pb.Verdict(action=pb.Verdict.ACTION_ALLOW, policy_version=self.policy)
            released = len(whole) if request.text.last else len(whole.rstrip("s"))
            late, before, judged = self.fast and self.stops not in judged, len(judged), whole
            if self.stops in whole and not late:
                verdict.action = pb.Verdict.ACTION_BLOCK
                verdict.categories.append(f"{self.stops}.word")
                verdict.char_start = whole.index(self.stops)
                released = before if self.fast else verdict.char_start
            if self.ahead:
                ahead = pb.Verdict(action=pb.Verdict.ACTION_ALLOW, policy_version=self.policy)
                yield guard_pb2.CheckOutputResponse(
                    released_chars=len(whole), verdict=ahead, taken_chars=len(whole), judged_chars=0
                )
                continue
            yield guard_pb2.CheckOutputResponse(
                released_chars=released, verdict=verdict, final=request.text.last, taken_chars=len(whole)
            )
        if self.ahead:
            yield guard_pb2.CheckOutputResponse(
                released_chars=len(whole),
                verdict=verdict,
                taken_chars=len(whole),
                judged_chars=verdict.char_start if verdict.categories else len(whole),
            )


class FakeCache(cache_pb2_grpc.CacheServiceServicer):
    """A dictionary; every miss leads."""

    def __init__(self) -> None:
        self.down = False
        self.full = False  # will not store
        self.hold: asyncio.Event | None = None
        self.storing: asyncio.Event | None = None  # before a `Store` is answered
        self.entries: dict[bytes, Any] = {}
        self.calls: list[str] = []
        self.lookups: list[cache_pb2.LookUpRequest] = []

    async def LookUp(self, request: Any, context: Any) -> Any:
        self.lookups.append(request)
        if self.down:
            raise RuntimeError
        self.calls.append("look_up_refresh" if request.refresh else "look_up")
        if self.hold is not None:
            await self.hold.wait()
        name = request.generation.SerializeToString(deterministic=True)
        if name in self.entries and not request.refresh:
            return cache_pb2.LookUpResponse(outcome=cache_pb2.LOOK_UP_OUTCOME_HIT, answer=self.entries[name])
        return cache_pb2.LookUpResponse(outcome=cache_pb2.LOOK_UP_OUTCOME_LEAD, key=name.hex(), flight="f")

    async def Store(self, request: Any, context: Any) -> Any:
        self.calls.append("store")
        if self.storing is not None:
            await self.storing.wait()
        if self.full:
            raise RuntimeError
        self.entries[bytes.fromhex(request.key)] = request.answer
        return cache_pb2.StoreResponse(stored=True)

    async def Release(self, request: Any, context: Any) -> Any:
        self.calls.append("release")
        return cache_pb2.ReleaseResponse()

"""The workers behind a guard: which of them serves what, and whom to ask when one does not answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection
from hashlib import blake2b
from typing import Any, TypeVar

import grpc
import structlog

from meshlm.chassis.breaker import Breaker
from meshlm.chassis.calls import outgoing_metadata
from meshlm.chassis.channels import open_channel
from meshlm.chassis.errors import MeshError, Reason, from_rpc_error
from meshlm.chassis.telemetry import Name, client_span
from meshlm.guard.judging import JudgeError
from meshlm.guard.llama.config import LlamaGuardConfig
from meshlm.v1 import worker_pb2, worker_pb2_grpc

log = structlog.get_logger()
T = TypeVar("T")

_SERVICE = "meshlm.v1.WorkerService"
# Longest time that a worker is left alone, in doublings of the first.
_DOUBLINGS = 3
_RETRY_SECONDS = 0.2
# A worker tells its load every second.
_SILENCE_SECONDS = 10.0
# What another worker may do better: the reasons of a worker in trouble.
_ELSEWHERE = frozenset(
    {
        Reason.OVERLOADED, Reason.DRAINING, Reason.ENGINE_LOST, Reason.NO_REPLICA, Reason.OUT_OF_MEMORY,
        Reason.DEADLINE, Reason.INTERNAL, Reason.MODEL_UNKNOWN,
    }
)  # fmt: skip
# Those that say nothing against it.
_BUSY = frozenset({Reason.OVERLOADED, Reason.DRAINING})


class Replica:
    """One worker, and what it last said of itself."""

    def __init__(self, target: str, config: LlamaGuardConfig) -> None:
        self.target = target
        self.channel = open_channel(target)
        self.stub: Any = worker_pb2_grpc.WorkerServiceStub(self.channel)
        self.state: worker_pb2.WatchLoadResponse | None = None  # None while it cannot be heard
        self.breaker = Breaker(config.breaker_failures, config.breaker_seconds, doublings=_DOUBLINGS)
        self._seconds = config.timeout_seconds

    @property
    def revision(self) -> str:
        return self.state.model.revision if self.state is not None else ""

    def serves(self, model: str) -> bool:
        """Whether it takes requests for that model now."""
        state = self.state
        return state is not None and state.ready and not state.draining and state.model.name == model

    async def score(self, request: worker_pb2.ScoreRequest) -> worker_pb2.ScoreResponse:
        """Raises MeshError."""
        with client_span(_SERVICE, "Score") as span:
            try:
                response: worker_pb2.ScoreResponse = await self.stub.Score(
                    request, timeout=self._seconds, metadata=outgoing_metadata()
                )
            except grpc.RpcError as error:
                raise from_rpc_error(error) from None
            span.set_attribute(Name.REQUEST_MODEL, request.model)
            span.set_attribute(Name.REPLICA, self.state.replica if self.state is not None else self.target)
            span.set_attribute(Name.INPUT_TOKENS, response.usage.prompt_tokens)
            span.set_attribute(Name.CACHED_TOKENS, response.usage.cached_prompt_tokens)
        return response


class Workers:
    """All workers that the configuration names, each watched."""

    def __init__(self, config: LlamaGuardConfig) -> None:
        """Inside the event loop that will use it."""
        self.replicas = [Replica(target, config) for target in config.workers]
        self._attempts = config.attempts
        self._patience = config.timeout_seconds
        self._given_up: set[str] = set()  # models for which a question has waited in vain, until a worker serves them
        self._watches: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()

    def start(self) -> None:
        self._watches = [asyncio.create_task(self._watch(replica)) for replica in self.replicas]

    async def stop(self) -> None:
        for watch in self._watches:
            watch.cancel()
        for watch in self._watches:
            with contextlib.suppress(asyncio.CancelledError):
                await watch
        for replica in self.replicas:
            await replica.channel.close()

    async def until_served(self, model: str, seconds: float) -> bool:
        """Wait for a worker that serves the model. Whether there is one."""
        if self.serving(model):
            return True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.serving(model):
                    self._changed.clear()
                    await self._changed.wait()
        return bool(self.serving(model))

    def gives_up(self, model: str) -> bool:
        """Whether questions do not wait for the model any more."""
        return model in self._given_up

    def serving(self, model: str) -> list[Replica]:
        return [replica for replica in self.replicas if replica.serves(model)]

    async def ask(
        self, model: str, key: bytes, question: Callable[[Replica], Awaitable[T]], avoid: Collection[str] = ()
    ) -> T:
        """Ask a worker of that model, and if it does not answer, another one.

        Equal keys go to the same worker while it answers, for what it has in its cache. `avoid`: targets that are asked
        last. Where no worker serves the model, questions wait for one as long as for an answer; once that was in vain,
        no more. Raises JudgeError where none answers, and MeshError for what no other would answer either.
        """
        if model not in self._given_up and not await self.until_served(model, self._patience):
            self._given_up.add(model)
        able = [replica for replica in self.serving(model) if replica.breaker.admits()]
        able.sort(key=lambda replica: (replica.target in avoid, blake2b(key + replica.target.encode()).digest()))
        if not able:
            raise JudgeError("no worker of the model takes requests")
        for replica in able[: self._attempts]:
            replica.breaker.begin()
            try:
                answer = await question(replica)
            except MeshError as error:
                if error.reason not in _ELSEWHERE:
                    replica.breaker.succeed()  # it answers
                    raise
                self._note(replica, error)
            except BaseException:
                replica.breaker.leave()
                raise
            else:
                replica.breaker.succeed()
                return answer
        raise JudgeError("no worker of the model answered")

    def _note(self, replica: Replica, error: MeshError) -> None:
        if error.reason in _BUSY:
            replica.breaker.leave()
        else:
            was_open = replica.breaker.open
            replica.breaker.fail()
            if replica.breaker.open and not was_open:
                log.warning("worker of a judging model left alone", target=replica.target, reason=error.reason)

    async def _watch(self, replica: Replica) -> None:
        """Follow one worker for ever; it serves nothing once its stream breaks or falls silent."""
        while True:
            try:
                call = replica.stub.WatchLoad(worker_pb2.WatchLoadRequest(watcher="guard"), wait_for_ready=True)
                while (state := await self._next(call)) is not grpc.aio.EOF:
                    if replica.state is None:
                        replica.breaker.succeed()  # it may be another process than the one that failed
                    replica.state = state
                    if replica.serves(state.model.name):
                        self._given_up.discard(state.model.name)
                    self._changed.set()
            except (grpc.RpcError, TimeoutError) as error:
                if replica.state is not None:
                    code = error.code().name if isinstance(error, grpc.RpcError) else "SILENT"
                    log.warning("worker of a judging model lost", target=replica.target, code=code)
            finally:
                replica.state = None
            await asyncio.sleep(_RETRY_SECONDS)

    async def _next(self, call: Any) -> Any:
        async with asyncio.timeout(_SILENCE_SECONDS):  # ends the call, too
            return await call.read()

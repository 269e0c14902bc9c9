"""Stage 4, choose: the workers, what they last said of themselves, and which of them is to answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc
import structlog

from meshlm.chassis.channels import open_channel
from meshlm.chassis.errors import MeshError, Reason
from meshlm.v1 import worker_pb2, worker_pb2_grpc

log = structlog.get_logger()

_SERVICE = "meshlm.v1.WorkerService"
_RETRY_SECONDS = 0.2
# A worker tells its load every second. One that is stopped or cut off keeps its connection for much longer.
_SILENCE_SECONDS = 10.0


class Replica:
    """One worker: a channel to it, and its load as it last pushed it."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.channel = open_channel(target, retryable=[(_SERVICE, "CountInputTokens")])
        self.stub: Any = worker_pb2_grpc.WorkerServiceStub(self.channel)
        self.state: worker_pb2.WatchLoadResponse | None = None  # None while it cannot be heard
        self._sent_since = 0  # requests sent after the last push: the push cannot know of them yet

    @property
    def name(self) -> str:
        return self.state.replica if self.state is not None else self.target

    @property
    def usable(self) -> bool:
        return self.state is not None and self.state.ready and not self.state.draining

    def hear(self, state: worker_pb2.WatchLoadResponse) -> None:
        self.state = state
        self._sent_since = 0

    def lose(self) -> None:
        self.state = None

    def note_sent(self) -> None:
        self._sent_since += 1

    def load(self) -> tuple[int, int, int]:
        """Least first: sequences in its hands, prompt tokens it has yet to compute, blocks in use."""
        state = self.state
        assert state is not None  # noqa: S101  only usable replicas are compared
        used = state.total_blocks - state.free_blocks
        return state.running + state.waiting + self._sent_since, state.pending_prefill_tokens, used


@dataclass(frozen=True)
class Choice:
    """Replicas in the order in which to try them, and why."""

    model: str
    revision: str
    replicas: tuple[Replica, ...]
    reason: str


class Fleet:
    """All workers of the configuration. Keeps no facts but what workers push."""

    def __init__(self, targets: Iterable[str], *, silence_seconds: float = _SILENCE_SECONDS) -> None:
        self.replicas = [Replica(target) for target in targets]
        self._silence_seconds = silence_seconds
        self._watches: list[asyncio.Task[None]] = []

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

    def resolve(self, name: str) -> str:
        """The model of this name; of none, the only one there is. Raises MeshError MODEL_UNKNOWN."""
        served = {r.state.model.name for r in self.replicas if r.state is not None}
        if not name and len(served) == 1:
            return next(iter(served))
        if not name and served:
            raise MeshError(Reason.MODEL_UNKNOWN, "several models are served: name one")
        # A worker that cannot be heard may serve anything: only with all of them heard is a name surely unknown.
        if name not in served and all(r.state is not None for r in self.replicas):
            raise MeshError(Reason.MODEL_UNKNOWN, "no worker serves this model", metadata={"model": name[:128]})
        return name

    def ready(self, model: str) -> bool:
        """Whether some replica of it takes requests."""
        return any(r.usable and r.state is not None and r.state.model.name == model for r in self.replicas)

    def choose(self, model: str) -> Choice:
        """Least-loaded order over the replicas that take requests. Raises MeshError NO_REPLICA."""
        able = [r for r in self.replicas if r.usable and r.state is not None and r.state.model.name == model]
        if not able:
            raise MeshError(Reason.NO_REPLICA, "no replica of this model is ready", retry_after=1.0)
        able.sort(key=Replica.load)
        best = able[0].state
        assert best is not None  # noqa: S101  it is usable
        reason = "least_loaded" if len(able) > 1 else "only_replica"
        # Replicas with other weights would give other answers: fallbacks are of the chosen revision.
        same = tuple(r for r in able if r.state is not None and r.state.model.revision == best.model.revision)
        return Choice(model, best.model.revision, same, reason)

    def models(self) -> dict[str, list[Replica]]:
        """Replicas that can be heard, by the model they serve."""
        found: dict[str, list[Replica]] = {}
        for replica in self.replicas:
            if replica.state is not None:
                found.setdefault(replica.state.model.name, []).append(replica)
        return found

    async def _watch(self, replica: Replica) -> None:
        """Follow one worker for ever; it is unusable once its stream breaks or falls silent."""
        while True:
            try:
                call = replica.stub.WatchLoad(worker_pb2.WatchLoadRequest(watcher="router"), wait_for_ready=True)
                while (state := await self._next(call)) is not grpc.aio.EOF:
                    if replica.state is None:
                        log.info("worker heard", target=replica.target, replica=state.replica, model=state.model.name)
                    replica.hear(state)
            except (grpc.RpcError, TimeoutError) as error:
                if replica.state is not None:
                    code = error.code().name if isinstance(error, grpc.RpcError) else "SILENT"
                    log.warning("worker lost", target=replica.target, code=code)
            finally:
                replica.lose()
            await asyncio.sleep(_RETRY_SECONDS)

    async def _next(self, call: Any) -> Any:
        async with asyncio.timeout(self._silence_seconds):  # ends the call, too
            return await call.read()

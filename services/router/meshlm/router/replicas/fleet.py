"""All workers of the configuration: followed, looked up, and chosen from. What is compared how is in choosing.py."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import grpc
import structlog

from meshlm.chassis.errors import MeshError, Reason
from meshlm.chassis.telemetry import Name, meter
from meshlm.router.replicas.choosing import Candidate, Choice, Exclusion, Wanted, pick, sort_out, weigh
from meshlm.router.replicas.config import ReplicaConfig
from meshlm.router.replicas.health import fault, may_eject
from meshlm.router.replicas.overload_config import OverloadConfig
from meshlm.router.replicas.replica import Attempt, Replica
from meshlm.router.replicas.residency import ANYWHERE, Regions
from meshlm.v1 import worker_pb2

__all__ = ["Choice", "Fleet", "Replica", "Wanted"]

log = structlog.get_logger()

_RETRY_SECONDS = 0.2
# A worker tells its load every second. One that is stopped or cut off keeps its connection for much longer.
_SILENCE_SECONDS = 10.0


class Fleet:
    """Keeps no facts but what workers push, and what this router saw of them."""

    def __init__(
        self,
        targets: Iterable[str],
        config: ReplicaConfig = ReplicaConfig(),  # noqa: B008  it is frozen
        overload: OverloadConfig = OverloadConfig(),  # noqa: B008
        *,
        silence_seconds: float = _SILENCE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        targets = tuple(targets)
        self.replicas = [Replica(target, overload, clock) for target in targets]
        self._config = config
        self._silence_seconds = silence_seconds
        self._clock = clock
        self._watches: list[asyncio.Task[None]] = []
        self._deadline: asyncio.TimerHandle | None = None
        self._strangers = set(targets)  # not heard yet, or only that they load
        self._introduced = asyncio.Event()  # every worker was ready once, or had its time
        self.on_ejection: Callable[[Replica, int, float], None] = lambda replica, replicas, seconds: None
        self._on_news: Callable[[], None] = lambda: None
        self._chance = random.Random()  # noqa: S311  where a request goes is no secret
        self._limits = meter().create_gauge(Name.OVERLOAD_LIMIT, "{request}", "This router's places at a worker")
        self._ejections = meter().create_counter(Name.REPLICA_EJECTIONS, "{ejection}", "Replicas left out as outliers")

    def seed(self, number: int) -> None:
        """Draw as another fleet of this seed: for tests and simulations."""
        self._chance.seed(number)

    def listen(self, on_end: Callable[[str], None], on_news: Callable[[], None]) -> None:
        """Tell whoever waits for room: of a place that came free, with its model, and of what a worker told."""
        self._on_news = on_news
        for replica in self.replicas:
            replica.on_end = lambda replica=replica: on_end(replica.state.model.name if replica.state else "")

    def start(self) -> None:
        self._watches = [asyncio.create_task(self._watch(replica)) for replica in self.replicas]
        if not self.replicas or self._config.hear_seconds == 0:
            self._introduced.set()
        else:
            self._deadline = asyncio.get_running_loop().call_later(self._config.hear_seconds, self._start_without)

    async def introduced(self) -> None:
        """Until every worker was heard to be ready once (or to drain), at most `hear_seconds` from the start: before
        that, "no replica" would only mean that this router is young."""
        await self._introduced.wait()

    async def stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
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

    def ready(self, model: str, regions: Regions = ANYWHERE) -> bool:
        """Whether some replica of it, in these regions, takes requests."""
        states = [replica.state for replica in self.replicas if replica.usable and replica.state is not None]
        return any(state.model.name == model and regions.allow(state.region) for state in states)

    def choose(self, wanted: Wanted) -> Choice:
        """The replicas that can take a request, in the order in which to try them, whether they have room or not.

        Raises MeshError NO_REPLICA, or NO_REPLICA_IN_REGION where only other regions have one.
        """
        choice = self._choose(wanted, None)
        assert choice is not None  # noqa: S101  room was not asked for
        return choice

    def look(self, wanted: Wanted, share: float) -> Choice | None:
        """As `take`, without taking a place."""
        return self._choose(wanted, share)

    def take(self, wanted: Wanted, share: float) -> tuple[Choice, Attempt] | None:
        """A place at the best replica with room, where a request may use `share` of its places; None where all are
        full. The attempt counts from now on, and must be ended. Raises as `choose`."""
        choice = self._choose(wanted, share)
        if choice is None:
            return None
        first = choice.replicas[0]
        return choice, first.begin(wanted.prefix, max(0, wanted.tokens - choice.cached(first)))

    def _choose(self, wanted: Wanted, share: float | None) -> Choice | None:
        """None where all that could take it are full. Raises as `choose`."""
        now = self._clock()
        self._eject(wanted.model, now)
        able, excluded = sort_out(self.replicas, wanted, now, share)
        reason = ""
        if not able and any(e.reason == "full" for e in excluded):
            return None
        if not able:
            # Rather one that failed than none: what ejected it may be over, or may have been the network's fault.
            able = [e.replica for e in excluded if e.reason == "ejected"]
            if able and share is not None and not (able := [r for r in able if r.has_room(share)]):
                return None
            excluded = [e for e in excluded if e.replica not in able]
            reason = "last_resort"
        if not able:
            raise _nobody(wanted, excluded)
        candidates = [weigh(replica, wanted, now, self._config.slow_start_seconds) for replica in able]
        first, why = pick(candidates, wanted, self._chance)
        return _choice(wanted, first, candidates, excluded, reason or why)

    def models(self) -> dict[str, list[Replica]]:
        """Replicas that can be heard, by the model they serve."""
        found: dict[str, list[Replica]] = {}
        for replica in self.replicas:
            if replica.state is not None:
                found.setdefault(replica.state.model.name, []).append(replica)
        return found

    def _eject(self, model: str, now: float) -> None:
        """Leave out the outliers of a model, as far as that leaves enough of them."""
        peers = [r for r in self.replicas if r.usable and r.state is not None and r.state.model.name == model]
        if len(peers) < 2:
            return  # the last one never is
        sound = [replica for replica in peers if not replica.is_left_out(now)]
        for replica in list(sound):
            others = [other.health for other in sound if other is not replica]
            cause = fault(replica.health, others, self._config)
            if cause and may_eject(len(peers) - len(sound), len(peers), self._config.most_ejected):
                sound.remove(replica)
                replica.health.eject(cause, now, self._config.eject_seconds)
                seconds = replica.health.ejected_until - now
                self._ejections.add(1, {Name.REPLICA: replica.name, "cause": cause})
                log.warning("replica ejected", replica=replica.name, cause=cause, seconds=seconds)
                self.on_ejection(replica, len(peers), seconds)

    def leave_out(self, agreed: Mapping[tuple[str, str], float]) -> None:
        """What enough routers ejected, by model and name, with the seconds left of each. Where that and what this
        router ejected by itself would be more than the share, the latter is used again."""
        now = self._clock()
        for replica in self.replicas:
            if replica.state is None:
                continue  # its name is not known; when it is heard again, the next turn finds it
            seconds = agreed.get((replica.model, replica.name), 0.0)
            if seconds and not replica.is_left_out(now):
                self._ejections.add(1, {Name.REPLICA: replica.name, "cause": "agreed"})
                log.warning("replica left out, as other routers found", replica=replica.name, seconds=seconds)
            replica.agreed_until = now + seconds
        for model in {model for model, _ in agreed}:
            peers = [replica for replica in self.replicas if replica.usable and replica.model == model]
            out = sorted((r for r in peers if r.is_left_out(now)), key=lambda replica: replica.health.ejected_until)
            excess = sum(not may_eject(others, len(peers), self._config.most_ejected) for others in range(len(out)))
            for replica in [replica for replica in out if replica.agreed_until <= now][:excess]:
                replica.health.pardon()

    def _start_without(self) -> None:
        if self._strangers:
            log.warning("serving without workers that are not ready", targets=sorted(self._strangers))
            self._introduced.set()

    async def _watch(self, replica: Replica) -> None:
        """Follow one worker for ever; it is unusable once its stream breaks or falls silent."""
        while True:
            try:
                call = replica.stub.WatchLoad(worker_pb2.WatchLoadRequest(watcher="router"), wait_for_ready=True)
                while (state := await self._next(call)) is not grpc.aio.EOF:
                    if replica.state is None:
                        log.info("worker heard", target=replica.target, replica=state.replica, model=state.model.name)
                    replica.hear(state)
                    if state.ready or state.draining:
                        self._strangers.discard(replica.target)
                    if not self._strangers:
                        self._introduced.set()
                    self._limits.set(replica.limit.value, {Name.REPLICA: replica.name})
                    self._on_news()
            except (grpc.RpcError, TimeoutError) as error:
                if replica.state is not None:
                    code = error.code().name if isinstance(error, grpc.RpcError) else "SILENT"
                    log.warning("worker lost", target=replica.target, code=code)
            finally:
                replica.lose()
                self._on_news()
            await asyncio.sleep(_RETRY_SECONDS)

    async def _next(self, call: Any) -> Any:
        async with asyncio.timeout(self._silence_seconds):  # ends the call, too
            return await call.read()


def _choice(
    wanted: Wanted, first: Candidate, candidates: list[Candidate], excluded: list[Exclusion], reason: str
) -> Choice:
    ranked = sorted(candidates, key=lambda candidate: (candidate is not first, candidate.seconds))
    # Replicas with other weights would give other answers: fallbacks are of the chosen revision.
    assert first.replica.state is not None  # noqa: S101  it is usable
    revision = first.replica.state.model.revision
    same: list[Candidate] = []
    other: list[Candidate] = []
    for candidate in ranked:
        state = candidate.replica.state
        (same if state is not None and state.model.revision == revision else other).append(candidate)
    excluded = [*excluded, *(Exclusion(candidate.replica, "other_revision") for candidate in other)]
    replicas = tuple(candidate.replica for candidate in same)
    return Choice(wanted.model, revision, replicas, reason, tuple(same), tuple(excluded))


def _nobody(wanted: Wanted, excluded: list[Exclusion]) -> MeshError:
    if wanted.regions.holders:
        return MeshError(
            Reason.NO_REPLICA_IN_REGION,
            "no replica of this model is ready in the regions of the caller",
            metadata={"regions": str(wanted.regions)},
            retry_after=1.0,
        )
    return MeshError(Reason.NO_REPLICA, "no replica of this model is ready", retry_after=1.0)

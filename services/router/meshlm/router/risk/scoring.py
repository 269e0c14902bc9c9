"""Surprise under a small model: one scoring pass at a worker, beside the request, which waits for none of it.

Whatever fails is no score, and the n-gram estimate counts alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import math

import grpc
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from meshlm.chassis.calls import outgoing_metadata
from meshlm.chassis.errors import MeshError, Reason, from_rpc_error
from meshlm.chassis.telemetry import Name, client_span, fail, meter
from meshlm.router.measure import text_of
from meshlm.router.replicas.choosing import Wanted
from meshlm.router.replicas.fleet import Fleet
from meshlm.router.replicas.replica import Replica
from meshlm.router.risk.config import EntropyConfig
from meshlm.router.risk.surprise import FEW, WINDOW, Surprise, ends_of, peak
from meshlm.router.work import Work
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2

log = structlog.get_logger()

_SERVICE = "meshlm.v1.WorkerService"


class Scorer:
    """Asks the model that `router.entropy.model` names; none, where it names none."""

    def __init__(self, redis: Redis | None, fleet: Fleet, config: EntropyConfig) -> None:
        self._redis = redis
        self._fleet = fleet
        self._config = config
        self._free = config.in_flight
        self._scores = meter().create_counter(Name.SURPRISE_SCORES, "{prompt}", "Prompts to be scored, by outcome")

    def place(self, work: Work) -> str:
        """The key under which a prompt's score is remembered, for its tenant alone; empty where nothing scores it."""
        text = text_of(work.generation.input)
        if not self._config.model or not text:
            return ""
        digest = hashlib.sha256(f"{work.key.tenant}\0{self._config.model}\0{text}".encode()).hexdigest()[:32]
        return f"meshlm:{{{work.key.tenant}}}:surprise:{digest}"

    def recall(self, kept: str) -> Surprise | None:
        """What was remembered."""
        source, _, nats = kept.rpartition(" ")
        try:
            found = Surprise(float(nats), source)
        except ValueError:
            return None
        if not (source and math.isfinite(found.nats)):
            return None
        self._scores.add(1, {"outcome": "remembered"})
        return found

    async def score(self, work: Work, place: str) -> Surprise | None:
        """Read the prompt's beginning and end, and remember what came of it; None where nothing did."""
        if self._free <= 0:
            self._scores.add(1, {"outcome": "busy"})
            return None
        self._free -= 1
        try:
            async with asyncio.timeout(self._config.seconds):
                found = await self._read(work)
        except (MeshError, TimeoutError) as error:
            log.info("prompt not scored", error=getattr(error, "reason", type(error).__name__))
            self._scores.add(1, {"outcome": "failed"})
            return None
        finally:
            self._free += 1
        self._scores.add(1, {"outcome": "scored" if found is not None else "short"})
        if found is not None:
            await self._remember(place, found)
        return found

    async def _read(self, work: Work) -> Surprise | None:
        choice = self._fleet.choose(Wanted(model=self._config.model, regions=work.regions))
        parts = ends_of(text_of(work.generation.input), self._config.tokens)
        texts = [text for part in parts if (text := part.decode("utf-8", "ignore"))]
        peaks = [await self._peak(work, choice.replicas[0], text) for text in texts]
        found = [nats for nats in peaks if nats is not None]
        return Surprise(max(found), choice.revision) if found else None

    async def _peak(self, work: Work, replica: Replica, text: str) -> float | None:
        """Of one text; None for FEW tokens or fewer. Raises MeshError."""
        request = worker_pb2.ScoreRequest(
            request_id=work.request_id,
            model=self._config.model,
            input=pb.Input(prompt=text),
            priority=pb.PRIORITY_BATCH,
            tenant=work.key.tenant,
            cache_salt=work.cache_salt,
        )
        with client_span(_SERVICE, "Score") as span:
            try:
                answer = await replica.stub.Score(request, metadata=outgoing_metadata(), timeout=self._config.seconds)
            except grpc.RpcError as error:
                failure = from_rpc_error(error)
                fail(span, failure.reason)
                if len(text) <= FEW:  # no token follows another
                    return None
                raise failure from None
        if len(answer.scored) != 1:
            raise MeshError(Reason.INTERNAL, "a score that is none")
        scored = answer.scored[0]
        if len(scored.logprobs) < FEW:  # the first token is not scored: nothing comes before it
            return None
        if len(scored.entropies) != len(scored.logprobs) or not all(map(math.isfinite, scored.logprobs)):
            raise MeshError(Reason.INTERNAL, "a score that is none")
        nats = peak([-logprob for logprob in scored.logprobs], scored.entropies, WINDOW)
        return nats if math.isfinite(nats) else None

    async def _remember(self, place: str, found: Surprise) -> None:
        if self._redis is None:
            return
        try:
            lasts = math.ceil(self._config.cache_seconds)
            await self._redis.set(place, f"{found.source} {found.nats:.4f}", ex=lasts)
        except (RedisError, OSError, TimeoutError):
            log.info("a prompt's score is not remembered")

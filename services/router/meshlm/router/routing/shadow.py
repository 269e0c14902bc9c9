"""Shadow traffic: another model answers a copy of some requests, so that it can be watched under real ones.

A copy begins only when its request is over and settled, with the least priority, and only where the model has nobody
waiting: it delays no caller. It never meets the ledger: no caller pays for it. Its answer goes nowhere.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import grpc
import structlog

from meshlm.chassis.calls import outgoing_metadata
from meshlm.chassis.errors import MeshError, from_rpc_error
from meshlm.chassis.telemetry import Name, fail, meter, span
from meshlm.router.config import RouterConfig
from meshlm.router.replicas.choosing import Wanted
from meshlm.router.replicas.fleet import Fleet
from meshlm.router.replicas.replica import Attempt, Replica
from meshlm.router.routing.config import ShadowConfig
from meshlm.router.work import Work
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2

log = structlog.get_logger()

# Workers share themselves among tenants: copies are one of their own, whose name no tenant can have.
TENANT = "(shadow)"
# How full a replica may be for a copy: the rest of its places is for callers.
_SPARE = 0.5


class Shadows:
    """Copies in progress."""

    def __init__(self, config: RouterConfig, fleet: Fleet) -> None:
        self._fleet = fleet
        self._guarded = bool(config.guard)
        self._seconds = config.default_deadline_seconds
        self._running: Counter[str] = Counter()  # by model
        self._tasks: set[asyncio.Task[None]] = set()
        self._requests = meter().create_counter(Name.SHADOW_REQUESTS, "{request}", "Copies of requests, by outcome")
        self._tokens = meter().create_counter(Name.SHADOW_TOKENS, "{token}", "Tokens of copies, which nobody pays for")

    def consider(self, work: Work) -> None:
        """The request is over: begin its copy where it is to have one. Never raises, never waits."""
        shadow = work.route.shadow if work.route is not None else None
        if shadow is None or not self._eligible(work):
            return
        if self._running[shadow.model] >= shadow.concurrency:
            self._count(shadow, "busy")
            return
        try:
            attempt = self._spare(
                Wanted(model=shadow.model, tenant=TENANT, tokens=work.usage.prompt_tokens, regions=work.regions)
            )
        except MeshError:
            self._count(shadow, "down")
            return
        if attempt is None:
            self._count(shadow, "busy")
            return
        self._running[shadow.model] += 1
        task = asyncio.create_task(self._run(shadow, attempt.replica, _copy(work, shadow)))
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._end(done, attempt, shadow.model))

    async def stop(self) -> None:
        """End all copies."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _eligible(self, work: Work) -> bool:
        """Only what was answered whole, by a model, and passed the guard both ways. Token ids are of one vocabulary."""
        if work.outcome != "complete" or work.lookup.answer is not None or work.resumed:
            return False
        if self._guarded and (work.input_verdict is None or not work.judged):
            return False
        filtered = pb.FINISH_REASON_CONTENT_FILTER in work.finishes.values()
        return not filtered and work.generation.input.WhichOneof("input") != "token_ids"

    def _spare(self, wanted: Wanted) -> Attempt | None:
        """A place where nobody waits and most places are free, in a region where the request itself could go.

        Raises MeshError NO_REPLICA or NO_REPLICA_IN_REGION.
        """
        place = self._fleet.take(wanted, _SPARE)
        if place is None:
            return None
        _, attempt = place
        state = attempt.replica.state
        if state is None or state.waiting:
            attempt.end()
            return None
        return attempt

    async def _run(self, shadow: ShadowConfig, replica: Replica, request: worker_pb2.RunGenerationRequest) -> None:
        begun, usage, outcome = time.perf_counter(), pb.Usage(), "complete"
        attributes = {Name.REQUEST_MODEL: shadow.model, Name.REPLICA: replica.name}
        with span("router.shadow", attributes) as current:
            call: Any = replica.stub.RunGeneration(request, timeout=self._seconds, metadata=outgoing_metadata())
            try:
                while (message := await call.read()) is not grpc.aio.EOF:
                    usage = message.usage
            except grpc.RpcError as error:
                outcome = str(from_rpc_error(error).reason)
                fail(current, outcome)
            finally:
                call.cancel()
                current.set_attribute(Name.INPUT_TOKENS, usage.prompt_tokens)
                current.set_attribute(Name.OUTPUT_TOKENS, usage.completion_tokens)
        self._count(shadow, outcome, usage)
        log.info(
            "shadow",
            request_id=request.request_id,
            model=shadow.model,
            replica=replica.name,
            outcome=outcome,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            seconds=round(time.perf_counter() - begun, 6),
        )

    def _count(self, shadow: ShadowConfig, outcome: str, usage: pb.Usage | None = None) -> None:
        labels = {Name.REQUEST_MODEL: shadow.model}
        self._requests.add(1, {**labels, "outcome": outcome})
        if usage is not None:
            self._tokens.add(usage.prompt_tokens, {**labels, "kind": "prompt_tokens"})
            self._tokens.add(usage.completion_tokens, {**labels, "kind": "completion_tokens"})

    def _end(self, task: asyncio.Task[None], attempt: Attempt, model: str) -> None:
        attempt.end()  # without its messages: it is served last, so its times tell nothing of the replica
        self._tasks.discard(task)
        self._running[model] -= 1
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a copy failed", exc_info=error)


def _copy(work: Work, shadow: ShadowConfig) -> worker_pb2.RunGenerationRequest:
    generation = pb.Generation()
    generation.CopyFrom(work.generation)
    generation.input.CopyFrom(work.wording().source)
    generation.model, generation.priority = shadow.model, pb.PRIORITY_BATCH
    generation.ClearField("session")
    generation.return_token_ids = False
    sampling = generation.sampling
    sampling.ClearField("n")
    sampling.max_tokens = min(sampling.max_tokens, shadow.max_tokens)
    sampling.min_tokens = min(sampling.min_tokens, sampling.max_tokens)
    return worker_pb2.RunGenerationRequest(
        request_id=f"{work.request_id}.shadow"[:128],
        generation=generation,
        cache_salt=work.cache_salt,  # a tenant's prefixes stay its own
        allow_control_tokens=work.key.raw_prompts,
        tenant=TENANT,
    )

"""Sampled proof of execution: another worker computes the log-probabilities of an answer's tokens again.

A worker that serves other weights than it says, or computes wrongly, gives its tokens other probabilities than honest
ones do. Of two that differ a third says which; what nobody can decide is only told. Nothing here delays a caller.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import structlog

from meshlm.chassis.calls import outgoing_metadata
from meshlm.chassis.telemetry import Name, meter
from meshlm.router.replicas.fleet import Fleet
from meshlm.router.replicas.proof_config import ProofConfig
from meshlm.router.replicas.quarantine import Quarantine
from meshlm.router.replicas.replica import Replica
from meshlm.router.replicas.residency import Regions
from meshlm.router.work import Work
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2

log = structlog.get_logger()


@dataclass(frozen=True)
class Claim:
    """What a worker said of an answer that it made."""

    replica: Replica
    request: worker_pb2.ScoreRequest
    logprobs: tuple[float, ...]
    regions: Regions


class Prover:
    def __init__(self, config: ProofConfig, fleet: Fleet, quarantine: Quarantine) -> None:
        self._config = config
        self._fleet = fleet
        self._quarantine = quarantine
        self._running: set[asyncio.Task[None]] = set()
        self._chance = random.Random()  # noqa: S311  which answers are proven is no secret worth keeping
        self._outcomes = meter().create_counter(Name.ROUTER_PROOFS, "{proof}", "Answers computed again, by outcome")

    def sample(self, work: Work) -> None:
        """Before it is dispatched: whether its log-probabilities are to be told, for a proof."""
        if not self._config.share or len(self._fleet.replicas) < 2 or self._chance.random() >= self._config.share:
            return
        partial = work.generation.kv_policy.mode > pb.KvPolicy.MODE_FULL
        work.proven = work.choices == 1 and not work.resumed and not partial

    def prove(self, work: Work) -> None:
        """After its end: begin, if it can be proven and there is room."""
        claim = self._claim(work) if work.proven else None
        if claim is None or len(self._running) >= self._config.concurrency:
            return
        task = asyncio.create_task(self._decide(claim))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def stop(self) -> None:
        """Give up what still runs."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _claim(self, work: Work) -> Claim | None:
        answer, replica = work.progress[0], work.replica
        made = len(answer.made)
        whole = work.complete and answer.known and made == len(work.logprobs) and len(work.replicas) == 1
        total = made + work.usage.prompt_tokens
        if not whole or replica is None or made < self._config.least_tokens or total > self._config.most_tokens:
            return None
        request = worker_pb2.ScoreRequest(
            request_id=work.request_id,
            model=work.generation.model,
            input=work.wording().source,
            priority=pb.PRIORITY_BATCH,
            tenant=work.key.tenant,
            cache_salt=work.cache_salt,
            allow_control_tokens=work.key.raw_prompts,
        )
        request.continuations.add().token_ids.ids.extend(answer.made)
        return Claim(replica, request, tuple(work.logprobs), work.regions)

    async def _decide(self, claim: Claim) -> None:
        peers = self._peers(claim)
        self._chance.shuffle(peers)
        if not peers:
            return
        outcome, wrong, difference = await self._judge(claim, peers)
        self._outcomes.add(1, {"outcome": outcome, Name.REPLICA: claim.replica.name})
        if outcome in ("agrees", "failed"):
            return
        log.warning(
            "a proof of execution failed",
            outcome=outcome,
            served=claim.replica.name,
            verifier=peers[0].name,
            mean_difference=round(difference, 4),
            request_id=claim.request.request_id,
        )
        if wrong is not None:
            await self._quarantine.add(wrong.name, f"log-probabilities differ by {difference:.3f} nats a token")

    async def _judge(self, claim: Claim, peers: Sequence[Replica]) -> tuple[str, Replica | None, float]:
        """How it came out, who is wrong, and by how many nats a token the first two differ."""
        second = await self._score(claim, peers[0])
        if second is None:
            return "failed", None, 0.0
        difference = distance(claim.logprobs, second)
        if difference <= self._config.bound:
            return "agrees", None, difference
        # A third decides; without one, the worker itself: it should at least say the same again.
        third = await self._score(claim, peers[1] if len(peers) > 1 else claim.replica)
        if third is None:
            return "undecided", None, difference
        with_served = distance(claim.logprobs, third) <= self._config.bound
        with_second = distance(second, third) <= self._config.bound
        if len(peers) == 1:
            return ("undecided", None, difference) if with_served else ("served_wrong", claim.replica, difference)
        if with_served == with_second:
            return "undecided", None, difference
        return ("verifier_wrong", peers[0], difference) if with_served else ("served_wrong", claim.replica, difference)

    def _peers(self, claim: Claim) -> list[Replica]:
        """Other workers that must come to the same: the same weights, in the same formats, on the same engine."""
        own = _kind(claim.replica)
        return [
            replica
            for replica in self._fleet.replicas
            if replica is not claim.replica
            and replica.usable
            and replica.state is not None
            and claim.regions.allow(replica.state.region)
            and own is not None
            and _kind(replica) == own
        ]

    async def _score(self, claim: Claim, replica: Replica) -> tuple[float, ...] | None:
        """The log-probabilities as this worker computes them; None where it does not answer."""
        try:
            scored = await replica.stub.Score(claim.request, timeout=self._config.seconds, metadata=outgoing_metadata())
        except grpc.RpcError as error:
            log.info("a proof was not made", replica=replica.name, code=error.code().name)
            return None
        return tuple(scored.scored[0].logprobs) if len(scored.scored) == 1 else ()


def _kind(replica: Replica) -> tuple[str, ...] | None:
    if replica.state is None:
        return None
    model = replica.state.model
    return model.name, model.revision, model.quantization, model.kv_dtype, model.engine


def distance(left: Sequence[float], right: Sequence[float]) -> float:
    """Mean absolute difference, nats a token; infinite for texts of different length or what is no number."""
    if len(left) != len(right) or not left:
        return float("inf")
    mean = sum(abs(a - b) for a, b in zip(left, right, strict=True)) / len(left)
    return float("inf") if math.isnan(mean) else mean

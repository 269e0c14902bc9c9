"""How a choice of replica is told: to the caller in the first message, and to whoever reads the trace."""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry.trace import Span

from meshlm.chassis.telemetry import Name
from meshlm.router.accounts.limits import Kind
from meshlm.router.replicas.choosing import Candidate, Choice, Exclusion
from meshlm.router.work import Work
from meshlm.v1 import inference_pb2 as pb

_MOST = 16


def routing_of(work: Work) -> pb.RoutingDecision:
    """How a request came to its model and replica."""
    choice = work.choice
    assert choice is not None  # noqa: S101
    decision = pb.RoutingDecision(model=choice.model, model_revision=choice.revision)
    if work.route is not None:
        work.route.tell(decision)
    if work.lookup.answer is not None:
        decision.reason = {"hit": "cache_hit", "shared": "cache_shared"}[work.lookup.outcome]
        return decision
    decision.reason = choice.reason
    decision.candidates.extend(replica.name for replica in choice.replicas)
    decision.considered.extend(considered(choice))
    if work.replica is not None and work.replica.state is not None:
        decision.replica = work.replica.name
        decision.region = work.replica.state.region
    return decision


def considered(choice: Choice) -> list[pb.Candidate]:
    """The replicas of a choice, and those left out, with what spoke for and against each."""
    told = [candidate_of(candidate) for candidate in choice.candidates]
    return [*told, *(exclusion_of(exclusion) for exclusion in choice.excluded)][:_MOST]


def candidate_of(candidate: Candidate) -> pb.Candidate:
    state = candidate.replica.state
    return pb.Candidate(
        replica=candidate.replica.name,
        region=state.region if state is not None else "",
        predicted_seconds=candidate.seconds,
        cached_tokens=candidate.cached,
        load=candidate.load,
        weight=candidate.weight,
    )


def exclusion_of(exclusion: Exclusion) -> pb.Candidate:
    """A replica in a region that the caller may not use is told without its name: it is no business of the caller's."""
    state = exclusion.replica.state
    hidden = exclusion.reason == "region" or state is None
    return pb.Candidate(
        replica="" if hidden else exclusion.replica.name,
        region=state.region if state is not None else "",
        excluded=exclusion.reason,
    )


def annotate(span: Span, choice: Choice) -> None:
    """The choice, as attributes of the request's span."""
    if not span.is_recording():
        return
    shown, excluded = choice.candidates[:_MOST], choice.excluded[:_MOST]
    span.set_attributes(
        {
            Name.CANDIDATES: [replica.name for replica in choice.replicas],
            Name.ROUTING_REASON: choice.reason,
            Name.ROUTING_SECONDS: [round(candidate.seconds, 6) for candidate in shown],
            Name.ROUTING_CACHED: [candidate.cached for candidate in shown],
            Name.ROUTING_EXCLUDED: [f"{exclusion.replica.name}: {exclusion.reason}" for exclusion in excluded],
        }
    )


def limits_of(left: Mapping[Kind, int]) -> pb.LimitState:
    """What is left of each limit, as a stream's start tells it."""
    return pb.LimitState(
        requests_remaining=left.get(Kind.REQUESTS),
        tokens_remaining=left.get(Kind.TOKENS),
        prompt_tokens_remaining=left.get(Kind.PROMPT),
        completion_tokens_remaining=left.get(Kind.COMPLETION),
        streams_remaining=left.get(Kind.STREAMS),
        day_micros_remaining=left.get(Kind.DAY),
        month_micros_remaining=left.get(Kind.MONTH),
    )

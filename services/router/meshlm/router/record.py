"""Stage 7's record: one line and one set of metrics for every request, however it ended. Never any of its text."""

from __future__ import annotations

import structlog
from opentelemetry import trace
from opentelemetry.util.types import AttributeValue

from meshlm.chassis.telemetry import Name, meter
from meshlm.router.routing.routes import Decision
from meshlm.router.work import Work
from meshlm.v1 import generation_pb2 as pb

log = structlog.get_logger()


class Recorder:
    def __init__(self) -> None:
        self._duration = meter().create_histogram(Name.SERVER_DURATION, "s", "Duration of requests")
        self._first = meter().create_histogram(Name.SERVER_TTFT, "s", "Time to the first token released")
        self._each = meter().create_histogram(Name.SERVER_TPOT, "s", "Time per output token after the first")
        self._tokens = meter().create_counter("meshlm.tokens", "{token}", "Tokens used, by kind")
        self._charged = meter().create_counter(
            Name.LEDGER_CHARGED, "{token}", "Tokens charged to limits: those billed, times the request's weight"
        )
        self._cost = meter().create_counter(Name.COST, "{micro}", "Cost, millionths of the configured currency")
        self._wordings = meter().create_counter(
            Name.WORDINGS, "{request}", "Requests whose input the model did not get word for word, by what was done"
        )
        self._requests = meter().create_counter("meshlm.requests", "{request}", "Requests, by outcome")

    def record(self, work: Work) -> None:
        """The request is over: metrics, the span's attributes, the audit line."""
        model = work.choice.model if work.choice is not None else ""
        route = work.route or Decision("", reason="")
        labels = {Name.REQUEST_MODEL: model, Name.OPERATION: "chat", Name.ROUTING_ARM: route.arm}
        outcome = {"outcome": work.outcome, Name.ROUTING_MODEL_REASON: route.reason}
        self._requests.add(1, {**labels, Name.TENANT: work.key.tenant, **outcome})
        self._duration.record(work.elapsed(), labels)
        if wording := work.wording().name:
            self._wordings.add(1, {Name.TENANT: work.key.tenant, Name.WORDING: wording})
        if first := work.timing.time_to_first_token:
            self._first.record(first, labels)
            if work.usage.completion_tokens > 1 and work.complete:
                self._each.record((work.elapsed() - first) / (work.usage.completion_tokens - 1), labels)
        if work.lookup.answer is None:
            self._count(work, {**labels, Name.TENANT: work.key.tenant})
        self._annotate(work, route, model)
        self._log(work, route, model)

    def _count(self, work: Work, labels: dict[str, str]) -> None:
        """Tokens and money of an answer that was made for this request."""
        billed = work.billed
        kinds = {
            "prompt_tokens": billed.prompt,
            "cached_prompt_tokens": billed.cached,
            "completion_tokens": billed.completion,
        }
        for kind, tokens in kinds.items():
            self._tokens.add(tokens, {**labels, "kind": kind})
        if work.reservation is not None and work.reservation.mode != "unlimited":
            more = {**labels, Name.LEDGER_MODE: work.reservation.mode}
            for kind in ("prompt_tokens", "completion_tokens"):
                self._charged.add(round(work.reservation.terms.weight * kinds[kind]), {**more, "kind": kind})
        if cost := work.cost_micros:
            self._cost.add(cost, labels)

    def _annotate(self, work: Work, route: Decision, model: str) -> None:
        finishes = [_finish(reason) for _, reason in sorted(work.finishes.items())]
        sampling = work.generation.sampling
        attributes: dict[str, AttributeValue] = {
            Name.OPERATION: "chat",
            Name.PROVIDER: "meshlm",
            Name.REQUEST_MODEL: model,
            Name.TENANT: work.key.tenant,
            Name.KEY_ID: work.key.id,
            Name.ROUTING_REQUESTED: route.requested,
            Name.ROUTING_MODEL_REASON: route.reason,
            Name.ROUTING_STEPS: [" ".join(filter(None, (s.stage, s.model, s.outcome))) for s in route.steps],
            Name.CACHE_OUTCOME: work.lookup.outcome,
            Name.INPUT_TOKENS: work.usage.prompt_tokens,
            Name.CACHED_TOKENS: work.usage.cached_prompt_tokens,
            Name.OUTPUT_TOKENS: work.usage.completion_tokens if work.lookup.answer is not None else work.sent,
            Name.FINISH_REASONS: finishes,
            Name.TIME_TO_FIRST_CHUNK: work.timing.time_to_first_token,
            Name.MAX_TOKENS: sampling.max_tokens,
            Name.CHOICES: work.choices,
        }
        if sampling.HasField("temperature"):
            attributes[Name.TEMPERATURE] = sampling.temperature
        if (cost := work.cost_micros) is not None:
            attributes[Name.COST_MICROS] = cost
        if route.doubt is not None:
            attributes[Name.ROUTING_DOUBT] = route.doubt
        if route.arm:
            attributes[Name.ROUTING_ARM] = route.arm
        if wording := work.wording().name:
            attributes[Name.WORDING] = wording
        if work.limit:
            attributes[Name.LEDGER_LIMIT] = work.limit
        if work.replica is not None:
            attributes[Name.REPLICA] = work.replica.name
        trace.get_current_span().set_attributes(attributes)

    def _log(self, work: Work, route: Decision, model: str) -> None:
        log.info(
            "request",
            outcome=work.outcome,
            key=work.key.id,
            tenant=work.key.tenant,
            model=model,
            requested=route.requested,
            model_reason=route.reason,
            arm=route.arm,
            doubt=round(route.doubt, 4) if route.doubt is not None else None,
            model_revision=work.choice.revision if work.choice is not None else "",
            replica=work.replica.name if work.replica is not None else "",
            cache=work.lookup.outcome,
            ledger=work.reservation.mode if work.reservation is not None else "",
            limit=work.limit,
            **(work.assessment.record if work.assessment is not None else {}),
            prompt_tokens=work.usage.prompt_tokens,
            cached_prompt_tokens=work.usage.cached_prompt_tokens,
            completion_tokens=work.usage.completion_tokens,
            billed_tokens=work.billed.prompt + work.billed.completion,
            cost_micros=work.cost_micros,
            finish=[_finish(reason) for _, reason in sorted(work.finishes.items())],
            input_categories=list(work.input_verdict.categories) if work.input_verdict is not None else [],
            output_categories=sorted({c for verdict in work.output_verdicts for c in verdict.categories}),
            ttft=round(work.timing.time_to_first_token, 6),
            seconds=round(work.elapsed(), 6),
            labels=dict(work.generation.labels),
        )


def _finish(reason: pb.FinishReason.ValueType) -> str:
    return pb.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()

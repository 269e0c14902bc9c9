"""Traces and metrics on the OpenTelemetry SDK, off the hot path; and every attribute's name in one table.

Names follow the RPC and GenAI semantic conventions as of 2026-08; both are still moving, which is why they stand here
and nowhere else.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

from opentelemetry import context, metrics, propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from meshlm.chassis.config import TelemetryConfig
from meshlm.chassis.spans import SpanStore


class Name:
    """Attributes, spans and metrics."""

    # RPC conventions.
    RPC_SYSTEM = "rpc.system"
    RPC_SERVICE = "rpc.service"
    RPC_METHOD = "rpc.method"
    RPC_STATUS = "rpc.grpc.status_code"
    # GenAI conventions.
    OPERATION = "gen_ai.operation.name"
    PROVIDER = "gen_ai.provider.name"
    REQUEST_MODEL = "gen_ai.request.model"
    MAX_TOKENS = "gen_ai.request.max_tokens"
    TEMPERATURE = "gen_ai.request.temperature"
    CHOICES = "gen_ai.request.choice.count"
    FINISH_REASONS = "gen_ai.response.finish_reasons"
    INPUT_TOKENS = "gen_ai.usage.input_tokens"
    CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
    OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
    TIME_TO_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
    SERVER_DURATION = "gen_ai.server.request.duration"
    SERVER_TTFT = "gen_ai.server.time_to_first_token"
    SERVER_TPOT = "gen_ai.server.time_per_output_token"
    # The mesh's own.
    REQUEST_ID = "meshlm.request_id"
    TENANT = "meshlm.tenant"
    KEY_ID = "meshlm.key_id"
    ERROR_REASON = "error.type"
    REPLICA = "meshlm.replica"
    ROUTING_REASON = "meshlm.routing.reason"
    ROUTING_REQUESTED = "meshlm.routing.requested"
    ROUTING_MODEL_REASON = "meshlm.routing.model_reason"
    ROUTING_ARM = "meshlm.routing.arm"
    ROUTING_STEPS = "meshlm.routing.steps"
    ROUTING_DOUBT = "meshlm.routing.doubt"
    ROUTING_TRIALS = "meshlm.routing.trials"
    ROUTING_UNSEEN = "meshlm.routing.unseen_tokens"
    CANDIDATES = "meshlm.routing.candidates"
    ROUTING_SECONDS = "meshlm.routing.predicted_seconds"
    ROUTING_CACHED = "meshlm.routing.cached_tokens"
    ROUTING_EXCLUDED = "meshlm.routing.excluded"
    REPLICA_EJECTIONS = "meshlm.replica.ejections"
    SHADOW_REQUESTS = "meshlm.shadow.requests"
    SHADOW_TOKENS = "meshlm.shadow.tokens"
    PRIORITY = "meshlm.priority"
    OVERLOAD_QUEUED = "meshlm.overload.queued"
    OVERLOAD_WAIT = "meshlm.overload.wait"
    OVERLOAD_PREDICTED = "meshlm.overload.predicted_wait_seconds"
    OVERLOAD_SHED = "meshlm.overload.shed"
    OVERLOAD_LIMIT = "meshlm.overload.limit"
    CACHE_OUTCOME = "meshlm.cache.outcome"
    GUARD_ACTION = "meshlm.guard.action"
    GUARD_CATEGORIES = "meshlm.guard.categories"
    GUARD_SHADOW = "meshlm.guard.shadow_action"
    GUARD_SCORE = "meshlm.guard.score"
    GUARD_POLICY = "meshlm.guard.policy_version"
    PROMPT_ENTROPY = "meshlm.prompt.entropy_bits_per_byte"
    PROMPT_COMPRESSION = "meshlm.prompt.compression_ratio"
    PROMPT_BYTES = "meshlm.prompt.bytes"
    TOKENS_RESERVED = "meshlm.ledger.tokens_reserved"
    TOKENS_SETTLED = "meshlm.ledger.tokens_settled"
    LEDGER_MODE = "meshlm.ledger.mode"
    LEDGER_LIMIT = "meshlm.ledger.limit"
    LEDGER_WEIGHT = "meshlm.ledger.weight"
    LEDGER_REFUSALS = "meshlm.ledger.refusals"
    LEDGER_CHARGED = "meshlm.ledger.tokens_charged"
    LEDGER_EMERGENCY = "meshlm.ledger.emergency"
    RISK = "meshlm.risk"
    RISK_CALLER = "meshlm.risk.caller"
    RISK_PROMPT = "meshlm.risk.prompt"
    SURPRISE = "meshlm.prompt.surprise"
    SURPRISE_SOURCE = "meshlm.prompt.surprise_source"
    SURPRISE_SCORES = "meshlm.prompt.scores"
    RISK_WEIGHT = "meshlm.risk.weight"
    RISK_SHADOW = "meshlm.risk.shadow"
    RISK_SHARED = "meshlm.risk.shared"
    RISK_LOCAL = "meshlm.risk.local"
    BREAKER_KEY = "meshlm.breaker.key"
    BREAKER_ROUTE = "meshlm.breaker.route"
    BREAKER_TRIPS = "meshlm.breaker.trips"
    BREAKER_REFUSALS = "meshlm.breaker.refusals"
    COST = "meshlm.cost"
    COST_MICROS = "meshlm.cost_micros"
    ROUTER_RETRIES = "meshlm.router.retries"
    ROUTER_RESUMES = "meshlm.router.resumes"
    ROUTER_PROOFS = "meshlm.router.proofs"
    ROUTER_QUARANTINED = "meshlm.router.quarantined"
    STREAM_RESUMES = "meshlm.stream.resumes"
    STREAM_REPLICAS = "meshlm.stream.replicas"
    WORDING = "meshlm.wording"
    WORDINGS = "meshlm.wordings"
    PREEMPTIONS = "meshlm.engine.preemptions"
    CHOICE = "meshlm.choice"
    GUARD_DIRECTION = "meshlm.guard.direction"
    GUARD_CATEGORY = "meshlm.guard.category"
    GUARD_VERDICTS = "meshlm.guard.verdicts"
    GUARD_FINDINGS = "meshlm.guard.findings"
    GUARD_DURATION = "meshlm.guard.duration"
    GUARD_JUDGE_FAILURES = "meshlm.guard.judge_failures"
    GUARD_FAILURE = "meshlm.guard.failure"
    GUARD_MODEL = "meshlm.guard.model"
    GUARD_MODEL_VERDICTS = "meshlm.guard.model_verdicts"
    GUARD_MODEL_DURATION = "meshlm.guard.model_duration"
    GUARD_MODEL_TOKENS = "meshlm.guard.model_tokens"
    GUARD_CACHED = "meshlm.guard.cached"
    GUARD_OUTCOME = "meshlm.guard.outcome"
    GUARD_PANELS = "meshlm.guard.panels"
    GUARD_PANEL = "meshlm.guard.panel"
    GUARD_FAILURES = "meshlm.guard.failures"
    GUARD_RELOADS = "meshlm.guard.policy_reloads"
    GUARD_CAUSE = "meshlm.guard.cause"
    CACHE_LOOKUPS = "meshlm.cache.lookups"
    CACHE_STORES = "meshlm.cache.stores"
    CACHE_DURATION = "meshlm.cache.duration"
    CACHE_STATE_FAILURES = "meshlm.cache.state_failures"


GENAI_DURATION = [0.01 * 2**i for i in range(14)]
GENAI_TTFT = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0]
GENAI_TPOT = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5]
# Calls inside the mesh: from 100 us to 13 s (the SDK's own default is made for milliseconds).
_CALLS = [0.0001 * 2**i for i in range(18)]
_BUCKETS: Mapping[str, Sequence[float]] = {
    Name.SURPRISE: [i / 2 for i in range(1, 21)],
    Name.RISK: [i / 10 for i in range(1, 11)],
    "rpc.server.duration": _CALLS,
    Name.GUARD_DURATION: _CALLS,
    Name.GUARD_MODEL_DURATION: _CALLS,
    Name.CACHE_DURATION: _CALLS,
    Name.OVERLOAD_WAIT: GENAI_DURATION,
    Name.SERVER_DURATION: GENAI_DURATION,
    Name.SERVER_TTFT: GENAI_TTFT,
    Name.SERVER_TPOT: GENAI_TPOT,
}


class Telemetry:
    """The process's providers; `close` flushes what is still in memory."""

    def __init__(self, service: str, config: TelemetryConfig) -> None:
        resource = Resource.create(
            {
                "service.name": f"meshlm-{service}",
                "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
                "deployment.environment.name": config.environment,
            }
        )
        self._tracers = TracerProvider(resource=resource, sampler=sampler(config), shutdown_on_exit=False)
        if config.span_store:
            store = SpanStore(config.span_store, keep=config.span_store_traces)
            self._tracers.add_span_processor(BatchSpanProcessor(store, schedule_delay_millis=1000))
        if config.otlp_endpoint:
            exporter = OTLPSpanExporter(endpoint=config.otlp_endpoint)
            self._tracers.add_span_processor(BatchSpanProcessor(exporter))
        readers: list[MetricReader] = [PrometheusMetricReader()]
        if config.otlp_endpoint:
            readers.append(PeriodicExportingMetricReader(OTLPMetricExporter(endpoint=config.otlp_endpoint)))
        views = [
            View(instrument_name=name, aggregation=ExplicitBucketHistogramAggregation(boundaries))
            for name, boundaries in _BUCKETS.items()
        ]
        # Prometheus' exporter drops exemplars: where nothing else reads, none are drawn.
        exemplars = None if config.otlp_endpoint else AlwaysOffExemplarFilter()
        self._meters = MeterProvider(
            resource=resource, metric_readers=readers, views=views, exemplar_filter=exemplars, shutdown_on_exit=False
        )
        trace.set_tracer_provider(self._tracers)
        metrics.set_meter_provider(self._meters)

    def close(self) -> None:
        self._tracers.shutdown()
        self._meters.shutdown()


def sampler(config: TelemetryConfig) -> Sampler:
    """A trace that nobody keeps is not recorded, which is a tenth of a router's time; its ids are there all the same.
    One that a caller records goes on, for those behind to keep."""
    kept = config.span_store or config.otlp_endpoint
    return ParentBased(TraceIdRatioBased(config.sample_ratio) if kept else ALWAYS_OFF)


def tracer() -> trace.Tracer:
    return _tracer_of(trace.get_tracer_provider())


@lru_cache(maxsize=1)
def _tracer_of(provider: trace.TracerProvider) -> trace.Tracer:
    return provider.get_tracer("meshlm")  # each look-up makes a new one, at a third of a span's cost


def meter() -> metrics.Meter:
    return metrics.get_meter("meshlm")


def span(
    name: str, attributes: Mapping[str, Any] | None = None, *, kind: SpanKind = SpanKind.INTERNAL
) -> AbstractContextManager[Span]:
    """A span around a block. An exception marks it failed by type; its text is not recorded."""
    return _Block(name, attributes, kind)


def begin(name: str, attributes: Mapping[str, Any] | None = None, *, kind: SpanKind = SpanKind.INTERNAL) -> Span:
    """A span that its caller ends. Within one that is not recorded it is that one: nobody would see the difference."""
    parent = trace.get_current_span()
    if kind is not SpanKind.SERVER and not parent.is_recording():
        known = parent.get_span_context()
        if known.is_valid and not known.trace_flags.sampled:
            return parent
    return tracer().start_span(name, kind=kind, attributes=attributes)


class _Block(AbstractContextManager[Span]):
    """A class, for the library's own two generators around each span cost as much as the span."""

    __slots__ = ("_attributes", "_kind", "_name", "_span", "_token")

    def __init__(self, name: str, attributes: Mapping[str, Any] | None, kind: SpanKind) -> None:
        self._name = name
        self._attributes = attributes
        self._kind = kind

    def __enter__(self) -> Span:
        self._span = begin(self._name, self._attributes, kind=self._kind)
        self._token = context.attach(trace.set_span_in_context(self._span))
        return self._span

    def __exit__(self, kind: Any, error: BaseException | None, trace_back: Any) -> None:
        if error is not None:
            fail(self._span, getattr(error, "reason", type(error).__name__))
        context.detach(self._token)
        self._span.end()


def client_span(service: str, method: str) -> Any:
    """The CLIENT span of one RPC; use as a context manager around the call."""
    attributes = {Name.RPC_SYSTEM: "grpc", Name.RPC_SERVICE: service, Name.RPC_METHOD: method}
    return span(f"{service}/{method}", attributes, kind=SpanKind.CLIENT)


def fail(current: Span, reason: str) -> None:
    current.set_attribute(Name.ERROR_REASON, str(reason))
    current.set_status(Status(StatusCode.ERROR))


def record(name: str, start: float, end: float, offset: float, attributes: Mapping[str, Any], parent: Context) -> None:
    """A span for something that has already happened.

    `start` and `end` are seconds of `time.monotonic`; `offset` is what leads from there to seconds since the epoch.
    """
    begun = tracer().start_span(
        name, context=parent, start_time=round((start + offset) * 1e9), attributes=dict(attributes)
    )
    begun.end(round((end + offset) * 1e9))


def inject(metadata: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Add the current trace to outgoing metadata (W3C traceparent)."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return metadata + list(carrier.items())


def extract(metadata: Mapping[str, str]) -> Context:
    return propagate.extract(dict(metadata))


def current_trace_id() -> str:
    """32 hex digits; zeros where nothing is traced."""
    return trace.format_trace_id(trace.get_current_span().get_span_context().trace_id)

"""Which traces are recorded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanKind

from meshlm.chassis import telemetry
from meshlm.chassis.config import TelemetryConfig

RECORDED = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
NOT_RECORDED = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"


def begun(config: TelemetryConfig, parent: str = "") -> Span:
    context = telemetry.extract({"traceparent": parent} if parent else {})
    return TracerProvider(sampler=telemetry.sampler(config)).get_tracer("t").start_span("s", context=context)


KEPT = [TelemetryConfig(span_store="spans.db"), TelemetryConfig(otlp_endpoint="http://collector:4317")]


@pytest.mark.parametrize("config", KEPT)
def test_what_is_exported_or_kept_is_recorded(config: TelemetryConfig) -> None:
    assert begun(config).is_recording()


def test_what_nobody_keeps_costs_no_span_and_has_its_ids_all_the_same() -> None:
    span = begun(TelemetryConfig())
    assert not span.is_recording()
    assert span.get_span_context().is_valid


@pytest.mark.parametrize("config", [TelemetryConfig(), *KEPT])
def test_a_callers_own_decision_goes_before(config: TelemetryConfig) -> None:
    assert begun(config, RECORDED).get_span_context().trace_flags.sampled
    assert not begun(config, NOT_RECORDED).get_span_context().trace_flags.sampled


def test_the_share_that_is_configured_counts_for_what_is_kept() -> None:
    assert not begun(TelemetryConfig(span_store="spans.db", sample_ratio=0.0)).is_recording()


@pytest.fixture
def tracers(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Span]:
    """Those of this configuration, within a server's span of theirs."""
    provider = TracerProvider(sampler=telemetry.sampler(request.param))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    with telemetry.span("outer", kind=SpanKind.SERVER) as outer:
        yield outer
    telemetry._tracer_of.cache_clear()


@pytest.mark.parametrize("tracers", [TelemetryConfig()], indirect=True)
def test_within_a_span_that_is_not_recorded_only_a_servers_is_one_of_its_own(tracers: Span) -> None:
    for kind in (SpanKind.INTERNAL, SpanKind.CLIENT):
        assert telemetry.begin("inner", kind=kind) is tracers
    served = telemetry.begin("inner", kind=SpanKind.SERVER).get_span_context()
    assert served.span_id != tracers.get_span_context().span_id
    assert served.trace_id == tracers.get_span_context().trace_id


@pytest.mark.parametrize("tracers", KEPT, indirect=True)
def test_within_one_that_is_recorded_each_is(tracers: Span) -> None:
    for kind in SpanKind:
        span = telemetry.begin("inner", kind=kind)
        assert span.is_recording()
        assert span.get_span_context().span_id != tracers.get_span_context().span_id

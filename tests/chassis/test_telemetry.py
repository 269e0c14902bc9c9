"""Which traces are recorded."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span

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

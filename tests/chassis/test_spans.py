"""The local span store, through the real SDK."""

from __future__ import annotations

from pathlib import Path

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import Status, StatusCode, format_trace_id

from meshlm.chassis.spans import SpanStore, read_trace, recent_traces


def provider(path: Path, keep: int = 100) -> TracerProvider:
    made = TracerProvider(resource=Resource({"service.name": "s"}), shutdown_on_exit=False)
    made.add_span_processor(SimpleSpanProcessor(SpanStore(str(path), keep=keep)))
    return made


def test_a_trace_is_found_by_its_id_and_by_its_requests_id(tmp_path: Path) -> None:
    tracer = provider(tmp_path / "spans.db").get_tracer("t")
    with (
        tracer.start_as_current_span("outer", attributes={"meshlm.request_id": "r-1"}) as outer,
        tracer.start_as_current_span("inner") as inner,
    ):
        inner.set_status(Status(StatusCode.ERROR))
    trace_id = format_trace_id(outer.get_span_context().trace_id)
    by_trace = read_trace(str(tmp_path / "spans.db"), trace_id)
    assert [(s.name, s.failed, s.service) for s in by_trace] == [("outer", False, "s"), ("inner", True, "s")]
    assert by_trace[1].parent_id == by_trace[0].span_id
    assert by_trace[0].start_ns <= by_trace[1].start_ns <= by_trace[1].end_ns <= by_trace[0].end_ns
    assert read_trace(str(tmp_path / "spans.db"), "r-1") == by_trace
    assert read_trace(str(tmp_path / "spans.db"), "none") == []


def test_the_oldest_traces_go_when_there_are_too_many(tmp_path: Path) -> None:
    path = tmp_path / "spans.db"
    tracer = provider(path, keep=3).get_tracer("t")
    for number in range(6):
        with tracer.start_as_current_span("span", attributes={"meshlm.request_id": f"r-{number}"}):
            pass
    assert [request for _, request in recent_traces(str(path))] == ["r-5", "r-4", "r-3"]
    assert read_trace(str(path), "r-2") == []
    assert len(read_trace(str(path), "r-3")) == 1


def test_two_processes_worth_of_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "spans.db"
    tracers = [provider(path).get_tracer(name) for name in "ab"]
    for number in range(20):
        with tracers[number % 2].start_as_current_span(f"span-{number}"):
            pass
    assert len(recent_traces(str(path), limit=100)) == 20


def test_a_file_that_cannot_be_written_costs_spans_and_nothing_else(tmp_path: Path) -> None:
    tracer = provider(tmp_path / "no" / "folder" / "spans.db").get_tracer("t")
    with tracer.start_as_current_span("span") as span:
        assert span.is_recording()

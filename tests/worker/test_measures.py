"""What a trace and a scrape show of a generation. The SDK's providers are given for the length of a test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from meshlm.chassis import telemetry
from meshlm.chassis.telemetry import Name
from meshlm.worker.fake_tokenizer import fake_tokenizer
from meshlm.worker.front.engine_client import EngineClient
from meshlm.worker.front.engine_process import EngineSettings
from meshlm.worker.front.measures import Measures
from meshlm.worker.front.plans import Plan, SoFar
from meshlm.worker.front.read_plans import ReadPlan
from meshlm.worker.front.reads import Reads
from meshlm.worker.front.streams import Choice, Generation, Phases
from meshlm.worker.messages import Finish, Finished, Limits, Load, NewToken, Sampling, Started


class Rig:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spans, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        tracers, meters = TracerProvider(), MeterProvider([self.reader])
        tracers.add_span_processor(SimpleSpanProcessor(self.spans))
        monkeypatch.setattr(telemetry, "tracer", lambda: tracers.get_tracer("test"))
        monkeypatch.setattr(telemetry, "meter", lambda: meters.get_meter("test"))
        self.client = EngineClient(EngineSettings(kind="fake", runner={}), on_able=_nobody)
        self.measures = Measures(self.client, "model")
        plan = Plan(
            prompt=[1] * 10,
            so_far=(),
            sampling=Sampling(),
            limits=Limits(max_tokens=9),
            stops=(),
            choices=1,
            priority=0,
            cache_salt=b"",
            tenant="",
            kv=None,
            return_token_ids=False,
        )
        self.choice = Choice(0, plan, fake_tokenizer())
        self.generation = Generation(self.client, plan, fake_tokenizer())
        self.generation.choices.append(self.choice)

    def span(self, name: str) -> ReadableSpan:
        [span] = [span for span in self.spans.get_finished_spans() if span.name == name]
        return span

    def metrics(self) -> dict[str, Any]:
        data = self.reader.get_metrics_data()
        assert data is not None
        found = data.resource_metrics[0].scope_metrics[0].metrics
        return {metric.name: metric.data.data_points[0] for metric in found if metric.data.data_points}


async def _nobody(able: bool, why: str) -> None: ...


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return round((span.end_time - span.start_time) / 1e9, 6)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(monkeypatch)


def test_spans_and_histograms_show_where_the_time_went(rig: Rig) -> None:
    tokens = [NewToken("", 97)] * 5
    end = Finished(
        id="", reason=Finish.LENGTH, cached_tokens=8, arrival=1.0, first_scheduled=1.5, first_token=3.5, ended=4.5
    )
    rig.choice.advance([Started("", 8, 1.5), *tokens, end])
    rig.measures.record(rig.generation)
    assert seconds(rig.span("engine.queue")) == 0.5
    assert seconds(rig.span("engine.prefill")) == 2.0
    assert seconds(rig.span("engine.decode")) == 1.0
    assert dict(rig.span("engine.prefill").attributes or {})[Name.CACHED_TOKENS] == 8
    assert dict(rig.span("engine.decode").attributes or {})[Name.OUTPUT_TOKENS] == 5
    metrics = rig.metrics()
    assert metrics[Name.SERVER_TTFT].sum == 2.5
    assert metrics[Name.SERVER_TPOT].sum == 0.25  # 1 s for the 4 tokens after the first
    assert metrics[Name.SERVER_DURATION].sum == 3.5


def test_a_resumed_stream_is_no_faster_than_the_tokens_that_were_drawn(rig: Rig) -> None:
    plan = replace(rig.generation.plan, so_far=(SoFar(generated=[97] * 3),))
    resumed = Choice(0, plan, fake_tokenizer())
    resumed.advance([NewToken("", 97)] * 3)  # made elsewhere
    end = Finished(id="", reason=Finish.LENGTH, arrival=1.0, first_scheduled=1.5, first_token=2.0, ended=4.0)
    resumed.advance([Started("", 0, 1.5), *[NewToken("", 97)] * 5, end])
    rig.generation.choices[:] = [resumed]
    rig.measures.record(rig.generation)
    assert rig.metrics()[Name.SERVER_TPOT].sum == 0.5  # 2 s for the 4 tokens after the first


def test_texts_that_are_read_show_their_wait_and_their_prefill(rig: Rig) -> None:
    texts = [[1] * 10, [2] * 5]
    plan = ReadPlan(texts=texts, pool="mean", priority=0, cache_salt=b"", tenant="", deadline=None)
    reads = Reads(rig.client, plan)
    reads.phases, reads.cached = Phases(arrival=1.0, first_scheduled=1.5, ended=4.0), 8
    rig.measures.record_reads(reads)
    assert [seconds(rig.span(name)) for name in ("engine.queue", "engine.prefill")] == [0.5, 2.5]
    told = dict(rig.span("engine.prefill").attributes or {})
    assert (told[Name.INPUT_TOKENS], told[Name.CACHED_TOKENS], told[Name.OPERATION]) == (15, 8, "embeddings")
    assert rig.metrics()[Name.SERVER_DURATION].sum == 3.0


def test_a_call_cancelled_while_it_waits_shows_its_wait_and_nothing_else(rig: Rig) -> None:
    rig.measures.record(rig.generation)
    assert [span.name for span in rig.spans.get_finished_spans()] == ["engine.queue"]
    assert Name.SERVER_TTFT not in rig.metrics()


def test_the_load_is_scraped_as_the_engine_last_told_it(rig: Rig) -> None:
    assert "meshlm.engine.running" not in rig.metrics()
    rig.client.load = Load(
        running=3,
        waiting=2,
        free_blocks=5,
        total_blocks=9,
        pending_prefill_tokens=0,
        cached_blocks=0,
        digest=b"",
        steps_total=7,
        preemptions_total=0,
        cancelled_total=1,
        freed_after_cancel_total=4,
        out_of_memory_total=0,
        non_finite_total=0,
    )
    metrics = rig.metrics()
    assert metrics["meshlm.engine.running"].value == 3
    assert metrics["meshlm.engine.freed_after_cancel"].value == 4

"""What the worker tells of itself: engine phases as spans, GenAI histograms, gauges and counters of the load."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from opentelemetry import context
from opentelemetry.metrics import CallbackOptions, Observation

from meshlm.chassis import telemetry
from meshlm.chassis.telemetry import Name
from meshlm.worker.front.engine_client import EngineClient
from meshlm.worker.front.reads import Reads
from meshlm.worker.front.streams import Choice, Generation, Phases
from meshlm.worker.messages import Load

_GAUGES: dict[str, Callable[[Load], int]] = {
    "meshlm.engine.running": lambda load: load.running,
    "meshlm.engine.waiting": lambda load: load.waiting,
    "meshlm.engine.free_blocks": lambda load: load.free_blocks,
    "meshlm.engine.total_blocks": lambda load: load.total_blocks,
    "meshlm.engine.cached_blocks": lambda load: load.cached_blocks,
    "meshlm.engine.pending_prefill_tokens": lambda load: load.pending_prefill_tokens,
}
_COUNTERS: dict[str, Callable[[Load], int]] = {
    "meshlm.engine.steps": lambda load: load.steps_total,
    "meshlm.engine.preemptions": lambda load: load.preemptions_total,
    "meshlm.engine.cancelled": lambda load: load.cancelled_total,
    "meshlm.engine.freed_after_cancel": lambda load: load.freed_after_cancel_total,
    "meshlm.engine.out_of_memory": lambda load: load.out_of_memory_total,
    "meshlm.engine.non_finite": lambda load: load.non_finite_total,
}


class Measures:
    """The instruments of one worker."""

    def __init__(self, client: EngineClient, model: str) -> None:
        meter = telemetry.meter()
        self._client = client
        self._attributes = {Name.OPERATION: "generate", Name.REQUEST_MODEL: model}
        self._read_attributes = {
            operation: {Name.OPERATION: operation, Name.REQUEST_MODEL: model} for operation in ("score", "embeddings")
        }
        self._duration = meter.create_histogram(Name.SERVER_DURATION, "s", "From arrival at the worker to the end")
        self._first = meter.create_histogram(Name.SERVER_TTFT, "s", "From arrival at the worker to the first token")
        self._per_token = meter.create_histogram(Name.SERVER_TPOT, "s", "Between tokens after the first")
        for name, read in _GAUGES.items():
            meter.create_observable_gauge(name, [self._observer(read)])
        for name, read in _COUNTERS.items():
            meter.create_observable_counter(name, [self._observer(read)])
        meter.create_observable_counter("meshlm.engine.starts", [lambda _: [Observation(client.starts)]])

    def record(self, generation: Generation) -> None:
        """After the end of a call, however it ended; inside its context, so that the spans find their parent."""
        for choice in generation.choices:
            choice.phases.ended = choice.phases.ended or time.monotonic()
            self._record_histograms(choice)
            _record_spans(choice, len(generation.plan.prompt))

    def record_reads(self, reads: Reads) -> None:
        """As `record`, for texts that were scored or embedded: one pair of spans for all of them."""
        phases = reads.phases
        phases.ended = phases.ended or time.monotonic()
        operation = "score" if reads.plan.pool is None else "embeddings"
        self._duration.record(phases.ended - phases.arrival, self._read_attributes[operation])
        about = {Name.OPERATION: operation}
        prompt = about | {Name.INPUT_TOKENS: reads.tokens, Name.CACHED_TOKENS: reads.cached}
        _record_wait(phases, about, prompt)

    def _record_histograms(self, choice: Choice) -> None:
        phases = choice.phases
        self._duration.record(phases.ended - phases.arrival, self._attributes)
        if phases.first_token:
            self._first.record(phases.first_token - phases.arrival, self._attributes)
        if choice.drawn > 1 and phases.first_token:
            self._per_token.record(phases.decode / (choice.drawn - 1), self._attributes)

    def _observer(self, read: Callable[[Load], int]) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_: CallbackOptions) -> list[Observation]:
            load = self._client.load
            return [] if load is None else [Observation(read(load))]

        return observe


def _record_spans(choice: Choice, prompt_tokens: int) -> None:
    phases = choice.phases
    about: dict[str, Any] = {Name.CHOICE: choice.index}
    _record_wait(phases, about, about | {Name.INPUT_TOKENS: prompt_tokens, Name.CACHED_TOKENS: choice.cached})
    if phases.first_token:
        output = about | {Name.OUTPUT_TOKENS: choice.made, Name.PREEMPTIONS: choice.preemptions}
        _record_span("engine.decode", phases.first_token, phases.ended, output)


def _record_wait(phases: Phases, about: dict[str, Any], prompt: dict[str, Any]) -> None:
    """The queue, with attributes `about`, and the prefill, with attributes `prompt`."""
    scheduled = phases.first_scheduled or phases.ended
    _record_span("engine.queue", phases.arrival, scheduled, about)
    if phases.first_scheduled:
        _record_span("engine.prefill", scheduled, phases.first_token or phases.ended, prompt)


def _record_span(name: str, start: float, end: float, attributes: dict[str, Any]) -> None:
    telemetry.record(name, start, end, time.time() - time.monotonic(), attributes, context.get_current())

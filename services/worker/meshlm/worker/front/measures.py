"""What the worker tells of itself: engine phases as spans, GenAI histograms, gauges and counters of the load."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from opentelemetry import context
from opentelemetry.metrics import CallbackOptions, Observation

from meshlm.chassis import telemetry
from meshlm.chassis.telemetry import Name
from meshlm.worker.front.engine_client import EngineClient
from meshlm.worker.front.streams import Choice, Generation
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
}


class Measures:
    """The instruments of one worker."""

    def __init__(self, client: EngineClient, model: str) -> None:
        meter = telemetry.meter()
        self._client = client
        self._attributes = {Name.OPERATION: "generate", Name.REQUEST_MODEL: model}
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

    def _record_histograms(self, choice: Choice) -> None:
        phases = choice.phases
        self._duration.record(phases.ended - phases.arrival, self._attributes)
        if phases.first_token:
            self._first.record(phases.first_token - phases.arrival, self._attributes)
        if choice.made > 1 and phases.first_token:
            self._per_token.record(phases.decode / (choice.made - 1), self._attributes)

    def _observer(self, read: Callable[[Load], int]) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_: CallbackOptions) -> list[Observation]:
            load = self._client.load
            return [] if load is None else [Observation(read(load))]

        return observe


def _record_spans(choice: Choice, prompt_tokens: int) -> None:
    phases, parent = choice.phases, context.get_current()
    offset = time.time() - time.monotonic()
    about = {Name.CHOICE: choice.index}
    scheduled, first = phases.first_scheduled or phases.ended, phases.first_token or phases.ended
    telemetry.record("engine.queue", phases.arrival, scheduled, offset, about, parent)
    if phases.first_scheduled:
        prompt = {Name.INPUT_TOKENS: prompt_tokens, Name.CACHED_TOKENS: choice.cached}
        telemetry.record("engine.prefill", scheduled, first, offset, about | prompt, parent)
    if phases.first_token:
        output = {Name.OUTPUT_TOKENS: choice.made, Name.PREEMPTIONS: choice.preemptions}
        telemetry.record("engine.decode", first, phases.ended, offset, about | output, parent)

"""The engine: schedule, run, absorb, report."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from meshlm.worker.engine.news import is_broken
from meshlm.worker.engine.scheduler import Scheduler, SchedulerSettings
from meshlm.worker.engine.sequence import Chunk, Outcome, Runner, StepOutOfMemory
from meshlm.worker.messages import StepReport, Submit

log = structlog.get_logger()


class Engine:
    """Sequences in, step reports out. One thread; the clock is an argument so that tests can hold it."""

    def __init__(
        self, runner: Runner, settings: SchedulerSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.runner = runner
        self.scheduler = Scheduler(runner.facts, settings)
        self._clock = clock

    @property
    def busy(self) -> bool:
        return self.scheduler.busy

    @property
    def blocks_in_use(self) -> int:
        return self.scheduler.pool.total - self.scheduler.pool.free

    def submit(self, request: Submit) -> None:
        self.scheduler.submit(request, self._clock())

    def cancel(self, sequence_id: str) -> None:
        self.scheduler.cancel(sequence_id, self._clock())

    def step(self) -> StepReport:
        """Moves every sequence that can be moved, by one chunk or token, and says what became of all of them."""
        began = self._clock()
        chunks = self.scheduler.schedule(began)
        self._forget_dropped()
        chunks, outcomes = self._run(chunks)
        now = self._clock()
        self.scheduler.absorb(chunks, outcomes, now, now - began)
        broken = sum(map(is_broken, outcomes))
        if broken:
            log.error("what the model computed is no number", sequences=broken, engine=self.runner.facts.engine)
        self._compact()
        self._forget_dropped()
        return self._report(self._clock() - began)

    def close(self) -> StepReport:
        """Cancels whatever is left. Blocks still in use afterwards have leaked."""
        self.scheduler.cancel_all(self._clock())
        self._forget_dropped()
        return self._report(0.0)

    def _run(self, chunks: list[Chunk]) -> tuple[list[Chunk], list[Outcome]]:
        """Runs a step; where the device's memory gives out, again without the newest sequence."""
        while chunks:
            try:
                return chunks, self.runner.run(chunks)
            except StepOutOfMemory:
                chunks = self.scheduler.drop_newest(chunks, self._clock())
        return [], []

    def _compact(self) -> None:
        for sequence, keep in self.scheduler.take_compactions():
            self.runner.compact(sequence, keep)
            self.scheduler.compacted(sequence, keep)

    def _forget_dropped(self) -> None:
        for sequence in self.scheduler.take_dropped():
            self.runner.forget(sequence)

    def _report(self, seconds: float) -> StepReport:
        news = self.scheduler.collect()
        return StepReport(
            load=self.scheduler.load(),
            step_seconds=seconds,
            started=tuple(news.started),
            tokens=tuple(news.tokens),
            scored=tuple(news.scored),
            embedded=tuple(news.embedded),
            finished=tuple(news.finished),
        )

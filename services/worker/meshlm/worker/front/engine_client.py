"""The front's hold on the engine: starts it, hands it sequences, tells its deaths, starts it again.

An engine that dies or hangs takes no stream down silently: each ends with `EngineLost`, `on_able(False)` is told, and a
new engine is started, at once after a long life and with growing pauses after short ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable

import structlog
import zmq

from meshlm.worker.front.engine_process import EngineProcess, EngineSettings
from meshlm.worker.front.engine_stream import EngineLost, EngineStream
from meshlm.worker.messages import (
    Cancel,
    Goodbye,
    Load,
    Loading,
    ModelFacts,
    Ready,
    StepReport,
    Stop,
    Submit,
)

WATCH_PAUSE_SECONDS = 0.05  # watchers see at most 20 changes a second,
WATCH_WAIT_SECONDS = 1.0  # and something every second
LONGEST_BACKOFF_SECONDS = 30.0
LONG_LIFE_SECONDS = 60.0  # an engine that lived so long is started again without a pause
STOP_SECONDS = 10.0  # for the step under way
CROWD = 16  # streams
LEAST_CROWDING = 0.25
LOADING_TOLD_SECONDS = 5.0  # between two lines of the log on a long load
LAST_WORDS_SECONDS = 0.1  # what a dead engine had sent before is still read

log = structlog.get_logger()


class EngineClient:
    """Call `start` once, then `submit` at will, then `stop` once."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        on_able: Callable[[bool, str], Awaitable[None]],
        hang_seconds: float = 30.0,
        load_seconds: float = 600.0,
        backoff_seconds: float = 0.5,
    ) -> None:
        """`on_able(able, why)` is told each change. `hang_seconds`: with work and no step for so long, or silent for
        so long, the engine is killed. `load_seconds`: so long it may be silent while loading."""
        self._settings = settings
        self._on_able = on_able
        self._hang_seconds = hang_seconds
        self._load_seconds = load_seconds
        self._backoff_seconds = backoff_seconds
        self._engine: EngineProcess | None = None  # set while Ready
        self._process: EngineProcess | None = None
        self._streams: dict[str, EngineStream] = {}
        self._supervisor: asyncio.Task[None] | None = None
        self._first_ready: asyncio.Future[ModelFacts] | None = None
        self._stopping = False
        self._changed = asyncio.Event()
        self._last_message = 0.0
        self._last_progress = 0.0
        self._loading_told = 0.0
        self._step_seconds: deque[float] = deque(maxlen=64)
        self.facts: ModelFacts | None = None
        self.load: Load | None = None
        self.starts = 0
        self.blocks_left: int | None = None  # blocks in use when the engine said goodbye

    @property
    def able(self) -> bool:
        """Whether an engine is there and takes sequences."""
        return self._engine is not None

    @property
    def pid(self) -> int:
        """Process id of the engine; 0 where there is none."""
        return self._process.pid if self._process is not None else 0

    @property
    def waiting(self) -> int:
        """Sequences handed to the engine and not yet started; includes those that its last report could not know."""
        return sum(not stream.started for stream in self._streams.values())

    @property
    def crowding(self) -> float:
        """What share of its interval a stream waits between two messages: the fewer streams, the less they cost."""
        return min(1.0, max(LEAST_CROWDING, len(self._streams) / CROWD))

    @property
    def waiting_limit(self) -> int:
        return self._settings.scheduler.max_waiting

    @property
    def median_step_seconds(self) -> float:
        """Of the last 64 steps that made tokens; 0 before the first."""
        return statistics.median(self._step_seconds) if self._step_seconds else 0.0

    async def start(self) -> ModelFacts:
        """Starts the engine and waits until it is ready. Raises EngineLost if the first one ends while loading."""
        self._first_ready = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise())
        return await self._first_ready

    async def stop(self) -> None:
        """Ends the engine: the step under way is finished, streams still open are lost."""
        self._stopping = True
        if self._supervisor is None:
            return
        if self._engine is not None:
            self._engine.send(Stop())
            await asyncio.wait({self._supervisor}, timeout=STOP_SECONDS)
        self._supervisor.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._supervisor

    def submit(self, request: Submit, arrived: asyncio.Event | None = None, *, interval: float = 0.0) -> EngineStream:
        """Hands a sequence to the engine. `prompt` is not empty and its ids are in the vocabulary.

        `arrived` and `interval` (seconds): see EngineStream. Raises EngineLost where no engine is ready.
        """
        if self._engine is None or self._stopping:
            raise EngineLost("the engine is not ready")
        if not request.prompt or request.limits.max_tokens < 1:
            raise ValueError("a sequence has a token before it and at least one behind")
        stream = EngineStream(self, request.id, arrived or asyncio.Event(), interval=interval)
        if not self._streams:
            self._last_progress = time.monotonic()  # until now there was no work to make progress on
        self._streams[request.id] = stream
        self._engine.send(request)
        return stream

    def send_cancel(self, sequence_id: str) -> None:
        if self._engine is not None:
            self._engine.send(Cancel(id=sequence_id))

    def forget(self, sequence_id: str) -> None:
        self._streams.pop(sequence_id, None)

    def wake_watchers(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def watch(self) -> AsyncGenerator[None, None]:
        """Yields at once, then whenever `able` or `load` changed (at most 20 times a second), and every second."""
        while True:
            changed = self._changed
            yield
            await asyncio.sleep(WATCH_PAUSE_SECONDS)
            with contextlib.suppress(TimeoutError):  # no wait_for: Python 3.11's may swallow a cancel
                async with asyncio.timeout(WATCH_WAIT_SECONDS - WATCH_PAUSE_SECONDS):
                    await changed.wait()

    # One engine after another

    async def _supervise(self) -> None:
        pause = self._backoff_seconds
        while True:
            began = time.monotonic()
            why = await self._live_once()
            if self._first_ready is not None and not self._first_ready.done():
                self._first_ready.set_exception(EngineLost(why))
                return
            if self._stopping:
                return
            log.error("engine lost", why=why, starts=self.starts, pause=pause)
            if time.monotonic() - began > LONG_LIFE_SECONDS:
                pause = self._backoff_seconds
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_BACKOFF_SECONDS)

    async def _live_once(self) -> str:
        """From the start of an engine to its end; says how it ended."""
        try:
            engine = EngineProcess(self._settings)
        except (OSError, zmq.ZMQError):  # no room for its folder or sockets; there may be later
            log.exception("engine cannot be started")
            return "the engine could not be started"
        self._last_message = time.monotonic()
        self.starts += 1
        why = "the engine was stopped"
        try:
            await engine.start()
            self._process = engine
            why = await self._until_gone(engine)
        except Exception:  # no process to be had, or words that are none: the next engine may do better
            log.exception("engine cannot be started or understood")
            why = "the engine could not be started"
        finally:
            self._engine = self._process = self.load = None
            self._lose_streams(why)
            await engine.close()
            if not self._stopping:
                await self._tell(able=False, why=why)
        return why

    async def _until_gone(self, engine: EngineProcess) -> str:
        tasks = {asyncio.create_task(coroutine) for coroutine in (self._read(engine), self._exit(engine), self._hang())}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, engine: EngineProcess) -> str:
        while not isinstance(message := await engine.receive(), Goodbye):
            await self._take(engine, message)
        self.blocks_left = message.blocks_in_use
        return "the engine was stopped"

    async def _exit(self, engine: EngineProcess) -> str:
        code = await engine.wait()
        await asyncio.sleep(LAST_WORDS_SECONDS)
        return f"the engine ended with code {code}"

    async def _hang(self) -> str:
        """Returns when the engine is silent, or has work and makes no step. Time in which this process did not run
        either does not count: it has not heard what was said, and the engine may have been kept waiting as it was."""
        pause = min(1.0, self._hang_seconds / 4)
        while True:
            slept = time.monotonic()
            await asyncio.sleep(pause)
            now = time.monotonic()
            if (stalled := now - slept - pause) > pause:
                log.warning("the front was kept waiting", seconds=round(stalled, 3))
                self._last_message += stalled
                self._last_progress += stalled
                continue
            if self._engine is None:
                if now - self._last_message > self._load_seconds:
                    return "the engine made no progress while loading"
            elif now - self._last_message > self._hang_seconds:
                return "the engine fell silent"
            elif self._streams and now - self._last_progress > self._hang_seconds:
                return "the engine made no step"

    # What it says

    async def _take(self, engine: EngineProcess, message: Loading | Ready | StepReport) -> None:
        self._last_message = time.monotonic()
        match message:
            case StepReport():
                self._take_report(message)
            case Loading():
                self._tell_loading(message)
            case Ready():
                self._engine, self.facts, self.load = engine, message.facts, _idle(message.facts)
                self._last_progress = self._last_message
                log.info("engine ready", seconds=round(message.seconds, 3), blocks=message.facts.total_blocks)
                if self._first_ready is not None and not self._first_ready.done():
                    self._first_ready.set_result(message.facts)
                await self._tell(able=True, why="")

    def _tell_loading(self, progress: Loading) -> None:
        """Both ends of each stage, and now and then between them."""
        if progress.done not in (0, progress.total) and self._last_message < self._loading_told + LOADING_TOLD_SECONDS:
            return
        self._loading_told = self._last_message
        log.info("engine loading", stage=progress.stage, done=progress.done, total=progress.total)

    def _take_report(self, report: StepReport) -> None:
        if self.load is None or report.load.steps_total != self.load.steps_total:
            self._last_progress = self._last_message
        if report.tokens:
            self._step_seconds.append(report.step_seconds)
        self.load = report.load
        for events in (report.started, report.tokens, report.scored, report.embedded, report.finished):
            for event in events:
                stream = self._streams.get(event.id)
                if stream is not None:
                    stream.push(event)
        for end in report.finished:
            self.forget(end.id)
        self.wake_watchers()

    async def _tell(self, *, able: bool, why: str) -> None:
        self.wake_watchers()
        await self._on_able(able, why)

    def _lose_streams(self, why: str) -> None:
        for stream in self._streams.values():
            stream.lose(EngineLost(why))
        self._streams.clear()


def _idle(facts: ModelFacts) -> Load:
    """The load of an engine that is ready and has not reported yet: watchers must not take it for a full one."""
    return Load(
        running=0,
        waiting=0,
        free_blocks=facts.total_blocks,
        total_blocks=facts.total_blocks,
        pending_prefill_tokens=0,
        cached_blocks=0,
        digest=b"",
        steps_total=0,
        preemptions_total=0,
        cancelled_total=0,
        freed_after_cancel_total=0,
        out_of_memory_total=0,
        non_finite_total=0,
    )

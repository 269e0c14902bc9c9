"""The engine process: `python -m meshlm.worker.engine.process SETTINGS`, started by `front/engine_process.py`.

It loads the model, then turns messages into steps until it is told to stop or its parent is gone. Signals from a
terminal or an init system reach the whole group; they are ignored here, for the front decides when streams end.
An unexpected exception is logged by type and place, and the process ends with code 1.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import structlog
import zmq

from meshlm.chassis import logs
from meshlm.chassis.config import TelemetryConfig
from meshlm.worker.engine.engine import Engine
from meshlm.worker.engine.scheduler import SchedulerSettings
from meshlm.worker.engine.sequence import Runner
from meshlm.worker.fake import FakeRunner, FakeSettings
from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.messages import Cancel, FromEngine, Goodbye, Loading, Ready, Stop, Submit, ToEngine

if TYPE_CHECKING:
    from meshlm.worker.engine.settings import LoadProgress, RunnerSettings

HEARTBEAT_SECONDS = 1.0
GOODBYE_MS = 2000  # time for the last messages to leave
GATHER_SECONDS = 0.0002  # that an idle engine waits for what comes with the first message, and again while more comes
GATHER_ROUNDS = 10
PR_SET_PDEATHSIG = 1

log = structlog.get_logger()


class ProcessSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the front gives the engine to start with, as JSON in the only argument."""

    inbox: str  # zmq address; the front binds, and pushes ToEngine
    outbox: str  # zmq address; the front binds, and pulls FromEngine
    parent: int  # process id of the front
    kind: Literal["model", "fake"]
    runner: dict[str, Any]  # RunnerSettings or FakeSettings
    scheduler: SchedulerSettings
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"


class Line:
    """The engine's end of the two sockets. Nothing is dropped and nothing blocks: the front reads all the time."""

    def __init__(self, settings: ProcessSettings) -> None:
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._outbox = self._context.socket(zmq.PUSH)
        self._inbox.set_hwm(0)
        self._outbox.set_hwm(0)
        self._outbox.linger = GOODBYE_MS
        self._inbox.connect(settings.inbox)
        self._outbox.connect(settings.outbox)
        self._decode = msgspec.msgpack.Decoder[ToEngine](ToEngine).decode
        self._encode = msgspec.msgpack.Encoder().encode

    def send(self, message: FromEngine) -> None:
        self._outbox.send(self._encode(message))

    def receive(self, wait_seconds: float) -> list[ToEngine]:
        """All messages that are there; waits for a first one so long at most."""
        messages: list[ToEngine] = []
        wait_ms = round(wait_seconds * 1000)
        while self._inbox.poll(0 if messages else wait_ms):
            messages.append(self._decode(self._inbox.recv()))
        return messages

    def close(self) -> None:
        self._context.destroy(linger=GOODBYE_MS)


def serve(engine: Engine, line: Line, parent: int) -> None:
    """Steps while there is work; without work it sleeps on the socket, and reports once a second as a heartbeat."""
    while os.getppid() == parent:
        for message in line.receive(0.0) if engine.busy else arrivals(line.receive):
            match message:
                case Submit():
                    engine.submit(message)
                case Cancel():
                    engine.cancel(message.id)
                case Stop():
                    line.send(engine.close())
                    line.send(Goodbye(blocks_in_use=engine.blocks_in_use))
                    return
        line.send(engine.step())


def arrivals(receive: Callable[[float], list[ToEngine]], sleep: Callable[[float], None] = time.sleep) -> list[ToEngine]:
    """What comes to an idle engine: waits HEARTBEAT_SECONDS at most for the first message, then briefly for its
    company.

    So prompts that come together are computed together. Else the first of them would begin alone, and its stream wait
    for its second token until all the others are computed: they would have missed its step by less than a millisecond.
    """
    messages = fresh = receive(HEARTBEAT_SECONDS)
    for _ in range(GATHER_ROUNDS):
        if not any(isinstance(message, Submit) for message in fresh):
            break
        sleep(GATHER_SECONDS)
        fresh = receive(0.0)
        messages = messages + fresh
    return messages


def load(settings: ProcessSettings, line: Line) -> Runner:
    """The runner that the settings name. What runs models is imported here, so that a fake starts in a moment."""

    def progress(stage: str, done: int, total: int) -> None:
        line.send(Loading(stage=stage, done=done, total=total))

    progress("load", 0, 1)
    if settings.kind == "fake":
        return FakeRunner(msgspec.convert(settings.runner, FakeSettings))
    from meshlm.worker.engine.settings import SettingsError, runner_settings

    try:
        return _load_model(runner_settings(settings.runner), settings, progress)
    except (ModelFileError, SettingsError) as error:
        log.error("the model cannot be run", reason=str(error))  # no prompt can be in there
        raise


def _load_model(runner: RunnerSettings, settings: ProcessSettings, progress: LoadProgress) -> Runner:
    """What computes natively stays free of torch: another process reads the model."""
    from meshlm.worker.engine.loaded import loading
    from meshlm.worker.engine.native_load import native_library, native_runner

    library = native_library(runner)
    if library is not None:
        with loading(settings.runner, settings.log_level, settings.log_format) as model:
            return native_runner(runner, model, library, progress)
    from meshlm.worker.engine.load import load_torch_runner

    return load_torch_runner(runner, progress)


def tie_to_parent(parent: int) -> None:
    """The kernel kills this process when the front dies, however it dies (Linux; elsewhere `serve` watches)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        sys.exit(1)


def main() -> None:
    settings = msgspec.json.decode(sys.argv[1], type=ProcessSettings)
    tie_to_parent(settings.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logs.configure("engine", TelemetryConfig(log_level=settings.log_level, log_format=settings.log_format))
    line = Line(settings)
    try:
        began = time.monotonic()
        engine = Engine(load(settings, line), settings.scheduler)
        gc.collect()
        gc.freeze()  # the model's objects stay for ever: the collector need not walk them between steps
        line.send(Ready(facts=engine.runner.facts, seconds=time.monotonic() - began))
        serve(engine, line, settings.parent)
    except Exception:
        log.exception("the engine failed")
        sys.exit(1)
    finally:
        line.close()


if __name__ == "__main__":
    main()

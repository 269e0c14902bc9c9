"""A model that another process reads: what an engine that computes natively gets through a pipe from
`loading_process.py`.

Reading, quantizing and packing need torch: some 190 MB that no step needs. So a process of its own does them, and is
gone when the engine begins to serve. Each matrix is sent as soon as it is packed, and read to where it stays: nobody
holds the model twice.

The pipe carries pickles of the classes below, and behind each `MatrixSent` the matrix's bytes.
"""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import msgspec

from meshlm.kernels.native.memory import Arena
from meshlm.kernels.native.packed import Format, PackedMatrix
from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.models.config import ModelConfig
from meshlm.worker.models.decoder import Decoder, Progress

MATRIX, VECTOR = "matrix", "vector"  # kinds of persistent ids in the pickle of a decoder: number, array


@dataclass(frozen=True, slots=True)
class Opened:
    """The first message; see `NativeSource`."""

    config: ModelConfig
    quantization: str
    threads: int


@dataclass(frozen=True, slots=True)
class MatrixSent:
    """The next matrix; they are numbered from 0."""

    format: Format
    rows: int
    cols: int


@dataclass(frozen=True, slots=True)
class LayersDone:
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class DecoderSent:
    """The last message: a pickle with persistent ids, see `_Unpickler`."""

    pickled: bytes


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The last message where the model cannot be read: a ModelFileError's path and reason."""

    path: str
    reason: str


class LoadingSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the loading process is given, as JSON in its only argument."""

    outbox: int  # the descriptor of the pipe
    parent: int  # process id of the engine
    runner: dict[str, Any]  # RunnerSettings
    log_level: str
    log_format: str


class LoadingFailedError(RuntimeError):
    """The loading process ended before the model was read. What happened stands in its own log line."""


class LoadedModel:
    """A `NativeSource` at the reading end of the pipe."""

    def __init__(self, pipe: BinaryIO) -> None:
        """Waits until the model is opened. Raises ModelFileError and LoadingFailedError, as `decoder` does."""
        self._pipe = pipe
        opened = self._next()
        if not isinstance(opened, Opened):
            raise LoadingFailedError(f"the loading process began with {type(opened).__name__}")
        self.config, self.quantization, self.threads = opened.config, opened.quantization, opened.threads

    def decoder(self, progress: Progress) -> Decoder[PackedMatrix]:
        """Vectors of it are arrays of numpy."""
        arena, matrices = Arena(), list[PackedMatrix]()
        while True:
            match self._next():
                case MatrixSent(form, rows, cols):
                    matrix = PackedMatrix(form, rows, cols, arena)
                    self._fill(matrix.memory)
                    matrices.append(matrix)
                case LayersDone(done, total):
                    progress(done, total)
                case DecoderSent(pickled):
                    decoder: Decoder[PackedMatrix] = _Unpickler(pickled, matrices).load()
                    return decoder

    def _next(self) -> object:
        try:
            message = pickle.load(self._pipe)  # noqa: S301  our own process wrote it
        except (EOFError, pickle.UnpicklingError):
            raise LoadingFailedError("the loading process ended early") from None
        if isinstance(message, Unreadable):
            raise ModelFileError(message.path, message.reason)
        return message

    def _fill(self, memory: memoryview) -> None:
        filled = 0
        while filled < len(memory):
            count = self._pipe.readinto(memory[filled:])  # type: ignore[attr-defined]
            if not count:
                raise LoadingFailedError("the loading process ended in the middle of a matrix")
            filled += count


class _Unpickler(pickle.Unpickler):
    """A matrix is named by its number, a vector by its values."""

    def __init__(self, pickled: bytes, matrices: list[PackedMatrix]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._matrices = matrices

    def persistent_load(self, pid: tuple[str, Any]) -> Any:
        kind, what = pid
        return self._matrices[what] if kind == MATRIX else what


@contextmanager
def loading(runner: dict[str, Any], log_level: str, log_format: str) -> Iterator[LoadedModel]:
    """Starts the loading process, which has ended when this is left. Raises ModelFileError and LoadingFailedError."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", 1 << 16) as pipe:
        try:
            settings = LoadingSettings(
                outbox=writing, parent=os.getpid(), runner=runner, log_level=log_level, log_format=log_format
            )
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "meshlm.worker.engine.loading_process",
                    msgspec.json.encode(settings).decode(),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=(writing,),
            )
        finally:
            os.close(writing)  # so that the pipe ends where the process ends
        with process:
            try:
                yield LoadedModel(pipe)
            finally:
                process.kill()

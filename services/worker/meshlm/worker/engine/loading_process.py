"""The loading process: `python -m meshlm.worker.engine.loading_process SETTINGS`, started by an engine that computes
natively (`loaded.py`). It reads, quantizes and packs a model, sends it, and ends.

Like the engine it ignores signals from a terminal or an init system, and dies with its parent. An unexpected exception
is logged by type and place, and the process ends with code 1.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
from typing import Any, BinaryIO

import msgspec
import structlog
import torch

from meshlm.chassis import logs
from meshlm.chassis.config import TelemetryConfig
from meshlm.worker.engine.load import OpenedModel
from meshlm.worker.engine.loaded import (
    MATRIX,
    VECTOR,
    DecoderSent,
    LayersDone,
    LoadingSettings,
    MatrixSent,
    Opened,
    Unreadable,
)
from meshlm.worker.engine.native_load import native_library
from meshlm.worker.engine.process import tie_to_parent
from meshlm.worker.engine.settings import RunnerSettings, runner_settings
from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.models.registry import load_decoder

log = structlog.get_logger()


class SentMatrix:
    """What stands for a matrix that is the engine's now."""

    def __init__(self, number: int) -> None:
        self.number = number


class SentWeights:
    """`Weights` that are sent and forgotten, one after the other."""

    def __init__(self, model: OpenedModel, pipe: BinaryIO) -> None:
        self._weights = model.weights
        self._pipe = pipe
        self._sent = 0

    def matrix(self, name: str, rows: int, cols: int) -> SentMatrix:
        matrix = self._weights.matrix(name, rows, cols)
        send(self._pipe, MatrixSent(matrix.format, rows, cols))
        self._pipe.write(matrix.memory)
        self._sent += 1
        return SentMatrix(self._sent - 1)

    def vector(self, name: str, *shape: int) -> torch.Tensor:
        return self._weights.vector(name, *shape)

    def has(self, name: str) -> bool:
        return self._weights.has(name)


class _Pickler(pickle.Pickler):
    """See `loaded.py`."""

    def persistent_id(self, value: Any) -> tuple[str, Any] | None:
        if isinstance(value, SentMatrix):
            return MATRIX, value.number
        if isinstance(value, torch.Tensor):
            return VECTOR, value.float().numpy()
        return None


def send(pipe: BinaryIO, message: object) -> None:
    pickle.dump(message, pipe)
    pipe.flush()


def send_model(settings: RunnerSettings, pipe: BinaryIO) -> None:
    """Raises ModelFileError, and OSError where the engine is gone."""
    library = native_library(settings)
    if library is None:
        raise ValueError(f"the engine {settings.engine!r} on {settings.device!r} does not compute natively")
    model = OpenedModel.of(settings, library)
    send(pipe, Opened(model.config, model.quantization, model.threads))
    decoder = load_decoder(
        model.checkpoint, SentWeights(model, pipe), lambda done, total: send(pipe, LayersDone(done, total))
    )
    pickled = io.BytesIO()
    _Pickler(pickled).dump(decoder)
    send(pipe, DecoderSent(pickled.getvalue()))


def main() -> None:
    settings = msgspec.json.decode(sys.argv[1], type=LoadingSettings)
    tie_to_parent(settings.parent)
    telemetry = msgspec.convert({"log_level": settings.log_level, "log_format": settings.log_format}, TelemetryConfig)
    logs.configure("engine", telemetry)
    with os.fdopen(settings.outbox, "wb") as pipe:
        try:
            send_model(runner_settings(settings.runner), pipe)
        except ModelFileError as error:
            send(pipe, Unreadable(str(error.path), error.reason))
        except Exception:
            log.exception("the model could not be loaded")
            sys.exit(1)


if __name__ == "__main__":
    main()

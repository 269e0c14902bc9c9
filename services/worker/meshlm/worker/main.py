"""The worker's composition root: `python -m meshlm.worker.main`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import structlog

from meshlm.chassis import server
from meshlm.chassis.config import ServerConfig, Source, TelemetryConfig, masked
from meshlm.chassis.life import Life
from meshlm.v1 import worker_pb2_grpc
from meshlm.worker.config import WorkerConfig
from meshlm.worker.fake_tokenizer import fake_tokenizer
from meshlm.worker.front.engine_client import EngineClient
from meshlm.worker.front.engine_process import EngineSettings
from meshlm.worker.front.measures import Measures
from meshlm.worker.front.prompts import Prompts
from meshlm.worker.front.service import ServedModel, WorkerServicer
from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.loading.revision import model_revision
from meshlm.worker.messages import ModelFacts
from meshlm.worker.text.tokenizer import Tokenizer

log = structlog.get_logger()

SERVICE = "meshlm.v1.WorkerService"


class WorkerService:
    name = "worker"
    background_methods = frozenset({f"/{SERVICE}/WatchLoad"})

    def __init__(self, config: WorkerConfig, telemetry: TelemetryConfig) -> None:
        self._config = config
        self._life: Life | None = None
        settings = EngineSettings(
            kind="fake" if config.engine == "fake" else "model",
            runner=config.runner,
            scheduler=config.scheduler,
            log_level=telemetry.log_level,
            log_format=telemetry.log_format,
        )
        self._client = EngineClient(
            settings,
            on_able=self._on_able,
            hang_seconds=config.hang_seconds,
            load_seconds=config.load_seconds,
        )
        self._servicer = WorkerServicer(config, self._client, Measures(self._client, config.model_name))

    def register(self, grpc_server: grpc.aio.Server) -> Sequence[str]:
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self._servicer, grpc_server)
        return [SERVICE]

    async def start(self, life: Life) -> None:
        """Loads text and weights at the same time. Raises ModelFileError and EngineLost."""
        self._life = self._servicer.life = life
        try:
            (prompts, digest), facts = await asyncio.gather(asyncio.to_thread(self._read_model), self._client.start())
        except ModelFileError as error:
            log.error("the model cannot be read", path=str(error.path), reason=error.reason)
            raise
        self._servicer.model = ServedModel(prompts, facts, self._revision(digest, facts))
        self._client.wake_watchers()

    async def drain(self) -> None:
        """Watchers hear at once that this worker ends."""
        self._client.wake_watchers()

    async def stop(self) -> None:
        await self._client.stop()

    async def _on_able(self, able: bool, why: str) -> None:
        if self._life is not None:
            await self._life.set_able(able, why)

    def _read_model(self) -> tuple[Prompts, str]:
        if self._config.model_path is None:
            return Prompts(fake_tokenizer()), "fake"
        tokenizer = Tokenizer.load(self._config.model_path)
        return Prompts(tokenizer), model_revision(self._config.model_path, self._config.cache_dir)

    def _revision(self, digest: str, facts: ModelFacts) -> str:
        """Weights that are rounded while loading give other answers, so they have another revision."""
        rounded = [name for name in (facts.quantization, self._config.dtype) if name not in ("none", "float32")]
        return "-".join([digest[:16], *rounded])


def build(source: Source) -> tuple[WorkerService, ServerConfig, Callable[[], dict[str, Any]]]:
    config = source.section("worker", WorkerConfig)
    service = WorkerService(config, source.section("telemetry", TelemetryConfig))
    return service, config.server, lambda: {"worker": masked(config)}


def main() -> None:
    server.main("worker", build)


if __name__ == "__main__":
    main()

"""`python -m meshlm.guard.main`: the guard's process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from meshlm.chassis import server
from meshlm.chassis.config import ConfigError, ServerConfig, Source, masked
from meshlm.guard.artefact import ArtefactError
from meshlm.guard.scores import read_config
from meshlm.guard.service import GuardService


def build(source: Source) -> tuple[GuardService, ServerConfig, Callable[[], dict[str, Any]]]:
    """Raises ConfigError."""
    config = read_config(source)
    try:
        service = GuardService(config, source.path)
    except ArtefactError as error:
        raise ConfigError(f"guard.model_file: {error}") from None
    return service, config.server, lambda: {"guard": masked(config)}


if __name__ == "__main__":
    server.main("guard", build)

"""`python -m meshlm.cache.main`: the cache's process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from meshlm.cache.config import CacheConfig
from meshlm.cache.service import CacheService
from meshlm.chassis import server
from meshlm.chassis.config import ConfigError, ServerConfig, Source, StateConfig, masked


def build(source: Source) -> tuple[CacheService, ServerConfig, Callable[[], dict[str, Any]]]:
    """Raises ConfigError."""
    config = source.section("cache", CacheConfig)
    state = source.section("state", StateConfig)
    if not state.redis_url:
        raise ConfigError("state.redis_url: required; the launcher starts a private server and sets it")
    return CacheService(config, state), config.server, lambda: {"cache": masked(config), "state": masked(state)}


if __name__ == "__main__":
    server.main("cache", build)

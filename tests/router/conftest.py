"""A real Valkey for the ledger, and a router amid fake peers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from meshlm.router.config import KeyConfig
from tests.router.mesh import Mesh, key
from tests.router.names import fleet as fleet  # a fixture
from tests.router.valkey import run_valkey


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with run_valkey(tmp_path_factory.mktemp("valkey")) as (url, _):
        yield url


@pytest.fixture
async def state(valkey: str) -> AsyncIterator[Redis]:
    client: Redis = Redis.from_url(valkey, socket_timeout=60)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
def holder() -> KeyConfig:
    return key()


@pytest.fixture
def router_config() -> dict[str, Any]:
    return {}


@pytest.fixture
async def mesh(tmp_path: Path, state: Redis, router_config: dict[str, Any], holder: KeyConfig) -> AsyncIterator[Mesh]:
    made = Mesh(tmp_path, state, router_config, holder)
    await made.start()
    yield made
    await made.stop()

from __future__ import annotations

import time
from pathlib import Path

import pytest
import redis

from meshlm.chassis.config import StateConfig
from meshlm.chassis.state import connect


@pytest.mark.parametrize("url", ["unix://{folder}/none", "redis://127.0.0.1:1/0"])
async def test_a_server_that_is_not_there_fails_at_once_and_is_not_tried_again(tmp_path: Path, url: str) -> None:
    client = connect(StateConfig(redis_url=url.format(folder=tmp_path), timeout_seconds=60))
    begun = time.monotonic()
    with pytest.raises((redis.RedisError, OSError)):
        await client.get("x")
    assert time.monotonic() - begun < 60
    await client.aclose()


async def test_a_cluster_that_is_not_there_fails_as_a_server_does() -> None:
    """Callers go on without: they know RedisError, which the library's own error here is not."""
    client = connect(StateConfig(redis_url="redis://127.0.0.1:1/0", cluster=True, timeout_seconds=60))
    with pytest.raises((redis.RedisError, OSError)):
        await client.get("x")
    with pytest.raises((redis.RedisError, OSError)):
        await client.register_script("return 1")(keys=["{t}:x"])
    await client.aclose()


def test_a_cluster_on_a_unix_socket_is_refused_for_its_nodes_could_not_name_each_other() -> None:
    with pytest.raises(ValueError, match="cluster"):
        StateConfig(redis_url="unix:///run/valkey", cluster=True)

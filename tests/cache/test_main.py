"""What the cache's process is built from."""

from __future__ import annotations

import pytest

from meshlm.cache.main import build
from meshlm.chassis.config import ConfigError, Source


async def test_the_process_is_built_from_its_sections_and_hides_the_password() -> None:
    tree = {"cache": {"ttl_seconds": 5}, "state": {"redis_url": "redis://u:secret@host:1/0"}}
    service, server, describe = build(Source(tree, {}))
    assert server.listen == "127.0.0.1:50081"
    assert describe()["cache"]["ttl_seconds"] == 5.0
    assert "secret" not in str(describe())
    await service.stop()


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({}, "state.redis_url"),
        ({"cache": {"ttl_seconds": 0}}, "cache: ttl_seconds"),
        ({"cache": {"ttl": 1}}, "cache.ttl"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_by_its_path(tree: dict[str, object], path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        build(Source(tree, {}))

"""The connection to the shared Redis or Valkey."""

from __future__ import annotations

from typing import Any, cast

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException, RedisError

from meshlm.chassis.config import StateConfig
from meshlm.chassis.shared_redis import SharedRedis


class _Cluster(RedisCluster):
    async def initialize(self, *arguments: Any, **more: Any) -> RedisCluster:
        """Find the nodes. Where none answers, this class of the library raises what is no RedisError."""
        try:
            return await super().initialize(*arguments, **more)
        except RedisClusterException as error:
            raise RedisError(str(error)) from None


def connect(config: StateConfig) -> Redis:
    """A client for all callers of the process, which share a connection; in a cluster, it opens them as it needs them.

    Every command is bounded by `timeout_seconds` and none is retried, for that would eat the caller's time: callers
    go on without. Of use are commands and scripts over keys of one hash tag, which a cluster's client runs as well.
    """
    limits: dict[str, Any] = {"socket_timeout": config.timeout_seconds, "retry": Retry(NoBackoff(), 0)}
    if not config.redis_url.startswith("unix:"):  # a unix socket connects at once or not at all, and takes no limit
        limits["socket_connect_timeout"] = config.timeout_seconds
    if config.cluster:
        return cast(Redis, _Cluster.from_url(config.redis_url, **limits))
    client: Redis = SharedRedis.from_url(config.redis_url, **limits)
    return client

"""Channels to other services: keepalive, message sizes, and retries for what is safe to retry."""

from __future__ import annotations

import json
from collections.abc import Sequence

import grpc

# Shorter than common load balancers' idle timeouts; servers of the mesh accept it (see server.py).
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
]


def open_channel(
    target: str, *, retryable: Sequence[tuple[str, str]] = (), max_receive_bytes: int = 16 * 1024 * 1024
) -> grpc.aio.Channel:
    """A channel to `target` (host:port, dns:///..., unix:PATH).

    `retryable` names (service, method) pairs that have no effect beyond their answer: they are tried up to three
    times when the peer is unavailable, within the call's deadline. Nothing else is ever retried.
    """
    options = [
        *_KEEPALIVE,
        ("grpc.max_receive_message_length", max_receive_bytes),
        ("grpc.service_config", _service_config(retryable)),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 2_000),  # how long one attempt may take, whatever its name says
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # What a reader has not taken waits at the sender, who sends it in fewer messages then: without a probe of the
        # bandwidth, which ends at megabytes, a stream holds back 64 KiB on its way.
        ("grpc.http2.bdp_probe", 0),
        # Two services on one machine must not share a connection's fate.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    return grpc.aio.insecure_channel(target, options=options)


def _service_config(retryable: Sequence[tuple[str, str]]) -> str:
    if not retryable:
        return "{}"
    policy = {
        "maxAttempts": 3,
        "initialBackoff": "0.05s",
        "maxBackoff": "0.5s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    names = [{"service": service, "method": method} for service, method in retryable]
    throttling = {"maxTokens": 10, "tokenRatio": 0.1}
    return json.dumps({"methodConfig": [{"name": names, "retryPolicy": policy}], "retryThrottling": throttling})

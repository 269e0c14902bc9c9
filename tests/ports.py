"""Ports for servers that a test starts in other processes."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 10_240


def free_ports(count: int) -> list[int]:
    """So many different TCP ports of 127.0.0.1 that nobody has, drawn at random.

    They lie below those that the system gives to connections and to whoever binds port 0: one of those, given and
    closed again, may be somebody else's before the server takes it.
    """
    ephemeral = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32_768
    highest = ephemeral if ephemeral > 2 * _LOWEST else 65_536
    draw, found = random.SystemRandom(), set[int]()
    while len(found) < count:
        port = draw.randrange(_LOWEST, highest)
        if _is_free(port):
            found.add(port)
    return list(found)


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True

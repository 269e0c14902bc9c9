"""The admin port by itself; what it tells of a running service is in test_server.py."""

from __future__ import annotations

import asyncio
import socket
import urllib.request

import pytest

from meshlm.chassis.admin import AdminPort
from meshlm.chassis.life import Life


async def test_it_listens_on_ipv6_too() -> None:
    try:
        with socket.socket(socket.AF_INET6) as trial:
            trial.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 here")
    admin = AdminPort("[::1]:0", Life(), dict)
    admin.start()
    try:
        body = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://[::1]:{admin.port}/livez").read())
    finally:
        await asyncio.to_thread(admin.stop)
    assert body == b"alive\n"

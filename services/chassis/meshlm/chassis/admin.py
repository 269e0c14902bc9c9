"""The admin port: plain HTTP for Prometheus, probes and people; never on the data path."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import prometheus_client

from meshlm.chassis.life import Life


class AdminPort:
    """`/metrics` (Prometheus), `/livez`, `/readyz` (503 unless serving) and `/config` (secrets hidden)."""

    def __init__(self, listen: str, life: Life, describe: Callable[[], dict[str, Any]]) -> None:
        self._server: ThreadingHTTPServer | None = None
        if not listen:
            return
        host, _, port = listen.rpartition(":")
        kind = _ServerV6 if host.startswith("[") else ThreadingHTTPServer
        self._server = kind((host.strip("[]"), int(port)), _handler(life, describe))
        self._server.daemon_threads = True

    @property
    def port(self) -> int | None:
        return self._server.server_port if self._server is not None else None

    def start(self) -> None:
        if self._server is not None:
            Thread(target=self._server.serve_forever, name="admin", daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


class _ServerV6(ThreadingHTTPServer):
    address_family = socket.AF_INET6


def _handler(life: Life, describe: Callable[[], dict[str, Any]]) -> type[BaseHTTPRequestHandler]:
    def metrics() -> tuple[int, str, bytes]:
        return 200, prometheus_client.CONTENT_TYPE_LATEST, prometheus_client.generate_latest()

    def alive() -> tuple[int, str, bytes]:
        return 200, "text/plain", b"alive\n"

    def ready() -> tuple[int, str, bytes]:
        return (200, "text/plain", b"ready\n") if life.serving else (503, "text/plain", f"{life.why}\n".encode())

    def config() -> tuple[int, str, bytes]:
        return 200, "application/json", json.dumps(describe(), indent=2).encode()

    routes = {"/metrics": metrics, "/livez": alive, "/readyz": ready, "/config": config}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            route = routes.get(self.path.partition("?")[0])
            status, kind, body = route() if route else (404, "text/plain", b"not found\n")
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base class names it so
            """Probes and scrapes are not worth a line."""

    return Handler

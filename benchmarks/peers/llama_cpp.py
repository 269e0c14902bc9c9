"""Peer: llama.cpp's server over HTTP, with continuous batching and its prompt cache. Argument: a GGUF file.

The wheel is built for AVX2. On two Zen 4 cores a build for AVX-512 and VNNI from source gave the same with Q4_1, and
with Q8_0 the same at batch 1, 1.4x in prefill and 1.3x at 16: not enough to be the best peer anywhere.
"""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio import StreamReader
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import xllamacpp
from protocol import THREADS, Run, serve

SLOTS = 16
# Of each slot: the longest request, 2,000 tokens and its answer.
CONTEXT = 2304


class Server:
    def __init__(self, model: str) -> None:
        settings = xllamacpp.CommonParams()
        settings.model.path = model
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = THREADS
        settings.n_parallel, settings.n_ctx, settings.kv_unified = SLOTS, SLOTS * CONTEXT, False
        settings.cont_batching = settings.cache_prompt = True
        settings.endpoint_metrics = False
        settings.port = 0
        self._server = xllamacpp.Server(settings)
        address = urlsplit(self._server.listening_address)
        self._host, self._port = address.hostname, address.port

    def run(self, work: Run) -> None:
        asyncio.run(self._run(work))

    async def _run(self, work: Run) -> None:
        async with asyncio.TaskGroup() as group:

            def advance() -> None:
                for index in work.due():
                    group.create_task(self._stream(work, index, advance))

            advance()

    async def _stream(self, work: Run, index: int, advance: Callable[[], None]) -> None:
        """One request; text is held back until its bytes are whole characters, so an event may bring several tokens."""
        body = json.dumps(
            {
                "prompt": work.prompts[index], "n_predict": work.new[index], "temperature": 0, "ignore_eos": True,
                "cache_prompt": True, "stream": True, "return_tokens": True,
            }
        ).encode()  # fmt: skip
        reader, writer = await asyncio.open_connection(self._host, self._port)
        head = (
            f"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        async for event in _events(reader):
            work.came(index, len(event.get("tokens") or ()))
            advance()
            if event.get("stop"):
                break
        writer.close()
        if (missing := work.new[index] - work.count(index)) > 0:
            work.came(index, missing)


async def _events(reader: StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event."""
    async for line in reader:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])
        elif line.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")):
            raise RuntimeError((line + await reader.read()).decode())


def start() -> tuple[dict[str, Any], Any]:
    server = Server(sys.argv[1])
    return {
        "version": f"llama.cpp, xllamacpp {xllamacpp.__version__}",
        "system": xllamacpp.get_system_info(),
    }, server.run


if __name__ == "__main__":
    serve(start)

"""An engine of fixed token rate, as a worker and like an OpenAI server: `fixed_engine.py GRPC_TARGET HTTP_PORT`.

It says what a worker would, from messages that were made beforehand, so that it costs next to nothing beside what is
measured. A request's `labels` (over HTTP its `user`) say how: `each` tokens a message, `ms` between messages.
"""

from __future__ import annotations

import asyncio
import functools
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc

from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2

WORD = "word "
MODEL = "fixed"


@functools.cache
def messages(tokens: int, each: int) -> tuple[bytes, ...]:
    """The serialized messages of an answer."""
    accepted = worker_pb2.GenerationAccepted(prompt_tokens=100, max_tokens=tokens, model_revision="r1")
    usage = pb.Usage(prompt_tokens=100)
    made = [worker_pb2.RunGenerationResponse(accepted=accepted, usage=usage).SerializeToString()]
    for offset in range(0, tokens, each):
        count = min(each, tokens - offset)
        usage.completion_tokens = offset + count
        last = offset + count == tokens
        chunk = pb.Chunk(
            token_offset=offset,
            token_count=count,
            text=WORD * count,
            token_ids=range(offset, offset + count),
            finish_reason=pb.FINISH_REASON_LENGTH if last else pb.FINISH_REASON_UNSPECIFIED,
        )
        made.append(worker_pb2.RunGenerationResponse(chunk=chunk, usage=usage).SerializeToString())
    end = worker_pb2.GenerationEnd(timing=pb.Timing(prefill=0.001))
    made.append(worker_pb2.RunGenerationResponse(end=end, usage=usage).SerializeToString())
    return tuple(made)


async def run_generation(request: worker_pb2.RunGenerationRequest, _: Any) -> AsyncIterator[bytes]:
    labels = request.generation.labels
    pause = float(labels["ms"]) / 1000
    made = messages(request.generation.sampling.max_tokens, int(labels["each"]))
    for number, message in enumerate(made):
        if pause and 1 < number < len(made) - 1:
            await asyncio.sleep(pause)
        yield message


async def watch_load(_: Any, __: Any) -> AsyncIterator[bytes]:
    model = worker_pb2.WorkerModel(name=MODEL, revision="r1", max_context=1 << 20, chat=True)
    state = worker_pb2.WatchLoadResponse(replica="w", region="local", ready=True, model=model, total_blocks=1000)
    state.free_blocks, state.waiting_limit, state.block_size = 1000, 10_000, 16
    while True:
        yield state.SerializeToString()
        await asyncio.sleep(1)


@functools.cache
def events(tokens: int, each: int) -> tuple[bytes, ...]:
    """The answer as server-sent events, in chunks of HTTP."""
    made = []
    for offset in range(0, tokens, each):
        last = offset + each >= tokens
        choice = {"index": 0, "delta": {"role": "assistant", "content": WORD * each},
                  "finish_reason": "length" if last else None}  # fmt: skip
        body = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": [choice]}
        made.append(f"data: {json.dumps(body)}\n\n".encode())
    made.append(b"data: [DONE]\n\n")
    return tuple(b"%x\r\n%s\r\n" % (len(event), event) for event in made)


async def serve_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while (head := await reader.readuntil(b"\r\n\r\n")) != b"":
            sizes = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
            length = int(sizes[0]) if sizes else 0
            body = json.loads(await reader.readexactly(length) or b"{}")
            # The proxy may put another user in its place: then a token a message, without a pause.
            told = str(body.get("user", "")).split(":")
            each, pause = (float(told[0]), float(told[1])) if len(told) == 2 else (1.0, 0.0)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            for number, event in enumerate(events(body.get("max_tokens", 1), int(each))):
                if pause and number:
                    await asyncio.sleep(pause / 1000)
                writer.write(event)
                await writer.drain()
            writer.write(b"0\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main(target: str, port: int) -> None:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 64 << 20)])
    read = worker_pb2.RunGenerationRequest.FromString
    handlers = {
        "RunGeneration": grpc.unary_stream_rpc_method_handler(run_generation, read, None),
        "WatchLoad": grpc.unary_stream_rpc_method_handler(watch_load, worker_pb2.WatchLoadRequest.FromString, None),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("meshlm.v1.WorkerService", handlers)])
    server.add_insecure_port(target)
    await server.start()
    await asyncio.start_server(serve_http, "127.0.0.1", port, limit=64 << 20, backlog=2048)
    print("ready", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))

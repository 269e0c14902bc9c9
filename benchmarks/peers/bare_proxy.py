"""What gRPC for Python costs a router by itself: `bare_proxy.py LISTEN TARGET` passes one call's bytes on as another's.

No parsing, no span, no store: the least that a process between client and worker can take on this machine.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc

from meshlm.chassis.channels import open_channel


async def main(listen: str, target: str) -> None:
    run = open_channel(target, max_receive_bytes=64 << 20).unary_stream("/meshlm.v1.WorkerService/RunGeneration")

    async def pass_on(request: bytes, context: Any) -> None:
        call = run(request, timeout=120)
        while (message := await call.read()) is not grpc.aio.EOF:
            await context.write(message)

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 64 << 20)])
    handlers = {"RunGeneration": grpc.unary_stream_rpc_method_handler(pass_on, None, None)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("meshlm.v1.WorkerService", handlers)])
    server.add_insecure_port(listen)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))

"""What a caller reads of its call."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from meshlm.chassis.errors import MeshError, from_rpc_error


async def collect(call: Any) -> list[Any]:
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


def text_of(responses: list[Any]) -> str:
    return "".join(response.chunk.text for response in responses)


async def failure(call: Any) -> MeshError:
    with pytest.raises(grpc.RpcError) as caught:
        await collect(call)
    return from_rpc_error(caught.value)

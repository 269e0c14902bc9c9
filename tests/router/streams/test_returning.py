"""A caller who comes back for the rest of a stream, amid workers that are away; whole meshes are in tests/mesh."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from meshlm.chassis.errors import MeshError, Reason, from_rpc_error
from meshlm.router.streams.config import StreamsConfig
from meshlm.v1 import inference_pb2
from tests.router.calls import collect, failure, text_of
from tests.router.mesh import Mesh
from tests.waiting import until


@pytest.fixture
def router_config() -> dict[str, Any]:
    return {"streams": StreamsConfig(resumes=0, resume_wait_seconds=0.0, resumable_seconds=600.0)}


async def told(mesh: Mesh, *, ready: bool) -> None:
    """All workers say that they take requests, or that they do not, and the router has heard it."""
    for worker in mesh.workers:
        worker.load.ready = ready
        worker.changed.set()
    await until(lambda: all(replica.usable == ready for replica in mesh.fleet.replicas))


async def test_who_comes_back_before_a_worker_does_is_told_so_and_finds_the_rest_the_next_time(mesh: Mesh) -> None:
    for worker in mesh.workers:
        worker.failure = MeshError(Reason.ENGINE_LOST, "the engine died")
    generation = mesh.generation(sampling={"temperature": 1.0})  # drawn: nobody could make the same anew
    request = inference_pb2.StreamGenerateRequest(generation=generation, resumable=True)
    call, before = mesh.stub.StreamGenerate(request, metadata=mesh.metadata), []
    with pytest.raises(grpc.RpcError) as caught:
        while True:
            before.append(await call.read())
    assert from_rpc_error(caught.value).reason == Reason.ENGINE_LOST
    assert text_of(before) == "Hello"
    request.resume_from, request.resume_of = 1, before[0].start.request_id
    await told(mesh, ready=False)
    for _ in range(2):
        again = await failure(mesh.stub.StreamGenerate(request, metadata=mesh.metadata))
        assert again.reason == Reason.NO_REPLICA
    for worker in mesh.workers:
        worker.failure = None
    await told(mesh, ready=True)
    after = await collect(mesh.stub.StreamGenerate(request, metadata=mesh.metadata))
    assert text_of(after) == " big world"
    assert after[-1].usage.prompt_tokens == 0  # it was paid for

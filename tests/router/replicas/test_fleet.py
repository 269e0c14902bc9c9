"""Which workers a router knows of, and which of them is sent a request, through the real router."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from meshlm.chassis.errors import MeshError, Reason
from meshlm.router.replicas.config import ReplicaConfig
from meshlm.router.replicas.fleet import Fleet
from meshlm.v1 import inference_pb2
from tests.router.calls import collect, failure
from tests.waiting import until


async def test_the_less_loaded_replica_gets_the_request(mesh: Any) -> None:
    mesh.workers[0].load.running = 3
    mesh.workers[0].changed.set()
    await until(lambda: mesh.fleet.replicas[0].state.running == 3)
    for number in range(3):
        responses = await collect(mesh.stream(f"hi {number}"))
        assert responses[0].start.routing.replica == "w1"


async def test_a_draining_replica_gets_none(mesh: Any) -> None:
    mesh.workers[0].load.draining = True
    mesh.workers[0].changed.set()
    await until(lambda: mesh.fleet.replicas[0].state.draining)
    assert list((await collect(mesh.stream()))[0].start.routing.candidates) == ["w1"]


async def test_a_worker_that_falls_silent_is_not_sent_anything(mesh: Any) -> None:
    fleet = Fleet(mesh.config.workers, silence_seconds=0.2)
    fleet.start()
    await until(lambda: all(replica.usable for replica in fleet.replicas))
    mesh.workers[0].mute = True
    await mesh.workers[0].unheard.wait()  # what the last one may have told it before is on its way no more
    await until(lambda: not fleet.replicas[0].usable)
    with contextlib.suppress(TimeoutError):  # its connection stands, and it says nothing: it must not come back
        await until(lambda: fleet.replicas[0].usable, seconds=1.0)
    assert not fleet.replicas[0].usable
    mesh.workers[0].mute = False
    await until(lambda: fleet.replicas[0].usable)
    await fleet.stop()


async def test_a_refusing_replica_passes_the_request_to_the_next(mesh: Any) -> None:
    mesh.workers[0].refusal = MeshError(Reason.OVERLOADED, "full")
    for number in range(4):
        responses = await collect(mesh.stream(f"hi {number}"))
        assert responses[0].start.routing.replica == "w1"
    for worker in mesh.workers:
        worker.refusal = MeshError(Reason.OVERLOADED, "full", retry_after=2)
    error = await failure(mesh.stream("again"))
    assert (error.reason, error.retry_after) == (Reason.OVERLOADED, 2)


async def test_a_request_at_fault_is_not_tried_elsewhere(mesh: Any) -> None:
    for worker in mesh.workers:
        worker.refusal = MeshError(Reason.CONTEXT_TOO_LONG, "too long")
    assert (await failure(mesh.stream())).reason == Reason.CONTEXT_TOO_LONG
    assert sum(len(worker.requests) for worker in mesh.workers) == 1


@pytest.mark.parametrize("why", ["silent", "loading"])
async def test_a_router_answers_nobody_before_its_workers_are_ready(mesh: Any, why: str) -> None:
    mesh.workers[1].mute, mesh.workers[1].load.ready = why == "silent", why != "loading"
    young = Fleet(mesh.config.workers)
    mesh.servicer._fleet = young
    young.start()
    call = mesh.stub.ListModels(inference_pb2.ListModelsRequest(), metadata=mesh.metadata)
    await until(lambda: young.replicas[0].usable)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(young.introduced(), 0.3)
    assert not call.done()
    mesh.workers[1].mute, mesh.workers[1].load.ready = False, True
    mesh.workers[1].changed.set()
    assert {model.name: model.ready_replicas for model in (await call).models} == {"alias": 2, "m": 2}
    await young.stop()


async def test_a_worker_that_is_never_heard_holds_a_router_up_only_for_a_while(mesh: Any) -> None:
    fleet = Fleet([*mesh.config.workers, "unix:/nowhere"], ReplicaConfig(hear_seconds=0.2))
    fleet.start()
    await asyncio.wait_for(fleet.introduced(), 60)
    await until(lambda: all(replica.usable for replica in fleet.replicas[:2]))
    await fleet.stop()

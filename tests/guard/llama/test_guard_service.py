"""The guard as a service whose model is behind a worker that is there, is not, or comes late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from meshlm.chassis.calls import CallInterceptor, Gate
from meshlm.chassis.channels import open_channel
from meshlm.chassis.config import Source
from meshlm.chassis.errors import MeshError, Reason, from_rpc_error
from meshlm.chassis.life import Life
from meshlm.guard.main import build
from meshlm.guard.policy import ALLOW, BLOCK
from meshlm.v1 import generation_pb2, guard_pb2, guard_pb2_grpc
from tests.guard.llama.scripted import MODEL, ScriptedWorker


class Rig:
    """A guard, and the worker that it may ask."""

    def __init__(self, stub: Any, worker: ScriptedWorker) -> None:
        self.stub, self.worker = stub, worker

    async def check(self, text: str, policy: str = "") -> generation_pb2.Verdict:
        """Raises MeshError."""
        source = generation_pb2.Input(prompt=text)
        request = guard_pb2.CheckInputRequest(request_id="r", tenant="t", policy=policy, input=source)
        try:
            response = await self.stub.CheckInput(request, timeout=120)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        verdict: generation_pb2.Verdict = response.verdict
        return verdict


@asynccontextmanager
async def guarding(folder: Path, *, with_worker: bool, **more: str) -> AsyncIterator[Rig]:
    worker = ScriptedWorker(f"unix:{folder}/w")
    if with_worker:
        await worker.start()
    said = {
        "GUARD__MODEL": MODEL,
        "GUARD__LLAMA_GUARD__WORKERS": f'["{worker.target}"]',
        "GUARD__LLAMA_GUARD__TIMEOUT_SECONDS": "60.0" if with_worker else "0.5",
        "GUARD__POLICIES__LAX__FAILURE": "allow",
    } | more
    service, _, _ = build(Source.read(None, {f"MESHLM__{key}": value for key, value in said.items()}))
    server = grpc.aio.server(interceptors=[CallInterceptor(Gate())])
    service.register(server)
    server.add_insecure_port(f"unix:{folder}/g")
    await service.start(Life())
    await server.start()
    try:
        async with open_channel(f"unix:{folder}/g") as channel:
            yield Rig(guard_pb2_grpc.GuardServiceStub(channel), worker)
    finally:
        await server.stop(0)
        await service.stop()
        await worker.stop()


async def test_a_guard_starts_without_its_models_worker_and_judges_once_it_is_there(tmp_path: Path) -> None:
    async with guarding(tmp_path, with_worker=False) as rig:
        with pytest.raises(MeshError) as caught:
            await rig.check("a cake")
        assert caught.value.reason is Reason.GUARD_UNAVAILABLE
        assert caught.value.retry_after is not None
        assert (await rig.check("a cake", "lax")).action == ALLOW  # by the rules alone, as its policy says
        await rig.worker.start()
        async with asyncio.timeout(60):
            while True:
                try:
                    verdict = await rig.check("a !harm")
                    break
                except MeshError as error:
                    assert error.reason is Reason.GUARD_UNAVAILABLE
                    await asyncio.sleep(0.05)
        assert (verdict.action, list(verdict.categories)) == (BLOCK, ["S2", "S7"])


async def test_a_verdict_names_both_models_and_what_each_judged(tmp_path: Path) -> None:
    async with guarding(tmp_path, with_worker=True) as rig:
        rig.worker.unsafe = lambda prompt: 0.6
        verdict = await rig.check("a cake")
        assert verdict.action == BLOCK  # 0.5 and more is unsafe, as Llama Guard's card says
        attack, harm = (d for d in verdict.detectors if d.startswith(("embedded", "llama-guard")))
        assert attack.endswith("/attack")
        assert harm == f"llama-guard-3:{MODEL}/r1/harm"
        assert verdict.score == pytest.approx(0.6)
        assert MODEL in verdict.policy_version


async def test_an_answer_is_stopped_where_its_judge_says_so_and_held_where_it_cannot(tmp_path: Path) -> None:
    async with guarding(tmp_path, with_worker=True) as rig:

        async def requests(*texts: str) -> AsyncIterator[guard_pb2.CheckOutputRequest]:
            source = generation_pb2.Input(prompt="tell me")
            start = guard_pb2.OutputCheckStart(request_id="r", tenant="t", input=source)
            yield guard_pb2.CheckOutputRequest(start=start)
            for text in texts:
                yield guard_pb2.CheckOutputRequest(text=guard_pb2.OutputText(text=text, last=text is texts[-1]))

        harmless = "It is a cake, with sugar and eggs and flour. " * 4
        answers = [a async for a in rig.stub.CheckOutput(requests(harmless, harmless + "!harm " + "x" * 400, "end"))]
        assert answers[-1].verdict.action == BLOCK
        assert answers[-1].final
        released = max(answer.released_chars for answer in answers)
        assert len(harmless) / 2 < released <= 2 * len(harmless)
        rig.worker.failure = MeshError(Reason.ENGINE_LOST, "gone")
        with pytest.raises(grpc.RpcError) as caught:
            _ = [answer async for answer in rig.stub.CheckOutput(requests(harmless + "y", "end"))]
        assert from_rpc_error(caught.value).reason is Reason.GUARD_UNAVAILABLE

"""A worker whose model is a script: its tokens are bytes, its verdicts what a test says."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc

from meshlm.chassis.calls import CallInterceptor, Gate
from meshlm.chassis.errors import MeshError, Reason
from meshlm.guard.judging import Turn
from meshlm.guard.llama.config import Asking, LlamaGuardConfig
from meshlm.guard.llama.judge import LlamaGuardJudge
from meshlm.guard.llama.model import JudgingModel
from meshlm.guard.llama.workers import Workers
from meshlm.v1 import worker_pb2, worker_pb2_grpc

END = 256
MODEL = "llama-guard-3-8b"


class ScriptedWorker(worker_pb2_grpc.WorkerServiceServicer):
    """Its fields may be changed at any time."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.model, self.revision, self.ready = MODEL, "r1", True
        self.unsafe: Callable[[str], float] = lambda prompt: 0.98 if "!harm" in prompt else 0.02
        self.mass = 1.0
        self.says = "unsafe\nS2,S7"
        self.most_tokens = 1 << 30
        self.failure: MeshError | None = None
        self.stalls = False
        self.seconds = 0.0  # that an answer takes
        self.mangles: Callable[[worker_pb2.ScoreResponse], None] = lambda response: None
        self.requests: list[worker_pb2.ScoreRequest] = []
        self.running = self.most_running = self.cancelled = 0
        self._server: grpc.aio.Server | None = None

    @property
    def verdicts(self) -> list[str]:
        """The prompts that a verdict was asked of, each as often as it was."""
        asked = [list(c.token_ids.ids) for r in self.requests for c in r.continuations[:1]]
        return [_text(r) for r, ids in zip(self.requests, asked, strict=True) if ids == [ord("s")]]

    async def start(self) -> None:
        self._server = grpc.aio.server(interceptors=[CallInterceptor(Gate())])
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.target)
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    async def WatchLoad(
        self, request: worker_pb2.WatchLoadRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.WatchLoadResponse]:
        while True:
            model = worker_pb2.WorkerModel(name=self.model, revision=self.revision, chat=True)
            yield worker_pb2.WatchLoadResponse(replica=self.target, ready=self.ready, model=model)
            await asyncio.sleep(0.01)

    async def Score(
        self, request: worker_pb2.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.ScoreResponse:
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if self.stalls:
                await asyncio.Event().wait()
            await asyncio.sleep(self.seconds)
            if self.failure is not None:
                raise self.failure
            return self._scored(request)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    def _scored(self, request: worker_pb2.ScoreRequest) -> worker_pb2.ScoreResponse:
        prompt = _text(request)
        if len(prompt.encode()) > self.most_tokens:
            raise MeshError(Reason.CONTEXT_TOO_LONG, "too long", metadata={"prompt_tokens": str(len(prompt))})
        response = worker_pb2.ScoreResponse(model_revision=self.revision)
        for continuation in request.continuations:
            ids = [END] if continuation.end_of_turn else list(continuation.token_ids.ids or continuation.text.encode())
            scored = response.scored.add(token_ids=ids, logprobs=[-1.0] * len(ids), entropies=[1.0] * len(ids))
            scored.text = "".join("<|end|>" if one == END else chr(one) for one in ids)
            scored.text_offsets.extend(range(len(ids)))
            scored.logprobs[-1] = math.log(max(self._likely(prompt, ids), 1e-9))
        self.mangles(response)
        return response

    def _likely(self, prompt: str, ids: list[int]) -> float:
        if len(ids) == 1:
            unsafe = self.unsafe(prompt)
            return self.mass * (unsafe if ids[0] == ord("u") else 1 - unsafe)
        wanted = [*self.says.encode(), END]
        return 0.9 if ids == wanted[: len(ids)] else 0.01


def _text(request: worker_pb2.ScoreRequest) -> str:
    if request.HasField("input"):
        return request.input.chat.messages[0].content
    return "".join(piece.text for piece in request.pieces)


class Rig:
    """A judge, and its workers."""

    def __init__(self, judge: LlamaGuardJudge, workers: Workers, scripted: list[ScriptedWorker]) -> None:
        self.judge, self.workers, self.scripted = judge, workers, scripted
        self.one = scripted[0]

    async def prompt(self, *texts: str, tenant: str = "t", request_id: str = "r") -> tuple[float, tuple[str, ...]]:
        turns, offset = [], 0
        for number, text in enumerate(texts):
            turns.append(Turn("assistant" if number % 2 else "user", text, offset, judged=not number % 2))
            offset += len(text) + 1
        (opinion,) = await self.judge.judge_prompt(turns, ("attack", "harm"), tenant=tenant, request_id=request_id)
        return round(opinion.score, 6), opinion.categories

    async def answer(self, text: str, *, tenant: str = "t") -> tuple[float, tuple[str, ...]]:
        turns = [Turn("user", "tell me")]
        (opinion,) = await self.judge.judge_answer(turns, text, ("harm",), tenant=tenant, request_id="r")
        return round(opinion.score, 6), opinion.categories


@asynccontextmanager
async def rig(
    folder: Path, count: int = 1, *, model: str = MODEL, asking: Asking | None = None, **config: object
) -> AsyncIterator[Rig]:
    async with AsyncExitStack() as stack:
        scripted = [ScriptedWorker(f"unix:{folder}/w{number}") for number in range(count)]
        for worker in scripted:
            worker.model = model
            await worker.start()
            stack.push_async_callback(worker.stop)
        said = LlamaGuardConfig(**({"workers": tuple(w.target for w in scripted), "timeout_seconds": 60.0} | config))  # type: ignore[arg-type]
        workers = Workers(said)
        workers.start()
        stack.push_async_callback(workers.stop)
        judge = LlamaGuardJudge(JudgingModel(model, asking or said, said), said, workers)
        assert await judge.check()
        async with asyncio.timeout(60):
            while len(workers.serving(model)) < count:
                await asyncio.sleep(0.01)
        for worker in scripted:
            worker.requests.clear()
        yield Rig(judge, workers, scripted)

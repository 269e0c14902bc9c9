"""Stand-ins for services: real processes that serve grpc.health, and an in-process router with scripted answers."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from meshlm.chassis.calls import CallInterceptor, Gate
from meshlm.chassis.errors import MeshError, Reason
from meshlm.mesh.plan import MeshPlan, Part, ProcessPlan
from meshlm.mesh.requests import input_of
from meshlm.v1 import generation_pb2, inference_pb2, inference_pb2_grpc
from meshlm.worker.fake import END, expected_tokens
from meshlm.worker.messages import Sampling

# A service on the real chassis with nothing in it; it notes when it was told to end.
_SERVICE = """
import sys, time
from pathlib import Path
from meshlm.chassis import server
from meshlm.chassis.config import ServerConfig

name, listen, journal = sys.argv[1:4]

class Nothing:
    background_methods = frozenset()
    def register(self, grpc_server): return []
    async def start(self, life): pass
    async def drain(self):
        with Path(journal).open("a") as file: file.write(f"{name} drains\\n")
    async def stop(self):
        with Path(journal).open("a") as file: file.write(f"{name} ends\\n")

Nothing.name = name
server.main(name, lambda source: (Nothing(), ServerConfig(listen=listen), dict))
"""


def service(name: str, part: Part, folder: Path) -> ProcessPlan:
    """A process that serves health, and writes into `folder/journal` when it drains and ends."""
    address = f"unix:{folder / name}.sock"
    command = (sys.executable, "-c", _SERVICE, name, address, str(folder / "journal"))
    return ProcessPlan(name, part, command, {}, address)


def failing(name: str, code: int) -> ProcessPlan:
    """A process that says why and ends at once."""
    script = f"import sys; print('no luck today', file=sys.stderr); sys.exit({code})"
    return ProcessPlan(name, "guard", (sys.executable, "-S", "-c", script), {}, "unix:/nonexistent/socket")


# For meshes whose processes may be kept waiting by a busy machine: what is slow there is neither lost nor an outlier,
# and nobody gives up.
PATIENT = {
    "MESHLM__STATE__TIMEOUT_SECONDS": "30.0",
    "MESHLM__ROUTER__CACHE_SECONDS": "30.0",
    "MESHLM__ROUTER__GUARD_SECONDS": "60.0",
    "MESHLM__ROUTER__REPLICAS__EJECT_SLOWNESS": "0.0",
    "MESHLM__ROUTER__REPLICAS__HEAR_SECONDS": "120.0",
    "MESHLM__ROUTER__OVERLOAD__QUEUE_SECONDS": "120.0",
    "MESHLM__ROUTER__STREAMS__RESUMABLE_SECONDS": "240.0",
    "MESHLM__ROUTER__SERVER__GRACE_SECONDS": "120.0",
    "MESHLM__ROUTER__ENTROPY__SECONDS": "60.0",
    "MESHLM__ROUTER__PROOF__SECONDS": "60.0",
    "MESHLM__GUARD__LLAMA_GUARD__TIMEOUT_SECONDS": "30.0",
}


def read_by_the_fake(source: generation_pb2.Input) -> list[int]:
    """The prompt's tokens, as the fake's chat template and tokenizer make them."""
    tokens: list[int] = []
    for message in source.chat.messages:
        tokens += [*f"<{message.role}>{message.content}".encode(), END]
    return [*tokens, *b"<assistant>"]


def said_by_the_fake(question: str, count: int, **drawn: Any) -> str:
    """What the fake says to a question, in `count` tokens; greedy unless `drawn` (sampling) says otherwise."""
    prompt = read_by_the_fake(input_of([("user", question)]))
    return bytes(expected_tokens(prompt, Sampling(**{"temperature": 0.0, **drawn}), count)).decode()


def plan(*processes: ProcessPlan) -> MeshPlan:
    """A mesh of one stage, whose keys are someone else's matter."""
    return MeshPlan([list(processes)], processes[-1].address, "")


KEY = "mlm_right"
WORDS = ("The ", "sea ", "is ", "deep", ".")


class ScriptedRouter(inference_pb2_grpc.InferenceServiceServicer):
    """Answers WORDS, a token each. The script's fields say what goes wrong."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.requests: list[inference_pb2.StreamGenerateRequest] = []
        self.metadata: list[dict[str, str]] = []
        self.breaks_after: list[int] = []  # for each coming stream: words after which its engine is lost
        self.stalls_after: int | None = None  # words after which nothing more comes
        self.cuts_the_end = False
        self.seed: int | None = None  # told in the start
        self.refusal: MeshError | None = None
        self.explanation = inference_pb2.ExplainRouteResponse()
        self.explained = generation_pb2.Generation()
        self.cancelled = asyncio.Event()
        self._server = grpc.aio.server(interceptors=[CallInterceptor(Gate())])
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(target)

    async def start(self) -> None:
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(0.2)

    def _admit(self, context: grpc.aio.ServicerContext) -> None:
        self.metadata.append(dict(context.invocation_metadata() or ()))
        if self.metadata[-1].get("authorization") != f"Bearer {KEY}":
            raise MeshError(Reason.KEY_INVALID, "no such key")
        if self.refusal is not None:
            raise self.refusal

    async def StreamGenerate(
        self, request: inference_pb2.StreamGenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        self._admit(context)
        self.requests.append(request)
        breaks_after = self.breaks_after.pop(0) if self.breaks_after else None
        try:
            yield inference_pb2.StreamGenerateResponse(start=_start(self.seed))
            for i, word in enumerate(WORDS):
                if i == breaks_after:
                    raise MeshError(Reason.ENGINE_LOST, "the engine ended", retry_after=0.01)
                if i == self.stalls_after:
                    await asyncio.Event().wait()
                if i >= request.resume_from:
                    yield _word(i, word)
            if not self.cuts_the_end:
                yield inference_pb2.StreamGenerateResponse(end=_end(), usage=_usage(len(WORDS)))
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.GenerateResponse:
        self._admit(context)
        choices = [
            inference_pb2.Choice(index=i, text=text, finish_reason=generation_pb2.FINISH_REASON_LENGTH)
            for i, text in ((1, "two"), (0, "one"))
        ]
        return inference_pb2.GenerateResponse(start=_start(), choices=choices, usage=_usage(2), end=_end())

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.ListModelsResponse:
        self._admit(context)
        model = inference_pb2.Model(name="scripted", revision="abc", max_context=64, ready_replicas=2, is_default=True)
        route = inference_pb2.Model(name="route", max_context=64, ready_replicas=2, targets=["other", "scripted"])
        return inference_pb2.ListModelsResponse(models=[route, model])

    async def ExplainRoute(
        self, request: inference_pb2.ExplainRouteRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.ExplainRouteResponse:
        self._admit(context)
        self.explained = request.generation
        return self.explanation

    async def CountTokens(
        self, request: inference_pb2.CountTokensRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.CountTokensResponse:
        self._admit(context)
        return inference_pb2.CountTokensResponse(prompt_tokens=len(request.input.prompt.split()), model=request.model)


def _word(offset: int, text: str) -> inference_pb2.StreamGenerateResponse:
    chunk = generation_pb2.Chunk(token_offset=offset, token_count=1, text=text)
    if offset == len(WORDS) - 1:
        chunk.finish_reason, chunk.matched_stop = generation_pb2.FINISH_REASON_STOP, "<end>"
    return inference_pb2.StreamGenerateResponse(chunk=chunk, usage=_usage(offset + 1))


def _start(seed: int | None = None) -> inference_pb2.StreamStart:
    routing = inference_pb2.RoutingDecision(model="scripted", replica="one", reason="only_replica")
    return inference_pb2.StreamStart(request_id="r-1", trace_id="0" * 32, routing=routing, seed=seed)


def _end() -> inference_pb2.StreamEnd:
    verdict = generation_pb2.Verdict(action=generation_pb2.Verdict.ACTION_ALLOW, policy_version="rules-1")
    timing = generation_pb2.Timing(time_to_first_token=0.5)
    return inference_pb2.StreamEnd(timing=timing, output_verdicts=[verdict], cost_micros=0)


def _usage(tokens: int) -> generation_pb2.Usage:
    return generation_pb2.Usage(prompt_tokens=7, completion_tokens=tokens)

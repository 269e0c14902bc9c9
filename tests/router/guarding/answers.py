"""An answer on its way through an output window: the worker that makes it, guards behind it, and what went out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from meshlm.chassis.errors import MeshError, Reason
from meshlm.guard.checking import AnswerChecks
from meshlm.guard.config import GuardConfig, PolicyConfig
from meshlm.guard.judging import Opinion
from meshlm.guard.policy import Policies
from meshlm.router.guarding.window import OutputWindow
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import guard_pb2, inference_pb2, worker_pb2

Moderation = inference_pb2.Moderation
KEY = "AK" + "IA" + "QWERTZUIOPASDFG2"
MAIL = "jo.doe@example.org"
SCORES = {"answer_flag_score": 0.98, "answer_confirm_score": 0.99, "answer_block_score": 0.997}
PLAIN = "Nothing but a plain word and yet another one after it. "  # 55 characters


class WordJudge:
    """`vile` in what it reads is surely harmful, `dire` perhaps. Opinions of answers come when `gate` is open."""

    version = "words-1"

    def __init__(self, delays: list[int] | None = None) -> None:
        self._delays = delays or [0]
        self.gate: asyncio.Event | None = None
        self.asked = 0

    async def judge_prompt(self, *args: Any, **more: Any) -> list[Opinion]:
        return []

    async def judge_answer(self, turns: Any, answer: str, heads: Any, **more: Any) -> list[Opinion]:
        self.asked += 1
        for _ in range(self._delays[self.asked % len(self._delays)]):
            await asyncio.sleep(0)
        if self.gate is not None:
            await self.gate.wait()
        read = answer[-256:]
        word, score = ("vile", 0.999) if "vile" in read else ("dire", 0.992) if "dire" in read else ("", 0.0)
        start = answer.rfind(word) if word else 0
        return [Opinion("words-1/harm", "harm", score, ("S1",), start, start + len(word))]


class Call:
    """A call of CheckOutput, without a wire."""

    def __init__(self, answers: Callable[[AsyncIterator[Any]], AsyncIterator[Any]]) -> None:
        self._requests: asyncio.Queue[Any] = asyncio.Queue()
        self._answers = answers(self._sent())
        self.cancelled = False

    async def _sent(self) -> AsyncIterator[Any]:
        while (request := await self._requests.get()) is not None:
            yield request

    async def write(self, request: Any) -> None:
        self._requests.put_nowait(request)

    async def read(self) -> Any:
        return await anext(self._answers, grpc.aio.EOF)

    async def done_writing(self) -> None:
        self._requests.put_nowait(None)

    def cancel(self) -> None:
        self.cancelled = True


class Ward:
    """What a window knows of the guard."""

    def __init__(self, answers: Any, *, allow: bool = False, seconds: float = 60.0, hold_tokens: int = 128) -> None:
        self.stub = self
        self.seconds, self.hold_tokens = seconds, hold_tokens
        self._answers, self._allow = answers, allow
        self.errors: list[BaseException] = []

    def CheckOutput(self, **more: Any) -> Call:
        return Call(self._answers)

    def admit(self) -> None:
        pass

    def answered(self) -> None:
        pass

    def failed(self, error: BaseException) -> None:
        self.errors.append(error)
        if not self._allow:
            raise MeshError(Reason.GUARD_UNAVAILABLE, "refused")


def guarded(release: str, judge: WordJudge | None, **more: Any) -> Ward:
    """A ward whose guard is the real one; addresses are redacted."""
    actions = {"pii.email": "redact", **more.pop("actions", {})}
    policies = Policies({"default": PolicyConfig(answer_release=release, actions=actions, **SCORES)}, judge)  # type: ignore[arg-type]
    checks = lambda requests: AnswerChecks(GuardConfig(), policies, lambda verdict: None).responses(requests)  # noqa: E731
    return Ward(checks, **more)


class Noting(Ward):
    """Keeps what its guard is told."""

    def __init__(self, ward: Ward) -> None:
        super().__init__(self._noted, hold_tokens=ward.hold_tokens)
        self._inner = ward._answers
        self.told: list[str] = []

    async def _noted(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async def noted() -> AsyncIterator[Any]:
            async for request in requests:
                if request.HasField("text"):
                    self.told.append(request.text.text)
                yield request

        async for answer in self._inner(noted()):
            yield answer


async def worker(pieces: list[str], *, choice: int = 0, failure: MeshError | None = None) -> AsyncIterator[Any]:
    """Its messages: a token for each piece."""
    for number, piece in enumerate(pieces):
        last = number + 1 == len(pieces) and failure is None
        chunk = pb.Chunk(
            choice=choice, token_offset=number, token_count=1, text=piece, finish_reason=int(last), token_ids=[number]
        )
        yield worker_pb2.RunGenerationResponse(chunk=chunk)
        await asyncio.sleep(0)
    if failure is not None:
        raise failure
    yield worker_pb2.RunGenerationResponse(end=worker_pb2.GenerationEnd())


class Seen:
    """What went out."""

    def __init__(self) -> None:
        self.chunks: list[pb.Chunk] = []
        self.moderations: list[Any] = []
        self.window: OutputWindow | None = None

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def finish(self) -> int:
        return self.chunks[-1].finish_reason if self.chunks else 0

    @property
    def verdict(self) -> pb.Verdict:
        assert self.window is not None
        (verdict,) = self.window.verdicts()
        verdict.latency = 0
        return verdict


async def seen(ward: Ward, messages: AsyncIterator[Any], into: Seen | None = None) -> Seen:
    out = into or Seen()
    window = out.window = OutputWindow(ward, guard_pb2.OutputCheckStart())
    try:
        await window.open()
        async for event in window.through(messages):
            if isinstance(event, pb.Chunk):
                out.chunks.append(event)
            elif isinstance(event, Moderation):
                out.moderations.append(event)
        await window.finish()
    finally:
        window.close()
    return out

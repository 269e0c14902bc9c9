"""A model that a worker serves, as a judge of harm: Llama Guard, or any chat model asked in its words."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from meshlm.chassis import telemetry
from meshlm.chassis.errors import MeshError, Reason
from meshlm.chassis.telemetry import Name
from meshlm.guard.judging import Head, JudgeError, Opinion, Turn
from meshlm.guard.llama import tasks
from meshlm.guard.llama.config import LlamaGuardConfig
from meshlm.guard.llama.model import Caller, Judged, JudgingModel
from meshlm.guard.llama.prompts import Prompt
from meshlm.guard.llama.tasks import Task
from meshlm.guard.llama.verdicts import VerdictError
from meshlm.guard.llama.workers import Replica, Workers

log = structlog.get_logger()
T = TypeVar("T")

# What a text is said to be about whose judge said no verdict.
UNPARSED = "harm.unparsed"
# Verdicts remembered: on the parts of long answers that stay as they are while the answer grows.
_REMEMBERED = 4096


@dataclass(frozen=True)
class _Asked:
    """What is judged in one call of the judge."""

    caller: Caller
    # What brings a conversation to the same worker again, turn after turn.
    place: bytes
    answer: bool


class LlamaGuardJudge:
    """Judges harm; it has no opinion of attacks. Satisfies `Judge`."""

    def __init__(self, model: JudgingModel, config: LlamaGuardConfig, workers: Workers) -> None:
        """The workers are started and stopped by their owner."""
        self.version = model.version
        self._model = model
        self._config = config
        self._workers = workers
        self._known: OrderedDict[bytes, Judged] = OrderedDict()
        self._free = asyncio.Semaphore(config.parallel)
        self._verdicts = telemetry.meter().create_counter(
            Name.GUARD_MODEL_VERDICTS, "1", "What a worker's model was asked, by how it answered"
        )

    async def check(self) -> bool:
        """Whether a worker of the model answers, and can give verdicts; what this learns is kept."""
        try:
            if not await self._workers.until_served(self._model.name, self._config.timeout_seconds):
                raise JudgeError("no worker of the model takes requests")
            await self._workers.ask(self._model.name, b"", self._model.grammar)
        except (JudgeError, MeshError) as error:
            log.warning("a judging model cannot be asked yet", model=self._model.name, why=str(error))
            return False
        return True

    async def judge_prompt(
        self, turns: Sequence[Turn], heads: Sequence[Head], *, tenant: str, request_id: str
    ) -> list[Opinion]:
        """See `Judge`. What is no verdict counts as harmful."""
        if "harm" not in heads:
            return []
        asked = _Asked(Caller(tenant, request_id), _place(turns, tenant), answer=False)
        return await self._judge_all(tasks.of_prompt(turns, self._config), asked)

    async def judge_answer(
        self, turns: Sequence[Turn], answer: str, heads: Sequence[Head], *, tenant: str, request_id: str
    ) -> list[Opinion]:
        """See `Judge`. What is no verdict is asked again, of another worker if there is one; then JudgeError."""
        if "harm" not in heads:
            return []
        asked = _Asked(Caller(tenant, request_id), _place(turns, tenant), answer=True)
        return await self._judge_all(tasks.of_answer(turns, answer, self._config), asked)

    async def _judge_all(self, todo: Sequence[Task], asked: _Asked) -> list[Opinion]:
        if not todo:
            return []
        judged = await _together(self._judge(task, asked) for task in todo)
        score, worst, verdict = max(judged, key=lambda one: one[0])
        detector = f"{self._model.label}/{verdict.revision[:8]}/harm"
        return [Opinion(detector, "harm", score, verdict.categories, worst.start, worst.end)]

    async def _judge(self, task: Task, asked: _Asked) -> tuple[float, Task, Judged]:
        """The verdict on a task, or on the worst part of it. Raises JudgeError."""
        prompt = self._model.prompt(task.turns)
        key = hashlib.blake2b(f"{asked.caller.tenant}\0{prompt.text}".encode("utf-8", "surrogatepass")).digest()
        verdict = self._recall(key)
        if verdict is None:
            try:
                verdict = await self._ask(prompt, asked)
            except MeshError as error:
                parts = task.smaller() if error.reason is Reason.CONTEXT_TOO_LONG else []
                if not parts:
                    log.error("a judging model refuses its prompt", model=self._model.name, **error.metadata)
                    raise JudgeError("the model's worker refuses the prompt") from None
                judged = await _together(self._judge(part, asked) for part in parts)
                return max(judged, key=lambda one: one[0])
            if verdict.revision:
                self._remember(key, verdict)
        return verdict.score, task, verdict

    async def _ask(self, prompt: Prompt, asked: _Asked) -> Judged:
        """Raises JudgeError, and MeshError for what no other worker would answer either."""
        tried: list[str] = []

        async def ask(replica: Replica) -> Judged:
            tried.append(replica.target)
            return await self._model.judge(prompt, replica, asked.caller)

        for again in (True, False):
            try:
                async with self._free:
                    verdict = await self._workers.ask(self._model.name, asked.place, ask, avoid=tried)
            except VerdictError as error:
                self._count("unparsed")
                log.warning("a judging model says no verdict", model=self._model.name, why=str(error))
                if not asked.answer:
                    return Judged(1.0, (UNPARSED,), "")
                if not again:
                    break
            except JudgeError:
                self._count("failed")
                raise
            else:
                self._count("unsafe" if verdict.categories else "safe")
                return verdict
        raise JudgeError("the model says no verdict")

    def _count(self, outcome: str) -> None:
        self._verdicts.add(1, {Name.GUARD_MODEL: self._model.name, Name.GUARD_OUTCOME: outcome})

    def _recall(self, key: bytes) -> Judged | None:
        """A verdict of weights that are served now."""
        verdict = self._known.get(key)
        if verdict is None or all(r.revision != verdict.revision for r in self._workers.serving(self._model.name)):
            return None
        self._known.move_to_end(key)
        return verdict

    def _remember(self, key: bytes, verdict: Judged) -> None:
        self._known[key] = verdict
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)


async def _together(running: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; where one fails, the others are cancelled."""
    started = [asyncio.create_task(one) for one in running]
    try:
        return await asyncio.gather(*started)
    finally:
        for one in started:
            one.cancel()


def _place(turns: Sequence[Turn], tenant: str) -> bytes:
    first = next((turn.text for turn in turns if turn.role not in ("system", "developer")), "")
    return f"{tenant}\0{first}".encode("utf-8", "surrogatepass")

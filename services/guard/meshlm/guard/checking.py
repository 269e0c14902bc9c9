"""The checks of one answer: its choices' texts come in, and how far each may be released goes out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from meshlm.chassis.errors import invalid
from meshlm.guard.config import GuardConfig
from meshlm.guard.conversation import turns_of
from meshlm.guard.policy import Policies, Policy
from meshlm.guard.stream import OutputCheck
from meshlm.v1 import generation_pb2, guard_pb2

Requests = AsyncIterator[guard_pb2.CheckOutputRequest]
# Hears of each verdict that is final, and of those that were never to be.
Tell = Callable[[generation_pb2.Verdict], None]


class AnswerChecks:
    """One answer. A model's opinion may come later than the response to the text that it is of: then another tells."""

    def __init__(self, config: GuardConfig, policies: Policies, tell: Tell) -> None:
        self._config = config
        self._policies = policies
        self._tell = tell
        self._policy: Policy | None = None
        self._start = guard_pb2.OutputCheckStart()
        self._choices: dict[int, _Choice] = {}
        self._outgoing: asyncio.Queue[guard_pb2.CheckOutputResponse | None] = asyncio.Queue()

    async def responses(self, requests: Requests) -> AsyncGenerator[guard_pb2.CheckOutputResponse, None]:
        """Raises MeshError REQUEST_INVALID or GUARD_UNAVAILABLE."""
        reading = asyncio.ensure_future(self._read(requests))
        try:
            while (response := await self._outgoing.get()) is not None:
                yield response
            for choice in self._choices.values():
                choice.check.raise_failure()
            await reading
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await reading
            for choice in self._choices.values():
                # An answer that was cut short counts too; a choice that had its final verdict has been told.
                choice.check.close()
                if not choice.told:
                    self._tell(choice.verdict)

    async def _read(self, requests: Requests) -> None:
        """Raises MeshError."""
        try:
            async for request in requests:
                event = request.WhichOneof("event")
                if self._policy is None:
                    if event != "start":
                        raise invalid("start", "required first")
                    self._start = request.start
                    self._policy = self._policies.get(request.start.policy)
                elif event == "text":
                    await self._take(self._policy, request.text)
                else:
                    raise invalid("text", "required after the start")
            for choice in self._choices.values():
                await choice.check.settle()
        finally:
            self._outgoing.put_nowait(None)

    async def _take(self, policy: Policy, text: guard_pb2.OutputText) -> None:
        choice = self._choices.get(text.choice) or self._open(policy, text.choice)
        check = choice.check
        if check.ended:
            raise invalid("text", "the choice has ended")
        if check.length + len(text.text) > self._config.max_output_chars:
            raise invalid("text.text", f"the choice is longer than {self._config.max_output_chars} characters")
        await check.feed(text.text, last=text.last)
        self._answer(choice)

    def _open(self, policy: Policy, index: int) -> _Choice:
        if len(self._choices) >= self._config.max_choices:
            raise invalid("text.choice", f"more than {self._config.max_choices} choices")
        turns = turns_of(self._start.input, "", policy.config.trusted_roles)
        start = self._start
        check = policy.output_check(turns, tenant=start.tenant, request_id=start.request_id, canaries=start.canaries)
        choice = self._choices[index] = _Choice(policy, check, index)
        check.on_change = lambda: self._hear(choice)
        return choice

    def _hear(self, choice: _Choice) -> None:
        """An opinion came while nothing was fed."""
        if choice.check.failed:
            self._outgoing.put_nowait(None)
        else:
            self._answer(choice)

    def _answer(self, choice: _Choice) -> None:
        response = choice.response()
        if response.final and not choice.told:
            choice.told = True
            self._tell(response.verdict)
        self._outgoing.put_nowait(response)


class _Choice:
    """A choice's check, and what was told of it."""

    def __init__(self, policy: Policy, check: OutputCheck, index: int) -> None:
        self.check = check
        self.told = False  # its final verdict
        self._policy = policy
        self._index = index
        self._redacted = 0  # redactions told

    @property
    def verdict(self) -> generation_pb2.Verdict:
        verdict = self._policy.judge_output(self.check)
        verdict.latency = self.check.seconds
        return verdict

    def response(self) -> guard_pb2.CheckOutputResponse:
        """What is to be told now."""
        check = self.check
        response = guard_pb2.CheckOutputResponse(
            choice=self._index,
            released_chars=check.released,
            verdict=self.verdict,
            final=check.decided,
            taken_chars=check.length,
            judged_chars=check.judged,
            gather_bytes=check.gather,
        )
        if not self._policy.config.shadow:
            for redacted in check.redacted[self._redacted :]:
                found = redacted.finding
                response.redactions.add(
                    char_start=found.start,
                    char_end=found.end,
                    replacement=redacted.replacement,
                    category=found.category,
                )
                self._redacted += 1
        return response

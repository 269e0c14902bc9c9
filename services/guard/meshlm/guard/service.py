"""The gRPC side of the guard."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

import grpc
from opentelemetry import trace

from meshlm.chassis import telemetry
from meshlm.chassis.errors import invalid
from meshlm.chassis.life import Life
from meshlm.chassis.telemetry import Name
from meshlm.guard.config import GuardConfig
from meshlm.guard.embedded import EmbeddedModel
from meshlm.guard.policy import Policies, Policy, act_name
from meshlm.guard.stream import OutputCheck
from meshlm.v1 import generation_pb2, guard_pb2, guard_pb2_grpc

# Between messages in a text judged as one.
_JOINT = "\n"


class GuardService(guard_pb2_grpc.GuardServiceServicer):
    """GuardService by rules, and by the embedded model."""

    name = "guard"
    background_methods: frozenset[str] = frozenset()

    def __init__(self, config: GuardConfig) -> None:
        """Raises ArtefactError."""
        self._config = config
        model = EmbeddedModel.load(config.model_file) if config.model == "embedded" else None
        self._policies = Policies(config.policies, model)
        meter = telemetry.meter()
        self._verdicts = meter.create_counter(Name.GUARD_VERDICTS, "1", "Verdicts by direction and action")
        self._findings = meter.create_counter(Name.GUARD_FINDINGS, "1", "Categories in verdicts")
        self._seconds = meter.create_histogram(Name.GUARD_DURATION, "s", "Time to decide, over a whole text")

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        guard_pb2_grpc.add_GuardServiceServicer_to_server(self, server)
        return [guard_pb2.DESCRIPTOR.services_by_name["GuardService"].full_name]

    async def start(self, life: Life) -> None:
        """Run each path once, so that the first request does not pay for it."""
        policy = self._policies.get("")
        policy.judge_input([(0, "warm up, ïn two scripts")])
        policy.output_check().feed("warm up", last=True)

    async def drain(self) -> None:
        """Nothing: checks end with the answers they follow."""

    async def stop(self) -> None:
        """Nothing is held."""

    async def CheckInput(
        self, request: guard_pb2.CheckInputRequest, context: grpc.aio.ServicerContext
    ) -> guard_pb2.CheckInputResponse:
        begun = time.perf_counter()
        policy = self._policies.get(request.policy)
        texts, length = _judged(request, policy)
        if length > self._config.max_input_chars:
            raise invalid("input", f"longer than {self._config.max_input_chars} characters")
        if length > self._config.inline_chars:
            verdict = await asyncio.to_thread(policy.judge_input, texts)
        else:
            verdict = policy.judge_input(texts)
        verdict.latency = time.perf_counter() - begun
        self._tell("input", verdict)
        return guard_pb2.CheckInputResponse(verdict=verdict)

    async def CheckOutput(
        self, requests: AsyncIterator[guard_pb2.CheckOutputRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[guard_pb2.CheckOutputResponse]:
        policy: Policy | None = None
        checks: dict[int, _Choice] = {}
        async for request in requests:
            event = request.WhichOneof("event")
            if policy is None:
                if event != "start":
                    raise invalid("start", "required first")
                policy = self._policies.get(request.start.policy)
            elif event == "text":
                yield await self._judge_text(policy, checks, request.text)
            else:
                raise invalid("text", "required after the start")
        for choice in checks.values():
            # An answer that was cut short counts too; a choice that had its final verdict has been told.
            if policy is not None and not choice.check.decided:
                self._tell("output", choice.verdict(policy))

    async def _judge_text(
        self, policy: Policy, checks: dict[int, _Choice], text: guard_pb2.OutputText
    ) -> guard_pb2.CheckOutputResponse:
        choice = checks.get(text.choice)
        if choice is None:
            if len(checks) >= self._config.max_choices:
                raise invalid("text.choice", f"more than {self._config.max_choices} choices")
            choice = checks[text.choice] = _Choice(policy.output_check())
        check = choice.check
        if check.ended:
            raise invalid("text", "the choice has ended")
        if check.length + len(text.text) > self._config.max_output_chars:
            raise invalid("text.text", f"the choice is longer than {self._config.max_output_chars} characters")
        told = check.decided
        await choice.feed(text.text, last=text.last, inline_chars=self._config.inline_chars)
        verdict = choice.verdict(policy)
        if check.decided and not told:
            self._tell("output", verdict)
        return guard_pb2.CheckOutputResponse(
            choice=text.choice,
            released_chars=check.released,
            verdict=verdict,
            final=check.decided,
        )

    def _tell(self, direction: str, verdict: generation_pb2.Verdict) -> None:
        """Metrics, and attributes of the call's span: never the text."""
        action = act_name(verdict.action)
        self._verdicts.add(1, {Name.GUARD_DIRECTION: direction, Name.GUARD_ACTION: action})
        self._seconds.record(verdict.latency, {Name.GUARD_DIRECTION: direction})
        for category in verdict.categories:
            self._findings.add(1, {Name.GUARD_DIRECTION: direction, Name.GUARD_CATEGORY: category})
        span = trace.get_current_span()
        span.set_attribute(Name.GUARD_ACTION, action)
        span.set_attribute(Name.GUARD_POLICY, verdict.policy_version)
        if verdict.categories:
            span.set_attribute(Name.GUARD_CATEGORIES, list(verdict.categories))


class _Choice:
    """A choice's check, and the time it took."""

    def __init__(self, check: OutputCheck) -> None:
        self.check = check
        self._seconds = 0.0

    async def feed(self, text: str, *, last: bool, inline_chars: int) -> None:
        begun = time.perf_counter()
        if len(text) > inline_chars:
            await asyncio.to_thread(self.check.feed, text, last=last)
        else:
            self.check.feed(text, last=last)
        self._seconds += time.perf_counter() - begun

    def verdict(self, policy: Policy) -> generation_pb2.Verdict:
        verdict = policy.judge_output(self.check)
        verdict.latency = self._seconds
        return verdict


def _judged(request: guard_pb2.CheckInputRequest, policy: Policy) -> tuple[list[tuple[int, str]], int]:
    """What is judged, each with its offset, and the length of it all.

    Offsets count through the contents of all messages, joined by one line feed; a prompt counts from 0. What is in a
    speaker's name is told from where the message begins.
    Raises MeshError REQUEST_INVALID.
    """
    match request.input.WhichOneof("input"):
        case "prompt":
            return [(0, request.input.prompt)], len(request.input.prompt)
        case "token_ids":
            return [(0, request.token_text)], len(request.token_text)
        case "chat":
            texts, offset = [], 0
            for message in request.input.chat.messages:
                if not policy.trusts(message.role):
                    texts.append((offset, message.content))
                    if message.name:  # chat templates print it
                        texts.append((offset, message.name))
                offset += len(message.content) + len(_JOINT)
            return texts, offset
        case _:
            raise invalid("input", "required")

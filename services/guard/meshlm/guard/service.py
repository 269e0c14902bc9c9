"""The gRPC side of the guard."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Sequence

import grpc
from opentelemetry import trace

from meshlm.chassis import telemetry
from meshlm.chassis.errors import MeshError, invalid
from meshlm.chassis.life import Life
from meshlm.chassis.telemetry import Name
from meshlm.guard.config import GuardConfig
from meshlm.guard.conversation import length_of, turns_of
from meshlm.guard.judges import Judges
from meshlm.guard.judging import Turn
from meshlm.guard.policy import Policies, Policy, act_name
from meshlm.guard.stream import OutputCheck
from meshlm.v1 import generation_pb2, guard_pb2, guard_pb2_grpc


class GuardService(guard_pb2_grpc.GuardServiceServicer):
    """GuardService by rules, and by models."""

    name = "guard"
    background_methods: frozenset[str] = frozenset()

    def __init__(self, config: GuardConfig) -> None:
        """Raises ArtefactError and ConfigError."""
        self._config = config
        self._judges = Judges(config)
        self._policies = Policies(config.policies, self._judges.judge, inline_chars=config.inline_chars)
        meter = telemetry.meter()
        self._verdicts = meter.create_counter(Name.GUARD_VERDICTS, "1", "Verdicts by direction and action")
        self._findings = meter.create_counter(Name.GUARD_FINDINGS, "1", "Categories in verdicts")
        self._seconds = meter.create_histogram(Name.GUARD_DURATION, "s", "Time to decide, over a whole text")

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        guard_pb2_grpc.add_GuardServiceServicer_to_server(self, server)
        return [guard_pb2.DESCRIPTOR.services_by_name["GuardService"].full_name]

    async def start(self, life: Life) -> None:
        """Run each path once, so that the first request does not pay for it."""
        await self._judges.start()
        policy = self._policies.get("")
        with contextlib.suppress(MeshError):  # a model that cannot be asked yet: its verdicts fail one by one
            await policy.judge_input([Turn("user", "warm up, ïn two scripts")])
            await policy.output_check().feed("warm up", last=True)

    async def drain(self) -> None:
        """Nothing: checks end with the answers they follow."""

    async def stop(self) -> None:
        await self._judges.stop()

    async def CheckInput(
        self, request: guard_pb2.CheckInputRequest, context: grpc.aio.ServicerContext
    ) -> guard_pb2.CheckInputResponse:
        begun = time.perf_counter()
        policy = self._policies.get(request.policy)
        turns = turns_of(request.input, request.token_text, policy.config.trusted_roles)
        if not request.input.WhichOneof("input"):
            raise invalid("input", "required")
        if length_of(turns) > self._config.max_input_chars:
            raise invalid("input", f"longer than {self._config.max_input_chars} characters")
        verdict = await policy.judge_input(turns, tenant=request.tenant, request_id=request.request_id)
        verdict.latency = time.perf_counter() - begun
        self._tell("input", verdict)
        return guard_pb2.CheckInputResponse(verdict=verdict)

    async def CheckOutput(
        self, requests: AsyncIterator[guard_pb2.CheckOutputRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[guard_pb2.CheckOutputResponse]:
        policy: Policy | None = None
        choices: dict[int, _Choice] = {}
        try:
            async for request in requests:
                event = request.WhichOneof("event")
                if policy is None:
                    if event != "start":
                        raise invalid("start", "required first")
                    policy, start = self._policies.get(request.start.policy), request.start
                    turns = turns_of(start.input, "", policy.config.trusted_roles)
                elif event == "text":
                    choice = choices.get(request.text.choice)
                    if choice is None:
                        if len(choices) >= self._config.max_choices:
                            raise invalid("text.choice", f"more than {self._config.max_choices} choices")
                        check = policy.output_check(
                            turns, tenant=start.tenant, request_id=start.request_id, canaries=start.canaries
                        )
                        choice = choices[request.text.choice] = _Choice(check)
                    yield await self._judge_text(policy, choice, request.text)
                else:
                    raise invalid("text", "required after the start")
        finally:
            for choice in choices.values():
                # An answer that was cut short counts too; a choice that had its final verdict has been told.
                if policy is not None and not choice.check.decided:
                    self._tell("output", choice.verdict(policy))
                choice.check.close()

    async def _judge_text(
        self, policy: Policy, choice: _Choice, text: guard_pb2.OutputText
    ) -> guard_pb2.CheckOutputResponse:
        check = choice.check
        if check.ended:
            raise invalid("text", "the choice has ended")
        if check.length + len(text.text) > self._config.max_output_chars:
            raise invalid("text.text", f"the choice is longer than {self._config.max_output_chars} characters")
        told = check.decided
        await choice.feed(text.text, last=text.last)
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

    async def feed(self, text: str, *, last: bool) -> None:
        begun = time.perf_counter()
        await self.check.feed(text, last=last)
        await self.check.settle()
        self._seconds += time.perf_counter() - begun

    def verdict(self, policy: Policy) -> generation_pb2.Verdict:
        verdict = policy.judge_output(self.check)
        verdict.latency = self._seconds
        return verdict

"""The gRPC side of the guard."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path

import grpc
from opentelemetry import trace

from meshlm.chassis import telemetry
from meshlm.chassis.errors import MeshError, invalid
from meshlm.chassis.life import Life
from meshlm.chassis.telemetry import Name
from meshlm.guard.checking import AnswerChecks
from meshlm.guard.config import GuardConfig
from meshlm.guard.conversation import length_of, turns_of
from meshlm.guard.judges import Judges
from meshlm.guard.judging import Turn
from meshlm.guard.policy import BLOCK, REDACT, Policies, act_name
from meshlm.guard.reloading import Reloading
from meshlm.v1 import generation_pb2, guard_pb2, guard_pb2_grpc


class GuardService(guard_pb2_grpc.GuardServiceServicer):
    """GuardService by rules, and by models."""

    name = "guard"
    background_methods: frozenset[str] = frozenset()

    def __init__(self, config: GuardConfig, file: Path | None = None) -> None:
        """`file`: where the configuration was read, to take its policies anew. Raises ArtefactError and ConfigError."""
        self._config = config
        self._judges = Judges(config)
        self._policies = Policies(config.policies, self._judges.judge, inline_chars=config.inline_chars)
        self._reloading = Reloading(file, config, self._policies) if file is not None else None
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
        if self._reloading is not None:
            self._reloading.start()
        policy = self._policies.get("")
        with contextlib.suppress(MeshError):  # a model that cannot be asked yet: its verdicts fail one by one
            await policy.judge_input([Turn("user", "warm up, ïn two scripts")])
            await policy.output_check().feed("warm up", last=True)

    async def drain(self) -> None:
        """Nothing: checks end with the answers they follow."""

    async def stop(self) -> None:
        if self._reloading is not None:
            await self._reloading.stop()
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
        response = guard_pb2.CheckInputResponse(verdict=verdict, redacts=policy.redacts_input)
        if verdict.action == REDACT:
            changed = await policy.redact(request.input)
            if changed is None:  # token ids: their text cannot be taken out of them
                verdict.action = response.verdict.action = BLOCK
            else:
                response.redacted_input.CopyFrom(changed)
        self._tell("input", verdict)
        return response

    async def CheckOutput(
        self, requests: AsyncIterator[guard_pb2.CheckOutputRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[guard_pb2.CheckOutputResponse]:
        checks = AnswerChecks(self._config, self._policies, partial(self._tell, "output"))
        async with contextlib.aclosing(checks.responses(requests)) as responses:
            async for response in responses:
                yield response

    def _tell(self, direction: str, verdict: generation_pb2.Verdict) -> None:
        """Metrics, and attributes of the call's span: never the text."""
        action = act_name(verdict.action)
        labels = {Name.GUARD_DIRECTION: direction, Name.GUARD_ACTION: action}
        if verdict.shadow_action:
            labels[Name.GUARD_SHADOW] = act_name(verdict.shadow_action)
        self._verdicts.add(1, labels)
        self._seconds.record(verdict.latency, {Name.GUARD_DIRECTION: direction})
        for category in verdict.categories:
            self._findings.add(1, {Name.GUARD_DIRECTION: direction, Name.GUARD_CATEGORY: category})
        span = trace.get_current_span()
        span.set_attribute(Name.GUARD_ACTION, action)
        if verdict.shadow_action:
            span.set_attribute(Name.GUARD_SHADOW, act_name(verdict.shadow_action))
        span.set_attribute(Name.GUARD_POLICY, verdict.policy_version)
        if verdict.categories:
            span.set_attribute(Name.GUARD_CATEGORIES, list(verdict.categories))

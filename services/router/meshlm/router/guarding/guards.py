"""Stages 5 and 6: what the guard says of the input, and how far it lets the answer go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from opentelemetry.trace import Span

from meshlm.chassis import telemetry
from meshlm.chassis.breaker import Breaker
from meshlm.chassis.calls import outgoing_metadata
from meshlm.chassis.channels import open_channel
from meshlm.chassis.errors import MeshError, Reason, from_rpc_error, invalid
from meshlm.chassis.telemetry import Name, client_span, fail
from meshlm.router.config import KeyConfig, RouterConfig
from meshlm.router.guarding.window import OutputWindow
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import guard_pb2, guard_pb2_grpc

log = structlog.get_logger()

_SERVICE = "meshlm.v1.GuardService"


@dataclass(frozen=True)
class Screened:
    """What the guard made of an input."""

    verdict: pb.Verdict | None = None
    # What a model may see in the input's place, where the policy replaced something.
    redacted: pb.Input | None = None


class Guards:
    """The guard service, as the router sees it. Fails closed unless the key's policy says otherwise."""

    def __init__(self, config: RouterConfig) -> None:
        self._channel = open_channel(config.guard, retryable=[(_SERVICE, "CheckInput")]) if config.guard else None
        self.stub: Any = guard_pb2_grpc.GuardServiceStub(self._channel) if self._channel is not None else None
        self.seconds = config.guard_seconds
        self.hold_tokens = config.guard_hold_tokens
        self._redacting: dict[str, bool] = {}  # by policy: whether it may change inputs, as it last said
        self.breaker = Breaker(config.guard_failures, config.guard_retry_seconds)
        self._failures = telemetry.meter().create_counter(
            Name.GUARD_FAILURES, "1", "Times the guard did not answer, by cause and what followed"
        )

    @property
    def present(self) -> bool:
        """Whether there is a guard at all."""
        return self.stub is not None

    async def stop(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    async def check_input(
        self, request_id: str, key: KeyConfig, source: pb.Input, token_text: str, *, seconds_left: float
    ) -> Screened:
        """What the guard says of an input; nothing where there is none, or where it failed and the key lets that pass.

        Raises MeshError INJECTION_SUSPECTED, PROMPT_UNSAFE, REQUEST_INVALID, GUARD_UNAVAILABLE or DEADLINE.
        """
        if self.stub is None:
            return Screened()
        request = guard_pb2.CheckInputRequest(
            request_id=request_id, tenant=key.tenant, policy=key.guard_policy, input=source, token_text=token_text
        )
        with client_span(_SERVICE, "CheckInput") as span:
            timeout = min(self.seconds, seconds_left)
            try:
                self.admit()
                response = await self.stub.CheckInput(request, timeout=timeout, metadata=outgoing_metadata())
            except (grpc.RpcError, MeshError) as error:
                late = isinstance(error, grpc.RpcError) and error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
                fail(span, _cause(error))
                if timeout < self.seconds and late:
                    raise MeshError(Reason.DEADLINE, "the deadline passed") from None
                if _declined(error) in ("", "input"):  # not `policy`, which is no fault of the caller's
                    raise invalid("generation.input", "longer than the guard can judge") from None
                self.failed(key, error)
                return Screened()
            self.breaker.succeed()
            _describe(span, response.verdict)
        if response.verdict.action == pb.Verdict.ACTION_BLOCK:
            raise _refusal(response.verdict)
        first, self._redacting[key.guard_policy] = self.comes_first(key), response.redacts
        redacted = response.redacted_input if response.HasField("redacted_input") else None
        if redacted is not None and not first:  # others may have seen the input by now
            raise MeshError(Reason.GUARD_UNAVAILABLE, "the guard's policy has changed", retry_after=0.0)
        return Screened(response.verdict, redacted)

    def comes_first(self, key: KeyConfig) -> bool:
        """Whether nobody else may see the key's inputs before the guard did: its policy may replace parts of them."""
        return self.stub is not None and self._redacting.get(key.guard_policy, True)

    def open_output(
        self, request_id: str, key: KeyConfig, source: pb.Input, canaries: Sequence[str] = ()
    ) -> OutputWindow:
        """Checks one answer as it is made; it may hold none of `canaries`. Close it on every ending."""
        if self.stub is None:
            return OutputWindow(_Ward(self, key), guard_pb2.OutputCheckStart())
        start = guard_pb2.OutputCheckStart(
            request_id=request_id, tenant=key.tenant, policy=key.guard_policy, input=source, canaries=canaries
        )
        return OutputWindow(_Ward(self, key), start)

    def admit(self) -> None:
        """Raises MeshError GUARD_UNAVAILABLE while the guard is known to be down: it is not waited for each time."""
        if not self.breaker.allows():
            raise _DownError

    def failed(self, key: KeyConfig, error: BaseException) -> None:
        """The guard cannot answer, or will not. Raises MeshError GUARD_UNAVAILABLE, unless the key's policy lets an
        answer pass that the guard is not there to judge."""
        cause = _cause(error)
        log.warning("the guard does not answer", failure=key.guard_failure, cause=cause, error=type(error).__name__)
        if cause not in ("declined", "refused", "breaker"):
            self.breaker.fail()
        allowed = key.guard_failure == "allow" and cause not in ("declined", "refused")
        self._failures.add(1, {Name.GUARD_CAUSE: cause, Name.GUARD_FAILURE: "allow" if allowed else "refuse"})
        if cause == "declined":  # it does answer: callers must not get by with what it will not judge
            raise MeshError(Reason.GUARD_UNAVAILABLE, "the guard cannot judge this text") from None
        if not allowed:
            raise MeshError(Reason.GUARD_UNAVAILABLE, "the guard does not answer", retry_after=1.0) from None


class _DownError(MeshError):
    """The breaker is open."""

    def __init__(self) -> None:
        super().__init__(Reason.GUARD_UNAVAILABLE, "the guard does not answer", retry_after=1.0)


class _Ward:
    """The guard, for one key's answer."""

    def __init__(self, guards: Guards, key: KeyConfig) -> None:
        self._guards = guards
        self._key = key
        self.stub, self.seconds, self.hold_tokens = guards.stub, guards.seconds, guards.hold_tokens

    def admit(self) -> None:
        """See `Guards.admit`."""
        self._guards.admit()

    def answered(self) -> None:
        """It is there."""
        self._guards.breaker.succeed()

    def failed(self, error: BaseException) -> None:
        """See `Guards.failed`."""
        self._guards.failed(self._key, error)


def _cause(error: BaseException) -> str:
    """`declined`: it will not judge this; `refused`: it has no model now, and its policy is to refuse then;
    `nonsense`, `breaker`, `late` or `unreachable`: it is not there."""
    if isinstance(error, _DownError):
        return "breaker"
    if isinstance(error, MeshError):
        return "nonsense"
    if isinstance(error, grpc.RpcError):
        answer = from_rpc_error(error)
        if answer.reason == Reason.REQUEST_INVALID:
            return "declined"
        if answer.reason == Reason.GUARD_UNAVAILABLE:
            return "refused"
        return "late" if answer.reason == Reason.DEADLINE else "unreachable"
    return "late" if isinstance(error, TimeoutError) else "unreachable"


def _declined(error: BaseException) -> str | None:
    """The field at fault where the guard will not judge what it was sent (empty: the whole); None if it failed."""
    if not isinstance(error, grpc.RpcError):
        return None
    answer = from_rpc_error(error)
    return answer.metadata.get("field", "") if answer.reason == Reason.REQUEST_INVALID else None


def _refusal(verdict: pb.Verdict) -> MeshError:
    metadata = {"categories": ",".join(verdict.categories), "policy_version": verdict.policy_version}
    if all(category.startswith(("injection.", "jailbreak.")) for category in verdict.categories):
        return MeshError(Reason.INJECTION_SUSPECTED, "the input looks like an attack on the model", metadata=metadata)
    return MeshError(Reason.PROMPT_UNSAFE, "the input is not allowed by policy", metadata=metadata)


def _describe(span: Span, verdict: pb.Verdict) -> None:
    span.set_attribute(Name.GUARD_ACTION, pb.Verdict.Action.Name(verdict.action).removeprefix("ACTION_").lower())
    span.set_attribute(Name.GUARD_CATEGORIES, list(verdict.categories))
    span.set_attribute(Name.GUARD_SCORE, verdict.score)
    span.set_attribute(Name.GUARD_POLICY, verdict.policy_version)

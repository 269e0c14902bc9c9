"""One worker as a router sees it: what it pushed, what was sent to it since, and how its answers went."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import structlog

from meshlm.chassis.channels import open_channel
from meshlm.chassis.errors import Reason
from meshlm.chassis.prefixes import TextPrefix, contains, covered
from meshlm.router.replicas.concurrency import ConcurrencyLimit
from meshlm.router.replicas.health import FIRST_TOKENS, Health
from meshlm.router.replicas.overload_config import OverloadConfig
from meshlm.v1 import worker_pb2, worker_pb2_grpc

log = structlog.get_logger()

_SERVICE = "meshlm.v1.WorkerService"
# A push that left the worker before a request came there arrives up to so much later, seconds.
_ON_ITS_WAY = 0.05
# Chunks of a prompt that a replica was just sent count as cached there so long, seconds: they soon are, and the next
# one with the same beginning should not be computed elsewhere.
_PROMISE = 2.0
_PROMISED_CHUNKS = 96
_PROMISES = 4096
# Prompt tokens a second of a worker that has not shown its own pace yet.
_TOKENS_PER_SECOND = 2000.0
# Least seconds of a step: those of the fake engine, and of one that has made none yet, take no time.
_STEP = 0.005
_SMOOTHING = 0.2
# Tokens of a prompt that is too short to tell the pace.
_TELLING_TOKENS = 16


class Attempt:
    """One request at one replica, from its sending to its end."""

    def __init__(self, replica: Replica, tokens: int, begun: float) -> None:
        self.replica = replica
        self.tokens = tokens  # of the prompt, those that it had to compute as far as the router knew
        self.begun = begun
        self.first: float | None = None  # when the first token came
        self.last = begun  # when the last message came
        self.told = False  # whether the replica's pushes count it
        self._ended = False
        self._message: worker_pb2.RunGenerationResponse | None = None

    def note(self, message: worker_pb2.RunGenerationResponse) -> None:
        """A message of the worker, in the order in which they come."""
        self._message = message
        self.last = self.replica.clock()
        if self.first is None and message.HasField("chunk"):
            self.first = self.last
            self.replica.learn_first(self, message)

    def end(self, reason: Reason | None = None) -> None:
        """It is over, with the reason if it failed; a caller that left is no failure. Idempotent."""
        if self._ended:
            return
        self._ended = True
        self.replica.learn_end(self, self._message, reason)


class Replica:
    """A channel to a worker, and what is known of it."""

    def __init__(
        self,
        target: str,
        overload: OverloadConfig = OverloadConfig(),  # noqa: B008  it is frozen
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.target = target
        self.clock = clock
        self.limit = ConcurrencyLimit(overload, lambda: self.clock())
        self.on_end: Callable[[], None] | None = None  # told when one of its places comes free
        self.channel = open_channel(target, retryable=[(_SERVICE, "CountInputTokens")])
        self.stub: Any = worker_pb2_grpc.WorkerServiceStub(self.channel)
        # Of one serialized request, in a list: the call keeps the list for as long as it lasts, and not the prompt.
        self.run: Any = self.channel.unary_stream(
            f"/{_SERVICE}/RunGeneration",
            request_serializer=list.pop,
            response_deserializer=worker_pb2.RunGenerationResponse.FromString,
        )
        self.state: worker_pb2.WatchLoadResponse | None = None  # None while it cannot be heard
        self.quarantined = False  # proven wrong: it gets no requests
        self.health = Health()
        self.agreed_until = 0.0  # all routers leave it out until then
        self.ready_since = 0.0
        self.prefill_seconds = 1 / _TOKENS_PER_SECOND  # for a prompt token; measured once there are answers
        self._attempts: set[Attempt] = set()
        # What this router saw end since the worker last told: its figures still count that.
        self._ended = 0  # requests
        self._computed = 0  # prompt tokens
        self._heard = 0.0
        self._promised: dict[bytes, float] = {}  # when each ends

    @property
    def name(self) -> str:
        return self.state.replica if self.state is not None else self.target

    @property
    def model(self) -> str:
        return self.state.model.name if self.state is not None else ""

    def is_left_out(self, now: float) -> bool:
        """As an outlier: this router found it so, or enough routers did."""
        return now < self.agreed_until or self.health.is_ejected(now)

    @property
    def usable(self) -> bool:
        return self.state is not None and self.state.ready and not self.state.draining and not self.quarantined

    @property
    def in_flight(self) -> int:
        """This router's own requests at it."""
        return len(self._attempts)

    def has_room(self, share: float) -> bool:
        """Whether one more request may go there, if only `share` of its limit may be used; at least one place is for
        everybody."""
        state = self.state
        queue_full = state is not None and 0 < state.waiting_limit <= state.waiting
        return not queue_full and self.in_flight < max(1, int(share * self.limit.value))

    def hear(self, state: worker_pb2.WatchLoadResponse) -> None:
        was_usable, before, self.state = self.usable, self.state, state
        if before is not None and before.counters.engine_starts != state.counters.engine_starts:
            self._promised.clear()  # the new engine's cache is empty
        if before is None or before.routers != state.routers:
            self.limit.divide(state.routers)
            log.info("routers at a worker", replica=state.replica, routers=state.routers, places=self.limit.value)
        now = self.clock()
        if self.usable and not was_usable:
            self.ready_since = now
        for attempt in self._attempts:
            attempt.told = attempt.told or attempt.begun < now - _ON_ITS_WAY
        self._heard, self._ended, self._computed = now, 0, 0

    def lose(self) -> None:
        self.state = None
        self._promised.clear()

    def begin(self, prefix: TextPrefix | None, tokens: int) -> Attempt:
        """A request is sent to it now, with so many prompt tokens to compute."""
        now = self.clock()
        attempt = Attempt(self, tokens, now)
        self._attempts.add(attempt)
        if prefix is not None:
            if len(self._promised) > _PROMISES:
                self._promised = {text: ends for text, ends in self._promised.items() if ends > now}
            self._promised.update(dict.fromkeys(prefix.hashes(_PROMISED_CHUNKS), now + _PROMISE))
        return attempt

    def cached_share(self, prefix: TextPrefix) -> float:
        """What share of a prompt its prefix cache holds, as far as its digest tells. Range [0, 1]."""
        state = self.state
        if state is None or not prefix.chunks:
            return 0.0
        found, now = 0, self.clock()
        for text_hash in prefix.hashes():
            if not contains(state.text_digest, text_hash) and self._promised.get(text_hash, 0.0) < now:
                break
            found += 1
        return covered(found) / prefix.size

    @property
    def load(self) -> int:
        """Sequences in its hands, as it last told, and those sent since."""
        assert self.state is not None  # noqa: S101  only usable replicas are compared
        told = max(0, self.state.running + self.state.waiting - self._ended)
        return told + sum(not attempt.told for attempt in self._attempts)

    @property
    def step_seconds(self) -> float:
        return max(self.state.step_seconds if self.state is not None else 0.0, _STEP)

    def seconds_to_first_token(self, tokens: int) -> float:
        """Predicted for a prompt of which `tokens` are to be computed: those queued before it, its own, and a step for
        each sequence in its hands; what does not fit into the free blocks is paid twice, for others are preempted."""
        state = self.state
        assert state is not None  # noqa: S101
        pending = max(0, state.pending_prefill_tokens - self._computed)
        pending += sum(a.tokens for a in self._attempts if not a.told and a.first is None)
        short = max(0, tokens - state.free_blocks * state.block_size) if state.block_size else 0
        return (pending + tokens + short) * self.prefill_seconds + (1 + self.load) * self.step_seconds

    def learn_first(self, attempt: Attempt, message: worker_pb2.RunGenerationResponse) -> None:
        """The first token came."""
        assert attempt.first is not None  # noqa: S101
        self._forget_tokens(attempt)
        fresh = message.usage.prompt_tokens - message.usage.cached_prompt_tokens
        seconds = attempt.first - attempt.begun
        self.health.note_first(seconds, fresh)
        self.limit.note_first(seconds / (FIRST_TOKENS + max(0, fresh)))

    def learn_end(
        self, attempt: Attempt, message: worker_pb2.RunGenerationResponse | None, reason: Reason | None
    ) -> None:
        """A request is over."""
        in_flight = self.in_flight
        if attempt.begun < self._heard:
            self._ended += 1
        if attempt.first is None:
            self._forget_tokens(attempt)
        self._attempts.discard(attempt)
        self.health.note_end(reason, began=attempt.first is not None)
        if reason is Reason.OVERLOADED:
            self.limit.drop(in_flight - 1)
        elif message is not None and attempt.first is not None:
            self._learn_pace(attempt, attempt.first, message)
            self.limit.note_end(in_flight, queued=self.state is not None and self.state.waiting > 0)
        if self.on_end is not None:
            self.on_end()

    def _forget_tokens(self, attempt: Attempt) -> None:
        if attempt.begun < self._heard:
            self._computed += attempt.tokens

    def _learn_pace(self, attempt: Attempt, first: float, message: worker_pb2.RunGenerationResponse) -> None:
        tokens = message.usage.completion_tokens
        if tokens > 1 and attempt.last > first:
            seconds = (attempt.last - first) / (tokens - 1)
            self.health.note_token(seconds)
            self.limit.note_each(seconds)
        fresh = message.usage.prompt_tokens - message.usage.cached_prompt_tokens
        if message.HasField("end") and message.end.timing.prefill > 0 and fresh >= _TELLING_TOKENS:
            measured = message.end.timing.prefill / fresh
            self.prefill_seconds += _SMOOTHING * (measured - self.prefill_seconds)

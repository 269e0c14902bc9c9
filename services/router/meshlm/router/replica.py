"""One worker as a router sees it: what it pushed, what was sent to it since, and how its answers went."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from meshlm.chassis.channels import open_channel
from meshlm.chassis.errors import Reason
from meshlm.chassis.prefixes import CHUNK_BYTES, TextPrefix, contains
from meshlm.router.health import Health
from meshlm.v1 import worker_pb2, worker_pb2_grpc

_SERVICE = "meshlm.v1.WorkerService"
# A push that left the worker before a request came there arrives up to so much later, seconds.
_ON_ITS_WAY = 0.05
# Chunks of a prompt that a replica was just sent count as cached there so long, seconds: they soon are, and the next
# one with the same beginning should not be computed elsewhere.
_PROMISE = 2.0
_PROMISED_CHUNKS = 64
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
        self.told = False  # whether the replica's pushes count it
        self._ended = False
        self._message: worker_pb2.RunGenerationResponse | None = None

    def note(self, message: worker_pb2.RunGenerationResponse) -> None:
        """A message of the worker, in the order in which they come."""
        self._message = message
        if self.first is None and message.HasField("chunk"):
            self.first = self.replica.clock()
            self.replica.learn_first(self, message)

    def end(self, reason: Reason | None = None) -> None:
        """It is over, with the reason if it failed; a caller that left is no failure. Idempotent."""
        if self._ended:
            return
        self._ended = True
        self.replica.learn_end(self, self._message, reason)


class Replica:
    """A channel to a worker, and what is known of it."""

    def __init__(self, target: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.target = target
        self.clock = clock
        self.channel = open_channel(target, retryable=[(_SERVICE, "CountInputTokens")])
        self.stub: Any = worker_pb2_grpc.WorkerServiceStub(self.channel)
        self.state: worker_pb2.WatchLoadResponse | None = None  # None while it cannot be heard
        self.health = Health()
        self.ready_since = 0.0
        self.prefill_seconds = 1 / _TOKENS_PER_SECOND  # for a prompt token; measured once there are answers
        self._attempts: set[Attempt] = set()
        self._promised: dict[bytes, float] = {}  # when each ends

    @property
    def name(self) -> str:
        return self.state.replica if self.state is not None else self.target

    @property
    def usable(self) -> bool:
        return self.state is not None and self.state.ready and not self.state.draining

    @property
    def in_flight(self) -> int:
        """This router's own requests at it."""
        return len(self._attempts)

    def hear(self, state: worker_pb2.WatchLoadResponse) -> None:
        was_usable, self.state = self.usable, state
        now = self.clock()
        if self.usable and not was_usable:
            self.ready_since = now
        for attempt in self._attempts:
            attempt.told = attempt.told or attempt.begun < now - _ON_ITS_WAY

    def lose(self) -> None:
        self.state = None
        self._promised.clear()

    def begin(self, prefix: TextPrefix | None, tokens: int) -> Attempt:
        """A request is sent to it now, with so many prompt tokens to compute."""
        now = self.clock()
        attempt = Attempt(self, tokens, now)
        self._attempts.add(attempt)
        if prefix is not None and self.state is not None and self.state.text_digest:
            if len(self._promised) > _PROMISES:
                self._promised = {text: ends for text, ends in self._promised.items() if ends > now}
            self._promised.update(dict.fromkeys(prefix.hashes(_PROMISED_CHUNKS), now + _PROMISE))
        return attempt

    def cached_share(self, prefix: TextPrefix) -> float:
        """What share of a prompt its prefix cache holds, as far as its digest tells. Range [0, 1]."""
        state = self.state
        if state is None or not state.text_digest or not prefix.chunks:
            return 0.0
        found, now = 0, self.clock()
        for text_hash in prefix.hashes():
            if not contains(state.text_digest, text_hash) and self._promised.get(text_hash, 0.0) < now:
                break
            found += 1
        return min(1.0, found * CHUNK_BYTES / prefix.size)

    @property
    def load(self) -> int:
        """Sequences in its hands, as it last told, and those sent since."""
        assert self.state is not None  # noqa: S101  only usable replicas are compared
        return self.state.running + self.state.waiting + sum(not attempt.told for attempt in self._attempts)

    def seconds_to_first_token(self, tokens: int) -> float:
        """Predicted for a prompt of which `tokens` are to be computed: those queued before it, its own, and a step for
        each sequence in its hands; what does not fit into the free blocks is paid twice, for others are preempted."""
        state = self.state
        assert state is not None  # noqa: S101
        pending = state.pending_prefill_tokens + sum(a.tokens for a in self._attempts if not a.told)
        short = max(0, tokens - state.free_blocks * state.block_size) if state.block_size else 0
        step = max(state.step_seconds, _STEP)
        return (pending + tokens + short) * self.prefill_seconds + (1 + self.load) * step

    def learn_first(self, attempt: Attempt, message: worker_pb2.RunGenerationResponse) -> None:
        """The first token came."""
        assert attempt.first is not None  # noqa: S101
        fresh = message.usage.prompt_tokens - message.usage.cached_prompt_tokens
        self.health.note_first(attempt.first - attempt.begun, fresh)

    def learn_end(
        self, attempt: Attempt, message: worker_pb2.RunGenerationResponse | None, reason: Reason | None
    ) -> None:
        """A request is over."""
        self._attempts.discard(attempt)
        self.health.note_end(reason, began=attempt.first is not None, now=self.clock())
        if message is None or attempt.first is None:
            return
        tokens = message.usage.completion_tokens
        if tokens > 1:
            self.health.note_token((self.clock() - attempt.first) / (tokens - 1))
        fresh = message.usage.prompt_tokens - message.usage.cached_prompt_tokens
        if message.HasField("end") and message.end.timing.prefill > 0 and fresh >= _TELLING_TOKENS:
            measured = message.end.timing.prefill / fresh
            self.prefill_seconds += _SMOOTHING * (measured - self.prefill_seconds)

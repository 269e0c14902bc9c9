"""How a replica's answers went lately, and whether it is an outlier: one that fails or is slow while its peers are not.

After Envoy's outlier detection: consecutive failures, a share of failures, and here latency beyond the peers'. What a
router saw by itself decides for that router; what several saw decides for all (`ejections.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

from meshlm.chassis.errors import Reason
from meshlm.router.replicas.config import ReplicaConfig

# Failures of the replica. The others are the caller's, or say that it is busy.
FAILURES = frozenset({Reason.ENGINE_LOST, Reason.INTERNAL, Reason.NO_REPLICA, Reason.OUT_OF_MEMORY})
_LATEST = 50
_TELLING = 20  # requests
_SMOOTHING = 0.1
# Tokens that the first one costs beside the prompt's own: so that short prompts do not look slow.
FIRST_TOKENS = 32
# Slower by less than this is no slowness, seconds a token.
_LEAST_SLOWNESS = 0.005
_MOST_DOUBLINGS = 5
# A replica that was well for so many times its last ejection starts anew with short ones.
_FORGIVEN_AFTER = 10


class Latency:
    """A running mean that says how many it has seen."""

    def __init__(self) -> None:
        self.mean = 0.0
        self.count = 0

    def note(self, seconds: float) -> None:
        self.count += 1
        self.mean += max(_SMOOTHING, 1 / self.count) * (seconds - self.mean)


class Health:
    """What a router saw of one replica."""

    def __init__(self) -> None:
        self.in_a_row = 0  # failures
        self.latest: deque[bool] = deque(maxlen=_LATEST)  # whether each failed
        self.first = Latency()  # seconds to the first token, for each prompt token
        self.each = Latency()  # seconds for each token after it
        self.ejected_until = 0.0
        self.ejections = 0
        self.cause = ""  # of the last ejection

    def note_first(self, seconds: float, fresh: int) -> None:
        """`fresh`: prompt tokens that were computed."""
        self.first.note(seconds / (FIRST_TOKENS + max(0, fresh)))

    def note_token(self, seconds: float) -> None:
        self.each.note(seconds)

    def note_end(self, reason: Reason | None, *, began: bool) -> None:
        """`began`: whether a token came. One that ended without failure and without a token says nothing."""
        failed = reason in FAILURES
        if failed or began:
            self.in_a_row = self.in_a_row + 1 if failed else 0
            self.latest.append(failed)

    @property
    def failed_share(self) -> float:
        return sum(self.latest) / len(self.latest) if self.latest else 0.0

    def is_ejected(self, now: float) -> bool:
        return now < self.ejected_until

    def pardon(self) -> None:
        """Use it again: others are left out in its place."""
        self.ejected_until = 0.0

    def eject(self, cause: str, now: float, seconds: float) -> None:
        """Leave it out for `seconds`, doubled for each ejection before. What was seen is forgotten: it starts anew."""
        if now - self.ejected_until > _FORGIVEN_AFTER * seconds * 2**self.ejections:
            self.ejections = 0
        self.ejected_until = now + seconds * 2 ** min(self.ejections, _MOST_DOUBLINGS)
        self.ejections += 1
        self.cause = cause
        self.in_a_row = 0
        self.latest.clear()
        self.first, self.each = Latency(), Latency()


def fault(health: Health, peers: Sequence[Health], config: ReplicaConfig) -> str:
    """Why a replica is an outlier among its peers: `failures`, `failure_share`, `slow`; empty where it is none."""
    if config.eject_failures and health.in_a_row >= config.eject_failures:
        return "failures"
    if config.eject_share < 1 and len(health.latest) >= _TELLING and health.failed_share >= config.eject_share:
        return "failure_share"
    if config.eject_slowness:
        for own, others in (
            (health.first, [peer.first for peer in peers]),
            (health.each, [peer.each for peer in peers]),
        ):
            means = [other.mean for other in others if other.count >= _TELLING]
            if own.count >= _TELLING and means:
                usual = median(means)
                if own.mean > config.eject_slowness * usual and own.mean - usual > _LEAST_SLOWNESS:
                    return "slow"
    return ""


def may_eject(ejected: int, replicas: int, most: float) -> bool:
    """Whether one more of a model's replicas may be left out. The last one never is."""
    return ejected + 1 < replicas and (ejected + 1) / replicas <= most

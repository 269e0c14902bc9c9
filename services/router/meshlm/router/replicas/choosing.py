"""Stage 4, choose: which of a model's replicas is to answer, and what spoke for and against each. No I/O.

docs/routing.md says it in words, docs/decisions/0013 why.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from meshlm.chassis.prefixes import TextPrefix
from meshlm.router.replicas.replica import Replica
from meshlm.router.replicas.residency import ANYWHERE, Regions

# Replicas within so much of the best, and so many steps more, are as good: what is known of them is some steps old.
_NEAR = 1.5
_NEAR_STEPS = 1
# A session leaves its replica where it would take so many times as long as at the best, and so much longer in seconds.
_SESSION_YIELDS = 2.0
_SESSION_YIELDS_SECONDS = 0.1
# Share of its share that a replica gets in its first moments.
_LEAST_WEIGHT = 0.1


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What of a request matters for the choice."""

    model: str
    tenant: str = ""
    session: str = ""
    tokens: int = 0  # of the prompt, as far as is known
    prefix: TextPrefix | None = None  # None: prefix caches do not matter
    regions: Regions = ANYWHERE


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A replica that can take the request."""

    replica: Replica
    seconds: float  # predicted to the first token
    cached: int  # prompt tokens
    load: int
    weight: float  # share of its share that it gets, while it is new


@dataclass(frozen=True)
class Exclusion:
    """A replica that cannot."""

    replica: Replica
    reason: str  # unheard, not_ready, draining, region, ejected, full or other_revision


@dataclass(frozen=True)
class Choice:
    """Replicas in the order in which to try them, and why."""

    model: str
    revision: str
    replicas: tuple[Replica, ...]
    reason: str
    candidates: tuple[Candidate, ...] = ()  # in the same order
    excluded: tuple[Exclusion, ...] = ()

    def cached(self, replica: Replica) -> int:
        """Prompt tokens that a replica is expected to hold."""
        return next((c.cached for c in self.candidates if c.replica is replica), 0)


def sort_out(
    replicas: Iterable[Replica], wanted: Wanted, now: float, share: float | None = None
) -> tuple[list[Replica], list[Exclusion]]:
    """The model's replicas that can take a request, and why the others cannot.

    `share`: of a worker's places that may be used; None: room does not matter.
    """
    able, excluded = [], []
    for replica in replicas:
        state = replica.state
        if state is None:
            excluded.append(Exclusion(replica, "unheard"))  # it may serve anything, anywhere
        elif state.model.name != wanted.model:
            continue
        elif not wanted.regions.allow(state.region):
            excluded.append(Exclusion(replica, "region"))
        elif state.draining:
            excluded.append(Exclusion(replica, "draining"))
        elif not state.ready:
            excluded.append(Exclusion(replica, "not_ready"))
        elif replica.quarantined:
            excluded.append(Exclusion(replica, "quarantined"))
        elif replica.is_left_out(now):
            excluded.append(Exclusion(replica, "ejected"))
        elif share is not None and not replica.has_room(share):
            excluded.append(Exclusion(replica, "full"))
        else:
            able.append(replica)
    return able, excluded


def weigh(replica: Replica, wanted: Wanted, now: float, slow_start: float) -> Candidate:
    """What speaks for a replica."""
    cached = round(wanted.tokens * replica.cached_share(wanted.prefix)) if wanted.prefix is not None else 0
    age = now - replica.ready_since
    weight = 1.0 if not slow_start else min(1.0, _LEAST_WEIGHT + (1 - _LEAST_WEIGHT) * age / slow_start)
    return Candidate(
        replica=replica,
        seconds=replica.seconds_to_first_token(wanted.tokens - cached),
        cached=cached,
        load=replica.load,
        weight=weight,
    )


def pick(candidates: Sequence[Candidate], wanted: Wanted, chance: random.Random) -> tuple[Candidate, str]:
    """The one to try first, and why."""
    if len(candidates) == 1:
        return candidates[0], "only_replica"
    ranked = sorted(candidates, key=_rank)
    best = ranked[0]
    if wanted.session:
        own = max(candidates, key=lambda candidate: _affinity(wanted, candidate.replica.name))
        longest = max(_SESSION_YIELDS * best.seconds, best.seconds + _SESSION_YIELDS_SECONDS)
        if own.seconds <= longest:
            return own, "session"
    most = _NEAR * best.seconds + _NEAR_STEPS * best.replica.step_seconds
    near = [candidate for candidate in ranked if candidate.seconds <= most]
    # The better of two drawn, not the best: routers that know the same would all send their next request to that one.
    first = min(chance.choice(near), chance.choice(near), key=_rank)
    heaviest = max(candidate.weight for candidate in candidates)
    if chance.random() >= first.weight / heaviest:
        first = next((candidate for candidate in ranked if candidate.weight == heaviest), first)
    fewest = min(candidate.cached for candidate in candidates)
    return first, "prefix" if first.cached > fewest else "least_loaded"


def _rank(candidate: Candidate) -> tuple[float, int]:
    state = candidate.replica.state
    used = state.total_blocks - state.free_blocks if state is not None else 0
    return candidate.seconds, used


def _affinity(wanted: Wanted, name: str) -> bytes:
    """Rendezvous hashing (Thaler and Ravishankar, 1998): a replica more or less moves only its own sessions."""
    words = [word.encode() for word in (wanted.tenant, wanted.session, name)]
    return blake2b(b"\0".join(words), digest_size=8).digest()

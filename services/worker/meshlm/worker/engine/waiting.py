"""Who is next? The sequences that have not started, or were preempted.

- Between priorities: rank is `arrival + priority * aging_seconds`, so one step of priority is worth `aging_seconds` of
  waiting. The priority whose oldest sequence has the least rank goes first. Ranks never change and later arrivals rank
  behind in the end.
- Within a priority: the tenant that was served least (`fairness.py`), whatever the others' sequences have waited; among
  equals the one with the least rank.
- Within a tenant: by rank. With a single tenant all this is the order of ranks.
- A tenant whose turn it was and whose sequence did not find enough blocks keeps its turn, or others' smaller sequences
  would for ever take the blocks that come free.
- Places in the queue are shared too: where it is full, the tenant with most of them loses its last one to a tenant that
  has fewer, so that a flood does not get the others refused.

Nothing starves, with finitely many tenants: take the sequence with the least rank of all. Its priority goes first until
it starts. Whoever starts before it is of a tenant served no more than its own, and is charged for it; counters of
others grow past its tenant's, while newly come tenants begin at the least counter. So its tenant has its turn in the
end, and it is its tenant's first. Then the next sequence has the least rank.

Longer cached prefixes are not preferred among a tenant's sequences: it would break the order of arrival, which is what
bounds each one's waiting, and what such an order gains (computing a prefix once) is had by `underway.py` already.
Between tenants the cache counts by itself: cached tokens are not charged.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

from meshlm.worker.engine.fairness import Shares
from meshlm.worker.engine.sequence import Sequence

Rank = tuple[float, str]
Line = list[Sequence]  # of one priority and tenant, by rank


class WaitingQueue:
    """Iterates by priority, tenant and rank; `first` says who starts."""

    def __init__(self, rank: Callable[[Sequence], Rank], shares: Shares) -> None:
        self.tokens = 0  # of all that wait
        self.unstarted = 0  # those that were never preempted
        self._rank = rank
        self._shares = shares
        self._lines: dict[int, dict[str, Line]] = {}  # by priority, by tenant; none is empty
        self._length = 0
        self._turn: tuple[int, str] | None = None  # priority and tenant whose sequence found too few blocks

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        for lines in self._lines.values():
            for line in lines.values():
                yield from line

    def add(self, sequence: Sequence) -> None:
        request = sequence.request
        tenants = {tenant for lines in self._lines.values() for tenant in lines}
        if request.tenant not in tenants:
            self._shares.join(request.tenant, tenants)
        line = self._lines.setdefault(request.priority, {}).setdefault(request.tenant, [])
        insort(line, sequence, key=self._rank)
        self._count(sequence, 1)

    def remove(self, sequence: Sequence) -> None:
        request = sequence.request
        lines = self._lines[request.priority]
        line = lines[request.tenant]
        del line[bisect_left(line, self._rank(sequence), key=self._rank)]
        self._count(sequence, -1)
        if not line:
            del lines[request.tenant]
            if self._turn == (request.priority, request.tenant):
                self._turn = None
        if not lines:
            del self._lines[request.priority]

    def first(self, ready: Callable[[Sequence], bool]) -> Sequence | None:
        """The next to start of those that are `ready`."""
        for lines in sorted(self._lines.values(), key=self._oldest):
            for line in sorted(lines.values(), key=self._claim):
                for sequence in line:
                    if ready(sequence):
                        return sequence
        return None

    def to_displace(self, tenant: str) -> Sequence | None:
        """Who leaves a full queue so that `tenant` gets a place: of the tenant with most places the last sequence that
        never ran. None where no tenant has more than `tenant` would then have."""
        places: dict[str, list[Sequence]] = {}
        for sequence in self:
            if sequence.preemptions == 0:
                places.setdefault(sequence.request.tenant, []).append(sequence)
        most = max(places.values(), key=len, default=[])
        if len(most) <= len(places.get(tenant, [])) + 1:
            return None
        return max((one for one in most if not one.request.admitted), key=self._rank, default=None)

    def keep_turn(self, sequence: Sequence) -> None:
        """There were too few blocks for `sequence`: its tenant stays the next of its priority."""
        self._turn = sequence.request.priority, sequence.request.tenant

    def end_turn(self) -> None:
        self._turn = None

    def _oldest(self, lines: dict[str, Line]) -> Rank:
        return min(self._rank(line[0]) for line in lines.values())

    def _claim(self, line: Line) -> tuple[bool, int, Rank]:
        request = line[0].request
        others_turn = self._turn != (request.priority, request.tenant)
        return others_turn, self._shares.served(request.tenant), self._rank(line[0])

    def _count(self, sequence: Sequence, sign: int) -> None:
        self._length += sign
        self.tokens += sign * len(sequence.tokens)
        self.unstarted += sign * (sequence.preemptions == 0)

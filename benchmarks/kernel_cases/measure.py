"""Times of calls on the device, and what the device can do at most, both measured in the same run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernel_cases.case import Call, Case, Work

AT_A_TIME = 1e-3  # seconds of work that are captured and timed as one
MOST_CALLS = 512


@dataclass(frozen=True)
class Ceilings:
    """bandwidth: bytes a second that a copy reads and writes; flops: a second of an 8192-cubed product in bf16."""

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Measured:
    """Seconds a call. limit: the physical one; peers: without those that could not do it, which `absent` explains."""

    case: Case
    tolerance: float | None
    ours: list[float]
    limit: float
    peers: dict[str, list[float]]
    absent: dict[str, str]
    distance: float | None  # relative Frobenius, from the first peer's result

    @property
    def seconds(self) -> float:
        return statistics.median(self.ours)

    @property
    def of_limit(self) -> float:
        return self.limit / self.seconds

    @property
    def wrong(self) -> bool:
        return self.distance is not None and self.tolerance is not None and not self.distance <= self.tolerance

    def fastest(self) -> str | None:
        return min(self.peers, key=lambda name: statistics.median(self.peers[name]), default=None)

    def times(self, peer: str | None) -> float | None:
        """A peer's time over ours."""
        return statistics.median(self.peers[peer]) / self.seconds if peer in self.peers else None

    @property
    def reached(self) -> bool | None:
        """Whether the goal is; None where there is none or its peer is absent."""
        goal, found = self.case.goal, []
        if goal.of_limit is not None:
            found.append(self.of_limit >= goal.of_limit)
        if goal.times is not None:
            times = self.times(goal.peer or self.fastest())
            found.append(None if times is None else times >= goal.times)
        return None if not found or None in found else all(found)


def ceilings() -> Ceilings:
    """Random numbers: zeros are faster."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copying = min(timed(lambda _: target.copy_(source), 1, 9))
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    multiplying = statistics.median(timed(lambda _: a @ b, 1, 9))
    return Ceilings(2 * source.nbytes / copying, 2 * 8192**3 / multiplying)


def timed(call: Call, sets: int, runs: int, captured: bool = True) -> list[float]:
    """Seconds a call, of each of `runs` replays of a CUDA graph in which calls go around their sets of buffers; or of
    as many rounds of plain calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(min(sets, 3)):  # compiles, and lets libraries allocate
            call(i)
        stream.synchronize()
        once = _elapsed(lambda: [call(i % sets) for i in range(3)]) / 3
    count = min(MOST_CALLS, math.ceil(AT_A_TIME / once))
    count = math.ceil(count / sets) * sets
    if not captured:
        return [_elapsed(lambda: [call(i % sets) for i in range(count)]) / count for _ in range(runs)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i % sets)
    for _ in range(2):
        graph.replay()
    return [_elapsed(graph.replay) / count for _ in range(runs)]


def _elapsed(work: Callable[[], object]) -> float:
    """Seconds between two events of the current stream, with what is launched between them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(case: Case, limits: Ceilings, runs: int) -> Measured:
    """Ours is compared with the first peer before anything is timed. Raises what ours raises."""
    work = case.prepare()
    absent: dict[str, str] = {}
    distance = compare(work, absent)
    ours = timed(work.ours, work.sets, runs, work.captured)
    theirs = {}
    for name, peer in work.peers.items():
        if name in absent:
            continue
        try:
            theirs[name] = timed(peer, work.sets, runs, work.captured)
        except RuntimeError as error:  # cannot be captured
            absent[name] = _shown(error)
            torch.cuda.synchronize()
    limit = max(work.bytes / limits.bandwidth, work.flops / limits.flops)
    return Measured(case, work.tolerance, ours, limit, theirs, absent, distance)


def compare(work: Work, absent: dict[str, str]) -> float | None:
    """Calls every peer once, and notes which cannot do it. The distance from the first that can."""
    distance = None
    for name, peer in work.peers.items():
        try:
            theirs = peer(0)
            torch.cuda.synchronize()
        except (RuntimeError, NotImplementedError, AttributeError, ValueError, TypeError) as error:
            absent[name] = _shown(error)
            continue
        if distance is None and work.tolerance is not None:
            distance = distance_of(work.ours(0), theirs)
    return distance


def _shown(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def distance_of(ours: object, theirs: object) -> float | None:
    """The relative Frobenius distance; of tuples the largest of their parts'; infinite between whole numbers that
    differ, which are tokens or places; None where there is nothing to compare."""
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        parts = [distance_of(*pair) for pair in zip(ours, theirs, strict=True)]
        known = [part for part in parts if part is not None]
        return None if not known else math.nan if any(map(math.isnan, known)) else max(known)
    if not isinstance(ours, torch.Tensor) or not isinstance(theirs, torch.Tensor):
        return None
    if not theirs.is_floating_point():
        return 0.0 if torch.equal(ours, theirs) else math.inf
    wanted = theirs.double().reshape(-1)
    return float((ours.double().reshape(-1) - wanted).norm() / wanted.norm().clamp(min=torch.finfo(torch.float64).tiny))

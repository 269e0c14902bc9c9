"""The cases of `engine.py`: which requests, and what is read from the times at which their tokens came."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import ceil
from typing import Any

FIRST_ID, LAST_ID = 1000, 40_000  # words and parts of words, in every tokenizer of this size


@dataclass(frozen=True)
class Request:
    """Greedy, of a fixed length. With `after`: it comes when each request without has so many tokens."""

    prompt: list[int]
    new: int
    after: int = 0


@dataclass(frozen=True)
class Trace:
    """Seconds, of one clock: when each request began, and when each of its tokens came."""

    begun: Sequence[float]
    times: Sequence[Sequence[float]]

    @property
    def first(self) -> list[float]:
        """TTFT of each request."""
        return [times[0] - begun for begun, times in zip(self.begun, self.times, strict=True)]

    @property
    def gaps(self) -> list[float]:
        """Between neighbouring tokens, of all requests."""
        return [later - earlier for times in self.times for earlier, later in pairwise(times)]

    @property
    def rate(self) -> float:
        """Tokens a second, from the first request's beginning to the last token."""
        span = max(times[-1] for times in self.times) - min(self.begun)
        return sum(len(times) for times in self.times) / span

    def of(self, count: int) -> Trace:
        """The first `count` requests alone."""
        return Trace(self.begun[:count], self.times[:count])


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    return sorted(values)[max(0, ceil(share * len(values)) - 1)]


class Prompts:
    """Random token ids from one seed: every implementation is asked the same, and nothing twice unless meant so."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def ids(self, count: int) -> list[int]:
        return [self._random.randrange(FIRST_ID, LAST_ID) for _ in range(count)]


STREAMS = 8  # that run when the long prompt comes


def workloads(seed: int) -> dict[str, list[Request]]:
    """One turn: the cases in their order. `shared_warm` finds the prefix of `shared_cold` where a cache kept it."""
    prompts = Prompts(seed)
    prefix = prompts.ids(512)
    streams = [Request(prompts.ids(64), 192) for _ in range(STREAMS)]
    return {
        "decode": [Request(prompts.ids(32), 128)],
        "prefill": [Request(prompts.ids(512), 1)],
        "concurrent": [Request(prompts.ids(64), 128) for _ in range(16)],
        "shared_cold": [Request(prefix + prompts.ids(32), 64) for _ in range(16)],
        "shared_warm": [Request(prefix + prompts.ids(32), 64) for _ in range(16)],
        "stall": [*streams, Request(prompts.ids(2000), 16, after=16)],
    }


# What is read from each case: name of the figure, its unit, and whether less is better.
FIGURES: Mapping[str, tuple[str, bool]] = {
    "decode_b1": ("tok/s", False),
    "prefill_512": ("tok/s", False),
    "concurrent_16": ("tok/s", False),
    "ttft_p50_16": ("ms", True),
    "ttft_p99_16": ("ms", True),
    "tpot_p50_16": ("ms", True),
    "tpot_p99_16": ("ms", True),
    "shared_prefix_16_cold": ("tok/s", False),
    "shared_prefix_16": ("tok/s", False),
    "stall_2000": ("ms", True),
    "tpot_p99_over_median_2000": ("", True),
    "ttft_2000": ("ms", True),
}


def figures(case: str, trace: Trace) -> dict[str, float]:
    """The figures of one case, by the names in FIGURES."""
    match case:
        case "decode":
            return {"decode_b1": 1 / (sum(trace.gaps) / len(trace.gaps))}
        case "prefill":
            return {"prefill_512": 512 / trace.first[0]}
        case "concurrent":
            first, gaps = trace.first, trace.gaps
            return {
                "concurrent_16": trace.rate,
                "ttft_p50_16": percentile(first, 0.5) * 1e3,
                "ttft_p99_16": percentile(first, 0.99) * 1e3,
                "tpot_p50_16": percentile(gaps, 0.5) * 1e3,
                "tpot_p99_16": percentile(gaps, 0.99) * 1e3,
            }
        case "shared_cold":
            return {"shared_prefix_16_cold": trace.rate}
        case "shared_warm":
            return {"shared_prefix_16": trace.rate}
        case "stall":
            gaps = trace.of(STREAMS).gaps
            return {
                "stall_2000": max(gaps) * 1e3,
                "tpot_p99_over_median_2000": percentile(gaps, 0.99) / percentile(gaps, 0.5),
                "ttft_2000": trace.first[STREAMS] * 1e3,
            }
    raise ValueError(f"no case {case!r}")


def as_json(requests: Sequence[Request]) -> list[dict[str, Any]]:
    return [asdict(request) for request in requests]

"""What every peer of `engine.py` speaks: a workload as one JSON line in, the arrival time of each of its tokens out.

A workload is a list of requests {"prompt": token ids, "new": tokens, "after": tokens}: greedy, of a fixed length. One
with `after` above 0 starts when each request without has so many tokens. The answer is {"begun": [s], "times": [[s]]},
seconds since the workload came, or {"error": why} for one that the peer cannot run.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

THREADS = 2
PR_SET_PDEATHSIG = 1


class Unable(Exception):  # noqa: N818 - named as the condition
    """The peer cannot run such a workload; the text says why."""


class Run:
    """The requests of one workload, and when their tokens came."""

    def __init__(self, requests: list[dict[str, Any]]) -> None:
        self.prompts: list[list[int]] = [request["prompt"] for request in requests]
        self.new: list[int] = [request["new"] for request in requests]
        self._after: list[int] = [request.get("after", 0) for request in requests]
        self._start = time.perf_counter()
        self._begun: list[float | None] = [None] * len(requests)
        self._times: list[list[float]] = [[] for _ in requests]

    @property
    def all_at_once(self) -> bool:
        return not any(self._after)

    def due(self) -> list[int]:
        """Requests to start now: each is told once, and its clock runs from then on."""
        tokens = min(len(times) for times, after in zip(self._times, self._after, strict=True) if not after)
        found = [index for index, after in enumerate(self._after) if self._begun[index] is None and after <= tokens]
        for index in found:
            self._begun[index] = time.perf_counter() - self._start
        return found

    def came(self, index: int, tokens: int = 1) -> None:
        """`tokens` tokens of a request are here now."""
        self._times[index] += [time.perf_counter() - self._start] * tokens

    def count(self, index: int) -> int:
        return len(self._times[index])

    @property
    def done(self) -> bool:
        return all(len(times) >= new for times, new in zip(self._times, self.new, strict=True))

    def answer(self) -> dict[str, Any]:
        return {"begun": self._begun, "times": self._times}


def serve(start: Callable[[], tuple[dict[str, Any], Callable[[Run], None]]]) -> None:
    """Answer workloads until the input ends. `start` gives what the peer says of itself (`version` and settings; `pid`
    where another process does the work) and what runs a workload. Libraries that print do so to the standard error."""
    # A benchmark that is killed leaves its peers stopped, where the end of the input would wake none of them.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ready, run = start()
    print(json.dumps({"pid": os.getpid()} | ready), file=channel, flush=True)
    for line in sys.stdin:
        workload = Run(json.loads(line)["requests"])
        try:
            run(workload)
            answer = workload.answer()
        except Unable as reason:
            answer = {"error": str(reason)}
        print(json.dumps(answer), file=channel, flush=True)

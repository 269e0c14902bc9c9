"""Configuration of what happens when there is more work than the workers can do (section `router.overload`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class OverloadConfig:
    """How many requests one router has at a worker at a time, and how many wait for it. docs/overload.md says how."""

    # Requests at a worker at a time, before anything was learnt of it: its routers have equal parts of that.
    first_concurrency: int = 1024
    # Fewest that one router's part may shrink to.
    least_concurrency: int = 4
    # Most that one router's part may grow to.
    most_concurrency: int = 4096
    # Requests of priority critical that wait in one router for a worker with room; more are refused.
    critical_queue: int = 512
    # Those of priority interactive or standard.
    default_queue: int = 512
    # Those of priority batch.
    sheddable_queue: int = 128
    # Longest that a request waits there, seconds.
    queue_seconds: float = 10.0

    def __post_init__(self) -> None:
        if not 1 <= self.least_concurrency <= self.first_concurrency <= self.most_concurrency:
            raise ValueError("needs 1 <= least_concurrency <= first_concurrency <= most_concurrency")
        if min(self.critical_queue, self.default_queue, self.sheddable_queue) < 0 or self.queue_seconds <= 0:
            raise ValueError("a queue cannot be negative, and queue_seconds must be above 0")

"""The cache's configuration (`cache`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from meshlm.chassis.config import ServerConfig


@dataclass(frozen=True)
class CacheConfig:
    """How answers are kept, and how long one request may wait for another's."""

    # Where the service listens.
    server: ServerConfig = field(default_factory=lambda: ServerConfig(listen="127.0.0.1:50081"))
    # Seconds an answer is kept.
    ttl_seconds: float = 300.0
    # Seconds a leader may take to store or release, before one of those who wait takes over.
    lease_seconds: float = 60.0
    # Longest wait for another's answer, seconds, whatever the caller asks.
    max_wait_seconds: float = 60.0
    # Largest answer kept, serialized bytes.
    max_answer_bytes: int = 1024 * 1024
    # After a failure of the store: seconds in which lookups are answered without asking it.
    retry_seconds: float = 1.0

    def __post_init__(self) -> None:
        for name in ("ttl_seconds", "lease_seconds", "max_wait_seconds", "max_answer_bytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0")
        if self.retry_seconds < 0:
            raise ValueError("retry_seconds must not be negative")
